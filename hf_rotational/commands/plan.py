"""``hf-rotational plan``: prints which parameters of a model rotate, along which dims, and why the others do not."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from hf_rotational.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = (
    "Prints every parameter of a model with the class of its module, its shape, the dims that index its neurons, and "
    "whether it rotates or why not. Builds the model from its config alone, without downloading or loading weights."
)


def register(commands: Any) -> None:
    """Adds the command to ``commands``, which ``ArgumentParser.add_subparsers`` returned."""
    parser: ArgumentParser = commands.add_parser(
        "plan", help="show which parameters of a model rotate, and why the others do not", description=DESCRIPTION
    )
    parser.add_argument("model", metavar="MODEL", help="a model on the Hub, or a folder with a config.json")
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="model class, such as BertForSequenceClassification; by default the one the config names",
    )
    for name, what in (("include", "rotate though the plan would leave them out"), ("exclude", "do not rotate")):
        parser.add_argument(
            f"--{name}",
            metavar="PATTERN",
            action="extend",
            nargs="+",
            default=[],
            help=f"regular expressions searched in parameter names: matches {what}",
        )
    parser.add_argument("--embeddings", action="store_true", help="rotate embeddings, and what is tied to them")
    parser.add_argument(
        "--multiplier",
        metavar="PATTERN=FACTOR",
        action="extend",
        nargs="+",
        default=[],
        help="scale the target angle of matches; the last that matches counts",
    )
    parser.add_argument("--weights", action="store_true", help="load the weights too, to see which are zero")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    """Carries the command out."""
    from hf_rotational.neurons import plan
    from hf_rotational.optim.config import parse_multipliers

    model = build_model(arguments.model, arguments.architecture, arguments.weights)
    try:
        rotation_plan = plan(
            model,
            include=arguments.include,
            exclude=arguments.exclude,
            embeddings=arguments.embeddings,
            multipliers=parse_multipliers(arguments.multiplier),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    print(f"{type(model).__name__} of {arguments.model}\n\n{rotation_plan}")
    if not arguments.weights:
        print("Without weights: neurons that are zero take the plain step (--weights loads them, and says where).")


def build_model(name: str, architecture: str | None, weights: bool) -> PreTrainedModel:
    """The model a name, a folder and ``--architecture`` mean: with its weights, or built from its config on "meta".

    Raises ``UserError`` where there is no such config, class or file of weights.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"no config of a model at {name!r}: {error}") from None
    class_name = architecture or next(iter(config.architectures or ()), None)
    cls = getattr(transformers, class_name, None) if class_name else transformers.AutoModel
    if not (isinstance(cls, type) and hasattr(cls, "from_pretrained")):
        raise UserError(f"{class_name!r} is no model class of transformers {transformers.__version__}")
    if weights:
        try:
            loaded: PreTrainedModel = cls.from_pretrained(name)
        except OSError as error:
            raise UserError(f"no weights at {name!r}: {error}") from None
        return loaded
    with torch.device("meta"):
        built: PreTrainedModel = cls.from_config(config) if cls is transformers.AutoModel else cls(config)
    return built
