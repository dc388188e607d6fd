"""README.md of an output directory: written for a run, or completed if there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils.import_utils import is_matplotlib_available

from hf_rotational.errors import UserError
from hf_rotational.hub.arguments import without_paths
from hf_rotational.hub.card import add_metadata, data_of, is_generated, model_card
from hf_rotational.hub.facts import Known, read_facts
from hf_rotational.hub.files import CARD, PLOT
from hf_rotational.monitor.header import hub_id
from hf_rotational.monitor.plots import COLORS, plot_runs


def is_own(run_dir: Path) -> bool:
    """Whether there is a card that somebody wrote.

    Raises:
        UserError: if there is one that cannot be read.
    """
    path = run_dir / CARD
    return path.exists() and not is_generated(_read(path))


def write_card(
    run_dir: Path, repo_id: str, *, saved: Path | None = None, known: Known | None = None, drafted: bool = False
) -> list[str]:
    """Writes card and picture of a run into its output directory.

    A card that was generated is completed. To one that somebody wrote, metadata that it does not have are added.

    Args:
        run_dir: the output directory.
        repo_id: where it will be published.
        saved: where the model is saved; by default in the output directory.
        known: what the run's Trainer knows.
        drafted: whether the card that is there has just been generated, though it may not say so.

    Returns:
        What could not be read of the run, a sentence each.

    Raises:
        UserError: if there is a card that cannot be read, or that is a link to somewhere else.
    """
    path = run_dir / CARD
    if not path.resolve().is_relative_to(run_dir.resolve()):
        raise UserError(f"{path} is a link to a file outside of {run_dir} (copy it there)")
    written = _read(path) if path.exists() else None
    draft = written if written and (drafted or is_generated(written)) else None
    if draft:
        _forget_folders(draft)
    facts, monitored = read_facts(
        run_dir, repo_id, saved=saved or run_dir, known=known or Known(), draft=data_of(draft) if draft else None
    )
    if is_matplotlib_available() and not monitored.is_empty:
        plot_runs([monitored.run], run_dir / PLOT, COLORS[1:])
        facts = replace(facts, plot=PLOT)
    if draft or not written:
        path.write_text(without_paths(str(model_card(facts, draft))), encoding="utf-8")
    elif add_metadata(data_of(written), facts, replace=False):
        written.save(path)
    return monitored.problems


def _read(path: Path) -> ModelCard:
    try:
        card: ModelCard = ModelCard.load(path)
    except Exception as error:  # of YAML, or of what it says
        raise UserError(f"{path} has metadata that cannot be read: {' '.join(str(error).split())}") from None
    return card


def _forget_folders(draft: ModelCard) -> None:
    """A draft takes for the name of a model on the Hub whatever was loaded, which may have been a folder."""
    data = data_of(draft)
    named = data.base_model
    folders = [name for name in ([named] if isinstance(named, str) else named or []) if not hub_id(name)]
    for folder in folders:
        draft.text = draft.text.replace(f"[{folder}](https://huggingface.co/{folder})", f"`{Path(folder).name}`")
    draft.text = draft.text.replace("[None](https://huggingface.co/None)", "a local model")
    if folders:
        data.base_model = None
