"""The model card of a model trained with a rotational optimizer: facts in, text of README.md out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TAG = "rotational-equilibrium"
PAPER = "https://arxiv.org/abs/2305.17212"


@dataclass(frozen=True)
class CardFacts:
    """All a card says. Nothing here may hold a path of the machine: cards are published."""

    name: str
    """Heading, and the model's name in the metadata."""
    summary: str
    """One or two sentences under the heading."""
    usage: str
    """Python that loads and calls the model."""
    training: Mapping[str, str]
    """What it was trained with: optimizer, learning rate and so on, printed in this order."""
    rotating: str
    """What rotated: ``plan(model).summary()``."""
    angle: float
    """Radians per step that every rotating neuron turned at the peak of the learning rate."""
    results: Sequence[Mapping[str, str]] = ()
    """Rows of the table of results; all with the same keys, which head the columns."""
    eval_results: Sequence[EvalResult] = ()
    """The same for the Hub's metadata."""
    plot: str | None = None
    """Picture of the run: a file name next to the card."""
    base_model: str | None = None
    """Hub id of the model it was trained from."""
    license: str | None = None
    """The base model's, as the Hub spells it."""
    pipeline_tag: str | None = None
    tags: Sequence[str] = field(default=())


def model_card(facts: CardFacts) -> ModelCard:
    """The card that says ``facts``; ``str()`` of it is the text for README.md. Touches neither network nor disk."""
    data = ModelCardData(
        base_model=facts.base_model,
        library_name="transformers",
        license=facts.license,
        pipeline_tag=facts.pipeline_tag,
        tags=[TAG, *facts.tags],
        metrics=sorted({result.metric_type for result in facts.eval_results}) or None,
        model_name=facts.name if facts.eval_results else None,
        eval_results=list(facts.eval_results) or None,
    )
    sections = [
        f"# {facts.name}",
        facts.summary,
        "## Use",
        f"An ordinary Transformers checkpoint; nothing else needs to be installed.\n\n```python\n{facts.usage}\n```",
        "## Training",
        f"In every step each rotating neuron (the weights of one output feature) turned by the same angle and kept "
        f"its norm: [rotational equilibrium]({PAPER}). At the peak of the learning rate the angle was "
        f"{facts.angle:.2e} rad. {facts.rotating}.",
        table([{"": key, "value": value} for key, value in facts.training.items()]),
    ]
    if facts.results:
        sections += ["## Results", table(facts.results)]
    if facts.plot:
        sections += [f"![Training loss, and rotation per step]({facts.plot})"]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a Markdown table, headed by the keys of the first."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
