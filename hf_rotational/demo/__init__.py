"""``hf-rotational demo``: rotational AdamW against AdamW on a small fine-tuning that needs no network, in minutes."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from typing import Any

from hf_rotational.demo.arguments import DemoArguments

DESCRIPTION = (
    "Fine-tunes a text classifier twice, by AdamW with warmup and by rotational AdamW without, compares the two and "
    "saves the second: a plain Transformers checkpoint with its model card, and a picture of both runs."
)


def register(commands: Any) -> None:
    """Adds the command to ``commands``, which ``ArgumentParser.add_subparsers`` returned."""
    parser = commands.add_parser(
        "demo",
        dataclass_types=DemoArguments,
        help="fine-tune a small model with AdamW and with rotational AdamW, and compare",
        description=DESCRIPTION,
    )
    parser.set_defaults(run=run)


def run(namespace: Namespace) -> None:
    """Carries the command out."""
    from hf_rotational.demo.command import run_demo

    run_demo(DemoArguments(**{field.name: getattr(namespace, field.name) for field in fields(DemoArguments)}))
