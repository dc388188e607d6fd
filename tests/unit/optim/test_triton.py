"""The CUDA kernel without a GPU: compiled for one, and interpreted on the CPU (``triton_*cases.py``)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_rotational import RotationalAdamW
from hf_rotational.optim.kernels import cpu, cuda
from tests.helpers import exactly_equal, gradient, noise

ROOT = Path(__file__).parents[3]


def test_without_triton_fused_says_so_and_auto_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cpu, "takes", lambda *_: False)
    cuda.unavailable.cache_clear()
    try:
        parameter = nn.Parameter(noise(5, 7, dtype=torch.float32))
        with pytest.raises(ValueError, match=r"Invalid backend: 'fused' \(must be .* it needs the package triton"):
            RotationalAdamW([parameter], backend="fused")

        optimizer = RotationalAdamW([parameter])
        for step in range(2):
            parameter.grad = gradient(parameter, 0, step)
            optimizer.step()
        assert optimizer.state[parameter]["rotation_step"] == 2

        # Settings may change, or parameters move to the device, after the optimizer was made.
        optimizer.param_groups[0]["backend"] = "fused"
        with pytest.raises(RuntimeError, match="it needs the package triton"):
            optimizer.step()
    finally:
        cuda.unavailable.cache_clear()


def test_interpreted_it_does_what_the_formulas_say() -> None:
    pytest.importorskip("triton")
    cases = map(str, Path(__file__).parent.glob("triton_*cases.py"))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_on_a_gpu_it_follows_float64_repeats_bit_for_bit_and_waits_for_nothing() -> None:
    optimizer, params = take_steps("cuda", torch.float32, "fused")
    _, again = take_steps("cuda", torch.float32, "fused")
    _, exact = take_steps("cpu", torch.float64, "eager")
    exactly_equal([p.detach() for p in again], [p.detach() for p in params])
    for parameter, twin in zip(params, exact, strict=True):
        torch.testing.assert_close(parameter.detach().cpu().double(), twin.detach(), rtol=0, atol=5e-6)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="cannot be captured"):
        optimizer.step()


def take_steps(device: str, dtype: torch.dtype, backend: str) -> tuple[RotationalAdamW, list[nn.Parameter]]:
    """Six under a schedule, with rows, shared rows, columns and a vector, one of which each step has no gradient for.
    From the second on nothing may wait for the device."""
    shapes = [(64, 96), (2, 70_000), (70, 33), (129,)]
    params = [nn.Parameter(noise(*shape, seed=seed).to(device, dtype)) for seed, shape in enumerate(shapes)]
    columns = {"params": params[2:], "neuron_dims": (1,)}
    optimizer = RotationalAdamW([{"params": params[:2]}, columns], weight_decay=0.1, backend=backend)
    for step, lr in enumerate([1e-3, 1e-2, 5e-3, 0.0, 2e-3, 1e-3]):
        for place, parameter in enumerate(params):
            # In float32 first, so that all see the same numbers.
            grad = None if step % 5 == place + 1 else noise(*shapes[place], seed=100 * step + place).float()
            parameter.grad = None if grad is None else grad.to(device, dtype)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return optimizer, params


FORMS = {
    "plain": ("plain", False, 1, 2048),
    "rows": ("held", False, 2, 1024),
    "longest rows held": ("held", False, 1, 4096),
    "short rows": ("held", False, 64, 32),
    "short columns": ("held", True, 32, 64),
    "long rows": ("walked", False, 1, 2048),
    "columns": ("walked", True, 32, 64),
    "shared": ("shared", False, 1, 2048),
}
EVERYTHING: dict[str, Any] = {"kind": "adam", "centers": True, "forgetful": True, "rounding": "nearest"}
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD": {"kind": "sgd"},
    "momentum": {"kind": "momentum"},
    "Nesterov": {"kind": "nesterov"},
    "Lion": {"kind": "lion"},
    "published": {"centers": False, "forgetful": False},
    "Kahan": {"rounding": "kahan", "dtype": "bf16"},
    "stochastic": {"rounding": "stochastic", "dtype": "fp16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiles_for_an_h100_without_spilling_registers(form: str, aligned: bool, tmp_path: Path) -> None:
    assert_compiles("AdamW", [form], aligned, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [name for name in SETTINGS if name != "AdamW"])
def test_every_setting_compiles_for_an_h100_without_spilling_registers(settings: str, tmp_path: Path) -> None:
    assert_compiles(settings, ["plain", "rows", "columns"], True, tmp_path)


class H100:
    """What Triton has to know of a device to compile for it, without one."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def assert_compiles(settings: str, forms: list[str], aligned: bool, folder: Path) -> None:
    triton = pytest.importorskip("triton")
    from triton import language as tl

    from hf_rotational.optim.kernels.triton import WARPS
    from hf_rotational.optim.kernels.triton_kernel import COLUMNS, PARTIALS, Settings, Variant, rotational_step

    named = {**EVERYTHING, "dtype": "fp32", **SETTINGS[settings]}
    dtype = tl.dtype(named.pop("dtype"))
    table = torch.zeros(256 * COLUMNS.value, dtype=torch.int64)
    partials = torch.empty(4, PARTIALS.value, dtype=torch.float64)
    variants = tuple(Variant(*FORMS[form], aligned) for form in forms)
    for finishes in (False, True) if "shared" in forms else (False,):
        arguments = table, partials, 256, Settings(**named, dtype=dtype, grad_dtype=dtype), variants, finishes
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.runtime.driver, "_active", H100())
            compiled = rotational_step.warmup(*arguments, num_warps=WARPS, grid=(1,))
        ptx = folder / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        report = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")], report
        # Loads of 16 bytes are what alignment is for.
        assert ("ld.global.v4" in compiled.asm["ptx"]) == aligned
