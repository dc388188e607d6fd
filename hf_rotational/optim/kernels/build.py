"""Builds the CPU kernel with the system's C compiler: once per machine, into a cache of the user's."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("cpu.c")
# No -ffast-math: linking with it makes the whole process flush denormals to 0, and NaN and infinity have to stay where
# they are. These only leave out errno and exception flags, which nobody reads, and let a product be added unrounded.
FLAGS = (
    "-std=c11",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
TUNED = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
"""Further flags: the first that the compiler knows are taken."""


class KernelUnavailable(RuntimeError):
    """The kernel cannot be used on this machine; the message says why."""


def cache_folder() -> Path:
    """Where built kernels lie: ``hf_rotational`` in ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_rotational"


def compiler() -> list[str]:
    """The command that compiles C: ``CC``, by default ``cc``."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


@functools.cache
def library(source: Path = SOURCE) -> Path:
    """The built kernel, which is built now unless it was before.

    Args:
        source: a C file.

    Raises:
        KernelUnavailable: without a compiler that can build it, or a cache that can be written.
    """
    command = compiler()
    version = _run([*command, "--version"])
    key = hashlib.sha256(
        repr((source.read_text(encoding="utf-8"), command, version, FLAGS, TUNED, _processor())).encode()
    )
    try:
        built = cache_folder() / f"{source.stem}-{key.hexdigest()[:20]}.so"
        if built.exists():
            return built
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            new = Path(folder, built.name)
            for place, tuned in enumerate(TUNED, start=1):
                try:
                    _run([*command, *FLAGS, *tuned, "-o", str(new), str(source), "-lm"])
                    break
                except KernelUnavailable:
                    if place == len(TUNED):
                        raise
            os.replace(new, built)  # at once: other processes may be building the same
    except KernelUnavailable:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        raise KernelUnavailable(f"the cache cannot be written: {error}") from None
    return built


@functools.cache
def kernel() -> Callable[..., Any]:
    """``rotational_step`` of ``cpu.c``, callable from Python; other threads run while it does.

    Raises:
        KernelUnavailable: as :func:`library` does, and for one that cannot be loaded.
    """
    try:
        function = ctypes.CDLL(str(library())).rotational_step
    except (OSError, AttributeError) as error:
        raise KernelUnavailable(f"the built kernel cannot be loaded: {error}") from None
    address, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes, function.restype = [address, number, number, address, number], None
    return function


@functools.cache
def unavailable() -> str | None:
    """Why there is no kernel on this machine; ``None`` if there is."""
    try:
        kernel()
    except KernelUnavailable as error:
        return str(error)
    return None


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"the C compiler cannot be run (set CC to one that can): {error}") from None
    except subprocess.CalledProcessError as error:
        raise KernelUnavailable(f"{command[0]} cannot build it: {error.stderr.strip()[-500:]}") from None


def _processor() -> str:
    """What -march=native depends on: homes may be shared by machines with different processors."""
    facts = [platform.machine(), platform.processor(), platform.libc_ver()[1]]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return repr(
        facts + sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
