"""What the demo leaves behind: the output directory with its record and model card, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import EvalResult
from rich.table import Table
from transformers import PreTrainedModel

from hf_rotational import plan
from hf_rotational.demo.arguments import DemoArguments
from hf_rotational.demo.experiment import Outcome
from hf_rotational.demo.model import MODEL_ID, MODEL_LICENSE
from hf_rotational.errors import UserError
from hf_rotational.hub.card import CardFacts, model_card

RECORD = "demo.json"  # what was asked for and what came of it; marks a folder as a demo's
PLOT = "training.png"


def claim_folder(arguments: DemoArguments) -> None:
    """Makes ``arguments.output_dir`` this run's, before anything is trained.

    Raises ``UserError`` if there is something in it that is not of an earlier demo: that shall not be overwritten. An
    earlier demo's is, finished or not.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UserError(
            f"--output_dir {folder}: holds files that are not of an earlier demo. Name a new or empty folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_record(arguments, ())


def write_record(arguments: DemoArguments, outcomes: tuple[Outcome, ...]) -> None:
    """Writes arguments and outcomes into the output directory."""
    runs = [
        {
            "name": outcome.run.name,
            "validation_loss": outcome.loss,
            "validation_accuracy": outcome.accuracy,
            "steps": outcome.steps,
            "seconds": outcome.seconds,
        }
        for outcome in outcomes
    ]
    text = json.dumps({"arguments": asdict(arguments), "runs": runs}, indent=2)
    Path(arguments.output_dir, RECORD).write_text(text + "\n", encoding="utf-8")


def result_rows(outcomes: tuple[Outcome, ...]) -> list[dict[str, str]]:
    """One row per outcome, for the printed table and for the card's."""
    return [
        {
            "optimizer": outcome.run.name,
            "loss": f"{outcome.loss:.3f}",
            "accuracy": f"{outcome.accuracy:.1%}",
            "steps": f"{outcome.steps:,}",
            "time": f"{outcome.seconds:.0f} s",
        }
        for outcome in outcomes
    ]


def result_table(outcomes: tuple[Outcome, ...]) -> Table:
    """The outcomes as a table for the terminal."""
    rows = result_rows(outcomes)
    table = Table(title="On the validation texts")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


def usage(folder: str, text: str) -> str:
    """Three lines of Python that load the classifier in ``folder`` with plain Transformers and label ``text``."""
    return "\n".join(
        (
            "from transformers import AutoModelForSequenceClassification as Model, AutoTokenizer as Tokenizer",
            f"tokenizer, model = Tokenizer.from_pretrained({folder!r}), Model.from_pretrained({folder!r})",
            f"print(model.config.id2label[int(model(**tokenizer({text!r}, return_tensors='pt')).logits.argmax())])",
        )
    )


def write_card(arguments: DemoArguments, model: PreTrainedModel, outcomes: tuple[Outcome, Outcome], text: str) -> None:
    """Writes the model card of the rotational outcome, the second, as README.md. ``text`` is an example to classify."""
    rotational = outcomes[1]
    folder = Path(arguments.output_dir)
    own_data = arguments.train_file is not None
    dataset = Path(arguments.train_file).name if arguments.train_file else "Docstrings of Python's standard library"
    base = MODEL_ID if arguments.model is None else arguments.model
    on_hub = not Path(base).exists()
    facts = CardFacts(
        name=folder.resolve().name,
        summary=(
            f"{base if on_hub else Path(base).name}, fine-tuned as a text classifier on "
            + (
                f"the rows of `{dataset}`."
                if own_data
                else "docstrings of Python's standard library: it names the package a docstring comes from."
            )
        ),
        usage=usage(folder.resolve().name, text),
        training={
            "optimizer": "rotational AdamW (`rotational_adamw`)",
            "learning rate": f"{arguments.learning_rate:g}, linear decay, no warmup",
            "steps": f"{rotational.steps:,}",
            "batch size": str(arguments.per_device_train_batch_size),
            "longest text": f"{arguments.max_length} tokens",
            "seed": str(arguments.seed),
        },
        rotating=plan(model).summary(),
        angle=max(record["target"] or 0.0 for record in rotational.run.rotation),
        results=result_rows(outcomes),
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type="text" if own_data else "docstrings",
                dataset_name=dataset,
                dataset_split="validation",
                metric_type="accuracy",
                metric_value=round(rotational.accuracy, 4),
            )
        ],
        plot=PLOT,
        base_model=base if on_hub else None,
        license=MODEL_LICENSE if arguments.model is None else None,
        pipeline_tag="text-classification",
    )
    (folder / "README.md").write_text(str(model_card(facts)), encoding="utf-8")
