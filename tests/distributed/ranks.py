"""Runs a test file as several processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]


def launch(file: str, ranks: int, *arguments: str) -> str:
    """Runs ``file`` as a script on so many ranks, with arguments; returns what they print."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), file]
    result = subprocess.run(
        [*program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def leave() -> NoReturn:
    """Ends a rank at once, its part done.

    DTensors and FSDP2 keep gloo's threads alive past ``destroy_process_group()``. One that lets go of a tensor while
    the interpreter is taken down aborts the process ("terminate called without an active exception"), now and then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
