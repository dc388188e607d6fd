"""``hf-rotational env``: prints the versions in use, and which backend takes the steps of each optimizer, and why."""

from __future__ import annotations

import platform
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

DESCRIPTION = (
    "Prints the versions of what hf-rotational builds on, the devices, and which backend computes the steps of each "
    "optimizer with backend='auto', and why. Builds the CPU kernel if that has not been done."
)


def register(commands: Any) -> None:
    """Adds the command to ``commands``, which ``ArgumentParser.add_subparsers`` returned."""
    parser: ArgumentParser = commands.add_parser(
        "env", help="show versions, devices, and the backend of each optimizer", description=DESCRIPTION
    )
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    """Carries the command out."""
    from importlib.metadata import version

    import torch

    import hf_rotational

    rows = {
        "hf-rotational": hf_rotational.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "accelerate": version("accelerate"),
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for name, value in rows.items():
        print(f"{name:<15} {value}")
    print(f"\n{backends()}")


def backends() -> str:
    """Which backend steps what with ``backend="auto"``, and why, as lines to print."""
    from hf_rotational.optim import OPTIMIZERS
    from hf_rotational.optim.kernels.build import compiler, library, unavailable
    from hf_rotational.optim.kernels.cpu import KINDS

    reason = unavailable()
    if reason:
        lines = [f"CPU kernel      none: {reason}"]
    else:
        lines = [f"CPU kernel      {_from_home(library())}, built by {' '.join(compiler())}"]
    for name, cls in OPTIMIZERS.items():
        has_kernel = type(getattr(cls, "inner", None)) in KINDS and not reason
        lines.append(f"{name:<24} {'fused' if has_kernel else 'eager'} on a CPU, foreach on accelerators")
    if not reason:
        lines.append(
            "On a CPU these run on eager: 16-bit and float64 weights, learned gains and means (gains='learned', "
            "centering='learned'),\nweights that are not contiguous, neurons split over ranks, and rotational(...) of "
            "other optimizers."
        )
    return "\n".join(lines)


def _from_home(path: Path) -> str:
    """A path as the user would write it, without naming them."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
