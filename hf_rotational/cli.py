"""The command line: ``hf-rotational COMMAND --help`` says what each command takes."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from transformers import HfArgumentParser

from hf_rotational import __version__, demo
from hf_rotational.commands import env, plan, predict, push, report, run
from hf_rotational.errors import UserError

# Each adds one command to what `ArgumentParser.add_subparsers` returned, and sets `run` to what carries it out: a
# function of the parsed arguments. What a command needs is imported only when it runs, so that --help is quick.
COMMANDS = (demo.register, env.register, plan.register, predict.register, push.register, report.register, run.register)


def main(argv: Sequence[str] | None = None) -> None:
    """Carries out the command in ``argv``, by default the process's own. Exits with status 2 if it cannot be."""
    parser = ArgumentParser(prog="hf-rotational", description="Rotational optimizers for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=f"hf-rotational {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=HfArgumentParser)
    for register in COMMANDS:
        register(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        parser.exit(2, f"hf-rotational: error: {error}\n")
