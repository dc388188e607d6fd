"""What cases of the CUDA kernel share that run on a CPU, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_rotational.optim.kernels import cpu, cuda, triton
from tests.helpers import make, noise

FLOAT32 = 5e-6
"""A few roundings a step of weights of size 1 to 4."""
NEAR = {"rtol": 1e-5, "atol": 1e-6}


class Launches(list[int]):
    """Tiles of every launch."""

    def __init__(self) -> None:
        self.compiled: set[tuple[Any, ...]] = set()
        """What the kernel would have been compiled for."""
        self.tables = 0
        """How many have been laid out."""


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """CPU tensors are the CUDA kernel's, and neurons shared from 10,000 entries on."""
    found = Launches()

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(table: Tensor, partials: Tensor, *constants: Any, **options: Any) -> None:
                found.append(*grid)
                # Triton also compiles anew for pointers with another alignment.
                found.compiled.add((*constants, table.data_ptr() % 16, partials.data_ptr() % 16))
                kernel[grid](table, partials, *constants, **options)

            return launch

    def counted(*shared: Any) -> Any:
        found.tables += 1
        return lay_out(*shared)

    kernel, lay_out = triton.rotational_step, triton.Launch
    monkeypatch.setattr(triton, "rotational_step", Counted())
    monkeypatch.setattr(triton, "Launch", counted)
    monkeypatch.setattr(triton, "SHARED", 10_000)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cpu, "takes", lambda *_: False)
    return found


def fused(build: Any, params: Any, **options: Any) -> Any:
    return make(build, params, backend="fused", **options)


def float32(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(noise(*shape, seed=seed, dtype=torch.float32))
