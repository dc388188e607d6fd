"""``hf-rotational push``: uploads a finished run to the Hub."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

DESCRIPTION = (
    "Uploads the model of a finished run, with its tokenizer, training arguments, records and a model card that says "
    "how it was trained. Writes the card, README.md, into RUN_DIR, or completes the metadata of one that you wrote."
)


def register(commands: Any) -> None:
    """Adds the command to ``commands``, which ``ArgumentParser.add_subparsers`` returned."""
    parser: ArgumentParser = commands.add_parser(
        "push", help="upload a finished run to the Hub, with a model card", description=DESCRIPTION
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output directory of a run, or a checkpoint in one")
    parser.add_argument(
        "repo_id", metavar="REPO_ID", help="owner/name; created if there is none; without an owner, of the token's"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--token", help="by default the one of `hf auth login`, or HF_TOKEN")
    parser.add_argument("--message", default="Upload a run", help="of the commit")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    """Carries the command out."""
    from hf_rotational.hub.push import push_run

    address, problems = push_run(
        Path(arguments.run_dir),
        arguments.repo_id,
        private=arguments.private,
        token=arguments.token,
        message=arguments.message,
    )
    for problem in problems:
        print(f"hf-rotational: warning: {problem}", file=sys.stderr)
    print(address)
