"""The CUDA kernel without a GPU: compiled for one, and interpreted on the CPU (``triton_*cases.py``)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
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
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="capturable=True alone"):
        optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_graph_replays_steps() -> None:
    start, grads = noise(64, 96).float(), [noise(64, 96, seed=seed).float() for seed in range(1, 7)]
    parameter, twin = nn.Parameter(start.cuda()), nn.Parameter(start.double())
    rate = torch.tensor(1e-2, device="cuda")
    optimizer = RotationalAdamW([parameter], lr=rate, weight_decay=0.1, backend="fused", capturable=True)
    exact, graph = RotationalAdamW([twin], lr=1e-2, weight_decay=0.1), torch.cuda.CUDAGraph()
    parameter.grad = torch.empty_like(parameter)
    for step, grad in enumerate(grads):
        parameter.grad.copy_(grad)
        twin.grad = grad.double()
        rate.fill_(1e-2 / (step + 1))
        exact.param_groups[0]["lr"] = 1e-2 / (step + 1)
        if step == 2:
            with torch.cuda.graph(graph):
                optimizer.step()
        if step < 2:
            optimizer.step()
        else:
            graph.replay()
        exact.step()
    torch.testing.assert_close(parameter.detach().cpu().double(), twin.detach(), rtol=0, atol=5e-6)
    assert optimizer.state[parameter]["step"] == len(grads)


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


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiles_for_an_h100_without_spilling_registers(form: str, aligned: bool, tmp_path: Path) -> None:
    assert_compiles("AdamW", [form], aligned, tmp_path)


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


def test_counting_compiles_for_an_h100_without_spilling_registers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from hf_rotational.optim.kernels.triton_counts import count_steps

    assert "ld.global" in assembled_for_an_h100(count_steps, tmp_path, table(), ROWS, num_warps=1)


ROWS = 256


def table() -> torch.Tensor:
    from hf_rotational.optim.kernels.triton_kernel import COLUMNS

    return torch.zeros(ROWS * COLUMNS.value, dtype=torch.int64)


def assert_compiles(settings: str, forms: list[str], aligned: bool, folder: Path) -> None:
    pytest.importorskip("triton")
    from triton import language as tl

    from hf_rotational.optim.kernels.triton import OPTIONS
    from hf_rotational.optim.kernels.triton_kernel import PARTIALS, Settings, Variant, rotational_step

    named = {**EVERYTHING, "dtype": "fp32", **SETTINGS[settings]}
    dtype = tl.dtype(named.pop("dtype"))
    partials = torch.empty(4, PARTIALS.value, dtype=torch.float64)
    variants = tuple(Variant(*FORMS[form], aligned) for form in forms)
    for finishes in (False, True) if "shared" in forms else (False,):
        arguments = table(), partials, ROWS, Settings(**named, dtype=dtype, grad_dtype=dtype), variants, finishes
        ptx = assembled_for_an_h100(rotational_step, folder, *arguments, **OPTIONS)
        # Loads of 16 bytes are what alignment is for.
        assert ("ld.global.v4" in ptx) == aligned


def assembled_for_an_h100(kernel: Any, folder: Path, *arguments: Any, **options: Any) -> str:
    """What a kernel is compiled to, once it has been assembled without spilling registers."""
    import triton

    # From 3.9 on Triton writes what only the newer of its assemblers reads.
    new = Version(triton.__version__) >= Version("3.9")
    assembler = triton.knobs.nvidia.ptxas_blackwell if new else triton.knobs.nvidia.ptxas
    triton.runtime.driver.set_active(H100())
    try:
        compiled = kernel.warmup(*arguments, **options, grid=(1,))
    finally:
        with suppress(RuntimeError):  # there is no other without a GPU
            triton.runtime.driver.reset_active()
    ptx = folder / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    report = subprocess.run(
        [assembler.path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")], report
    return ptx.read_text()
