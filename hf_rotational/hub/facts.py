"""What a model card says of a run, from what the run left in its output directory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCardData
from transformers.modelcard import TASK_MAPPING
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hf_rotational.hub.arguments import published_arguments
from hf_rotational.hub.card import CardFacts
from hf_rotational.monitor.header import hub_id
from hf_rotational.monitor.records import FILE_NAME as RECORDS
from hf_rotational.monitor.report import summary
from hf_rotational.monitor.runs import MonitoredRun, log_history, read_run
from hf_rotational.optim.config import RotationalConfig
from hf_rotational.optim.factory import OPTIMIZERS

NO_METRICS = re.compile(r"runtime|\w+_per_second|\w+_time")
"""What evaluations log beside metrics."""
MOST_NAMES = 16
"""Names of parameters on a card."""


@dataclass(frozen=True)
class Known:
    """What a Trainer knows of its run that the directory may not say, or not yet."""

    history: Sequence[dict[str, Any]] | None = None
    """``state.log_history``."""
    header: Mapping[str, Any] | None = None
    """What a monitor would have written first."""
    angle: float | None = None
    """Target at the peak of the learning rate."""
    architecture: str | None = None
    """Class of the model."""
    best_step: int | None = None
    """Of the checkpoint that the run ends with; by default its last."""


def read_facts(
    run_dir: Path, repo_id: str, *, saved: Path, known: Known, draft: ModelCardData | None
) -> tuple[CardFacts, MonitoredRun]:
    """What there is to say of a run, and the run, to be drawn.

    Args:
        run_dir: its output directory, or a checkpoint in it.
        repo_id: where it will be published.
        saved: where the model is saved.
        known: what its Trainer knows.
        draft: metadata of a card that was generated for it; what they say of base model and data sets is taken over.
    """
    name = repo_id.rpartition("/")[2]
    history = known.history if known.history is not None else _history(run_dir)
    monitored = _monitored(run_dir, name, history)
    header = monitored.header or known.header or {}
    adapter = _json(saved / ADAPTER_CONFIG_NAME)
    architecture = next(iter(_json(saved / CONFIG_NAME).get("architectures") or ()), known.architecture)
    base_models = _ids(draft and draft.base_model, header.get("base_model"), adapter.get("base_model_name_or_path"))
    datasets = _ids(draft and draft.datasets, header.get("datasets"))
    metrics = _evaluation(history or (), _best_step(run_dir, saved) if known.history is None else known.best_step)
    measured = {quantity: value for quantity, value in summary(monitored).items() if quantity != "optimizer" and value}
    if "loss" in metrics and "evaluation loss at the end" in measured:
        measured["evaluation loss at the end"] = f"{metrics['loss']:.4g}"
    targets = [record["target"] for record in monitored.run.rotation if record["target"]]
    facts = CardFacts(
        name=name,
        summary=_summary(header, base_models, datasets, architecture),
        usage=_usage(repo_id, saved, architecture, adapter),
        training=_training(header, published_arguments(saved)) | measured,
        rotating=_rotating(header),
        angle=max(targets, default=known.angle),
        results=() if draft else [{"evaluation": key, "result": f"{value:.4g}"} for key, value in metrics.items()],
        eval_results=_eval_results(metrics, architecture, datasets, draft),
        base_model=base_models[0] if base_models else None,
        datasets=datasets,
        library="peft" if adapter else "transformers",
    )
    return facts, monitored


def _history(run_dir: Path) -> list[dict[str, Any]] | None:
    try:
        return log_history(run_dir)
    except (OSError, ValueError):
        return None


def _monitored(run_dir: Path, name: str, history: Sequence[dict[str, Any]] | None) -> MonitoredRun:
    """What was measured, which for a checkpoint lies beside it, and goes on after it."""
    if not re.fullmatch(r"checkpoint-\d+", run_dir.name) or (run_dir / RECORDS).is_file():
        return read_run(run_dir, name, history)
    monitored = read_run(run_dir.parent, name, history)
    last = max((entry["step"] for entry in history or ()), default=math.inf)
    rotation = [record for record in monitored.run.rotation if record["step"] <= last]
    return replace(
        monitored, run=replace(monitored.run, rotation=rotation, predictions=monitored.run.predictions[: len(rotation)])
    )


def _summary(
    header: Mapping[str, Any], base_models: Sequence[str], datasets: Sequence[str], architecture: str | None
) -> str:
    what = (
        " and ".join(f"[{name}](https://huggingface.co/{name})" for name in base_models) + ", fine-tuned"
        if base_models
        else f"A model of class `{architecture or header.get('model', 'PreTrainedModel')}`, trained"
    )
    on = " and ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
    with_what = f" with {header['optimizer']}" if "optimizer" in header else ""
    return f"{what}{on and f' on {on}'}{with_what}."


def _usage(repo_id: str, saved: Path, architecture: str | None, adapter: Mapping[str, Any]) -> str:
    """Three lines that load what is in the repository; two if it holds no tokenizer or processor."""
    library, cls, remote = "transformers", architecture or "AutoModel", ""
    if adapter:
        library, cls = "peft", _peft_class(adapter.get("task_type"))
    elif not hasattr(transformers, cls):  # the model brings its code
        classes = _json(saved / CONFIG_NAME).get("auto_map", {})
        cls = next((auto for auto, path in classes.items() if path.rpartition(".")[2] == cls), "AutoModel")
        remote = ", trust_remote_code=True"
    processor = "AutoProcessor" if any(saved.glob("*processor_config.json")) else "AutoTokenizer"
    if processor == "AutoTokenizer" and not (saved / "tokenizer_config.json").is_file():
        return f'from {library} import {cls}\nmodel = {cls}.from_pretrained("{repo_id}"{remote})'
    imports = f"from transformers import {processor}, {cls}"
    if library != "transformers":
        imports = f"from {library} import {cls}; from transformers import {processor}"
    variable = processor.removeprefix("Auto").lower()
    return (
        f'{imports}\n{variable} = {processor}.from_pretrained("{repo_id}"{remote})\n'
        f'model = {cls}.from_pretrained("{repo_id}"{remote})'
    )


def _peft_class(task_type: str | None) -> str:
    tasks = {
        "CAUSAL_LM": "ForCausalLM",
        "FEATURE_EXTRACTION": "ForFeatureExtraction",
        "QUESTION_ANS": "ForQuestionAnswering",
        "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
        "SEQ_CLS": "ForSequenceClassification",
        "TOKEN_CLS": "ForTokenClassification",
    }
    return f"AutoPeftModel{tasks.get(task_type or '', '')}"


def _training(header: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """The settings that decide a run; those that are seldom touched only where they were."""
    settings = header.get("settings", {})
    rows: dict[str, Any] = {"optimizer": header.get("optimizer")}
    optim = header.get("optim") or arguments.get("optim")
    # Others' arguments, of Trainers that a mixin makes rotational, name what is not used.
    if optim and (optim in OPTIMIZERS or not settings.get("rotational")):
        rows["optim"] = f"`{optim}`"
    if "rotation" in settings:
        rows["target angle"] = _angle(settings["rotation"])
    peak = settings.get("lr", arguments.get("learning_rate"))
    if peak is not None:
        schedule = f", {arguments['lr_scheduler_type']} schedule" if "lr_scheduler_type" in arguments else ""
        warmup = header.get("warmup_steps", arguments.get("warmup_steps"))
        rows["learning rate"] = f"{peak:g}{schedule}, {f'{warmup:g} warmup steps' if warmup else 'no warmup'}"
    decay, own = settings.get("weight_decay"), arguments.get("weight_decay")
    apart = settings.get("rotation") == "equilibrium" and own is not None and own != decay
    rows["weight decay"] = f"{own:g} (the angle is that of {decay:g})" if apart else decay
    for name in ("betas", "momentum"):
        rows[name] = settings.get(name)
    defaults = vars(replace(RotationalConfig(), rounding="nearest"))
    for name, default in defaults.items():
        if name not in ("rotation", "backend") and settings.get(name, default) != default:
            rows[name.replace("_", " ")] = settings[name]
    if arguments.get("weight_standardization", "none") != "none":
        rows["weight standardization"] = arguments["weight_standardization"]
    rows["steps"] = header.get("max_steps")
    if "per_device_train_batch_size" in arguments:
        accumulated = arguments.get("gradient_accumulation_steps", 1)
        rows["batch size per device"] = f"{arguments['per_device_train_batch_size']}" + (
            f" × {accumulated} steps" if accumulated > 1 else ""
        )
    rows["seed"] = arguments.get("seed")
    return {name: _text(value) for name, value in rows.items() if value is not None}


def _angle(rotation: str | float) -> str:
    meanings = {
        "equilibrium": "`equilibrium`, of learning rate and weight decay",
        "match": "`match`, the steady angle of the free-running optimizer",
    }
    return meanings.get(str(rotation)) or f"{rotation:g} rad per step"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _rotating(header: Mapping[str, Any]) -> str | None:
    """How many parameters rotated, and which; ``None`` if the optimizer did not rotate them."""
    if not header.get("settings", {}).get("rotational"):
        return None
    patterns = dict.fromkeys(_pattern(name) for name in header["parameters"])
    more = f" and {len(patterns) - MOST_NAMES} more kinds" if len(patterns) > MOST_NAMES else ""
    names = ", ".join(f"`{pattern}`" for pattern in [*patterns][:MOST_NAMES])
    share = header.get("summary") or f"{len(header['parameters'])} tensors rotate"
    return f"{share}. These are {names}{more}"


def _pattern(name: str) -> str:
    """The name of a parameter with stars for its numbers, under which a stack's layers are alike."""
    name = re.sub(r"(^|\.)parametrizations\.([^.]+)\.\w+$", r"\1\2", name)  # of a standardized module
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _best_step(run_dir: Path, saved: Path) -> int | None:
    """Step of the checkpoint that a finished run was left with, if that was to be its best."""
    best = _json(run_dir / TRAINER_STATE_NAME).get("best_global_step")
    return best if published_arguments(saved).get("load_best_model_at_end") else None


