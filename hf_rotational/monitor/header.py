"""The first line of ``rotation.jsonl``: what is run, with what, and where it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from torch import nn
from transformers import TrainerState, TrainingArguments

from hf_rotational.monitor.records import VERSION
from hf_rotational.neurons import rotating_share

if TYPE_CHECKING:
    from hf_rotational.monitor.callback import Measured

SOURCE = re.compile(r"hf://datasets/([^@]+)@")
"""How ``datasets`` writes where a data set's files are on the Hub."""


def run_header(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    measured: Sequence[Measured],
    every: int,
    dataset: Any = None,
) -> dict[str, Any]:
    """Plain values, ready for JSON. Nothing here may be a path of the machine: records are published."""
    group = measured_group(optimizer, measured) if optimizer else {}
    plain = (str, int, float, bool, type(None))
    settings = {name: value for name, value in group.items() if isinstance(value, plain)}
    if "initial_lr" in settings:  # the schedule may begin at 0
        settings["lr"] = settings.pop("initial_lr")
    parameters = list(model.parameters())
    return {
        "version": VERSION,
        "model": type(model).__name__,
        "base_model": hub_id(getattr(getattr(model, "config", None), "_name_or_path", None)),
        "datasets": dataset_ids(dataset),
        "optimizer": type(optimizer).__name__,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "settings": {**settings, "betas": list(group["betas"])} if "betas" in group else settings,
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "max_steps": state.max_steps,
        "every": every,
        "summary": rotating_share([entry.parameter for entry in measured], parameters),
        "parameters": {
            entry.name: {
                "shape": list(entry.parameter.shape),
                "neuron_dims": [dim for dim in range(entry.parameter.ndim) if dim not in entry.dims],
                "dtype": str(entry.parameter.dtype).removeprefix("torch."),
            }
            for entry in measured
        },
    }


def measured_group(optimizer: torch.optim.Optimizer, measured: Sequence[Measured]) -> dict[str, Any]:
    """The group of the first parameter that is measured: others' learning rate and weight decay say little."""
    for group in optimizer.param_groups:
        if measured and any(parameter is measured[0].parameter for parameter in group["params"]):
            return group
    return optimizer.param_groups[0]


def hub_id(name: Any) -> str | None:
    """The name if it can be a repository on the Hub, and is no path on this machine."""
    if not isinstance(name, str) or not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def dataset_ids(dataset: Any) -> list[str]:
    """Where on the Hub a ``datasets.Dataset`` comes from, as far as that can be told from it.

    It may list the files it was made of; else the folder that it is cached in is named after the repository.
    """
    from datasets import config

    files = getattr(getattr(dataset, "info", None), "download_checksums", None)
    sources: Mapping[str, Any] = files if isinstance(files, Mapping) else {}
    found = {match[1] for source in sources if (match := SOURCE.match(source))}
    cache = Path(config.HF_DATASETS_CACHE)
    for cached in getattr(dataset, "cache_files", None) or ():
        path = Path(cached["filename"])
        folder = path.relative_to(cache).parts[0] if cache in path.parents else ""
        if "___" in folder:
            found.add(folder.replace("___", "/", 1))
    return sorted(name for name in found if hub_id(name))
