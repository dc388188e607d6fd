"""The demo from beginning to end: model and texts, both arms, the files and the last words."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

from rich.console import Console

from hf_rotational.demo.arguments import DemoArguments
from hf_rotational.demo.corpus import docstring_dataset
from hf_rotational.demo.experiment import ADAMW, ROTATIONAL, Outcome, train_arm
from hf_rotational.demo.files import file_dataset
from hf_rotational.demo.model import MODEL_ID, load_classifier, load_tokenizer, packaged_model, quiet
from hf_rotational.demo.output import PLOT, claim_folder, result_table, usage, write_card, write_record
from hf_rotational.errors import UserError
from hf_rotational.monitor.plots import plot_runs, require_matplotlib


def run_demo(arguments: DemoArguments) -> tuple[Outcome, Outcome]:
    """Trains both arms, saves the rotational one to ``arguments.output_dir``, prints how they compare and how to load
    it.

    Returns the outcomes of AdamW and of rotational AdamW. Raises ``UserError`` for arguments that cannot be used,
    before anything is trained or overwritten.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    source = packaged_model() if arguments.model is None else arguments.model
    tokenizer = load_tokenizer(source)
    if arguments.train_file is None:
        data = docstring_dataset()
    else:
        data = file_dataset(
            arguments.train_file, arguments.validation_file, arguments.text_column, arguments.label_column
        )
    names = data["train"].features["label"].names
    model = load_classifier(source, tokenizer, names, arguments.seed)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and arguments.max_length > longest:
        raise UserError(f"--max_length {arguments.max_length}: this model reads {longest} tokens at most.")
    require_matplotlib()
    claim_folder(arguments)
    origin = "docstrings of Python's standard library" if arguments.train_file is None else arguments.train_file
    console.print(f"Model: {MODEL_ID if arguments.model is None else arguments.model}")
    console.print(f"Texts: {origin}; {len(data['train']):,} to train on, {len(data['validation']):,} to validate")
    console.print(f"Labels: {len(names)} ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''})")

    tokenized = data.map(
        lambda texts: tokenizer(texts["text"], truncation=True, max_length=arguments.max_length),
        batched=True,
        remove_columns="text",
        desc="Tokenizing",
    )
    _, adamw = train_arm(ADAMW, arguments, model, tokenizer, tokenized)
    model = load_classifier(source, tokenizer, names, arguments.seed)  # as it was before the first arm
    trainer, rotational = train_arm(ROTATIONAL, arguments, model, tokenizer, tokenized)
    outcomes = (adamw, rotational)

    folder = Path(arguments.output_dir)
    example = shorten(data["validation"][0]["text"], 60, placeholder=" ...")
    with quiet():
        trainer.save_model()
    plot_runs([outcome.run for outcome in outcomes], folder / PLOT)
    write_card(arguments, model, outcomes, example)
    write_record(arguments, outcomes)
    console.print(result_table(outcomes))
    console.print(f"\nSaved in {folder}: the model of the second row, its card (README.md) and {PLOT}. To use it:")
    print(usage(folder.resolve().as_posix(), example))
    return outcomes
