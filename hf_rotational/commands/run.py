"""``hf-rotational run``: runs a Trainer script, unmodified, with the rotational optimizers among its arguments."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from typing import Any

DESCRIPTION = (
    "Runs a Hugging Face Trainer script, unmodified, with the rotational optimizers among the values of --optim and "
    "their settings among its arguments. The same as python -m trainer_patches SCRIPT ARGS..."
)


def register(commands: Any) -> None:
    """Adds the command to ``commands``, which ``ArgumentParser.add_subparsers`` returned."""
    parser: ArgumentParser = commands.add_parser(
        "run", help="run a Trainer script with --optim rotational_adamw and its settings", description=DESCRIPTION
    )
    parser.add_argument("script", metavar="SCRIPT", help="the script")
    parser.add_argument(
        "arguments",
        metavar="ARGS",
        nargs=argparse.REMAINDER,
        help="its own arguments, such as --optim rotational_adamw; SCRIPT --help lists them",
    )
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    """Carries the command out."""
    from trainer_patches.runner import run_script

    run_script(arguments.script, arguments.arguments)