def _evaluation(history: Sequence[Mapping[str, Any]], best_step: int | None) -> dict[str, float]:
    """Metrics of the model at the end, without their prefix: of the last evaluation or, if the best checkpoint was
    loaded after that, of its own."""
    ended = max((place for place, entry in enumerate(history) if "train_runtime" in entry), default=None)
    found = [(place, entry.get("step"), _metrics(entry)) for place, entry in enumerate(history)]
    evaluations = [each for each in found if each[2]]
    if not evaluations:
        return {}
    place, _, metrics = evaluations[-1]
    if best_step is not None and ended is not None and place < ended:
        metrics = next((own for _, step, own in evaluations if step == best_step), metrics)
    return {name: value for name, value in metrics.items() if not NO_METRICS.fullmatch(name)}


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in entry.items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _eval_results(
    metrics: Mapping[str, float], architecture: str | None, datasets: Sequence[str], draft: ModelCardData | None
) -> list[EvalResult]:
    """Metrics as the Hub lists them: of the task and the data set that a draft names, or of what is known."""
    task = next((task for task, classes in TASK_MAPPING.items() if architecture in _names(classes)), "other")
    kind, title = (datasets[0], datasets[0]) if datasets else ("unknown", "evaluation set")
    drafted = draft and draft.eval_results
    pattern = drafted[0] if drafted else EvalResult(task, kind, title, metric_type="", metric_value=None)
    return [
        replace(pattern, metric_type=name, metric_name=name.replace("_", " "), metric_value=round(value, 4))
        for name, value in metrics.items()
    ]


def _names(classes: Any) -> set[str]:
    """Names of classes in one of Transformers' tables, whose values are a name or several."""
    return {name for value in classes.values() for name in ([value] if isinstance(value, str) else value)}


def _ids(*candidates: Any) -> list[str]:
    """The Hub ids among the first candidate that has some; each is one name, or several."""
    for candidate in candidates:
        names = [candidate] if isinstance(candidate, str) else candidate or []
        if found := [name for name in names if hub_id(name)]:
            return found
    return []


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
