"""``hf-rotational report``: draws monitored runs, side by side, into one HTML file and PNGs."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from hf_rotational.errors import UserError

DESCRIPTION = (
    "Draws what RotationMonitor has recorded of one run or several: losses, the angle of every layer against its "
    "target and against AdamW's equilibrium, balance, norms, settings. One HTML file that needs no network, and PNGs."
)


def register(commands: Any) -> None:
    """Adds the command to ``commands``, which ``ArgumentParser.add_subparsers`` returned."""
    parser: ArgumentParser = commands.add_parser(
        "report", help="draw monitored runs into one HTML file", description=DESCRIPTION
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="output directory of a run")
    parser.add_argument("--output", metavar="DIR", help="folder for the report; by default the first RUN_DIR")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    """Carries the command out."""
    from hf_rotational.monitor.report import write_report
    from hf_rotational.monitor.runs import read_run, unique_names

    folders = [Path(folder) for folder in dict.fromkeys(arguments.run_dirs)]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"RUN_DIR {folder}: no such directory")
    runs = [read_run(folder, name) for folder, name in zip(folders, unique_names(folders), strict=True)]
    problems = [problem for monitored in runs for problem in monitored.problems]
    if all(monitored.is_empty for monitored in runs):
        raise UserError("; ".join(["there is nothing to draw", *problems]))
    for problem in problems:
        print(f"hf-rotational: warning: {problem}", file=sys.stderr)
    try:
        files = write_report(runs, Path(arguments.output or folders[0]))
    except ImportError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}") from None
    print(f"{files[0]} and {len(files) - 1} pictures (PNG) beside it")
