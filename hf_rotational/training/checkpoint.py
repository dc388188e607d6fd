"""Checkpoints from which a run resumes exactly, or not at all.

A checkpoint's own weights are plain. The Trainer loads them by name and passes over names that are missing, so weights
stay as they were in models whose checkpoints name them differently, such as ViT and mixtures of experts
(https://github.com/huggingface/transformers/issues/48805). Here ``from_pretrained`` converts those, and a checkpoint
that does not fit the model, or is damaged, is refused before anything is changed.

A standardized model has tensors that its plain weights do not determine: they lie beside them, in a file of their own.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_rotational.standardize import is_standardized, load_raw_state_dict, raw_state_dict
from hf_rotational.standardize.parametrization import standardization_of

logger = logging.get_logger(f"transformers.{__name__}")

RAW_WEIGHTS_NAME = "_rotational_weights.safetensors"
"""Holds the tensors of a standardized model. The Trainer pushes no file of that first letter from ``output_dir``."""


def save_raw_weights(model: nn.Module, folder: Path, write: bool = True) -> None:
    """Puts the tensors of a standardized model beside its plain weights, whole or not at all.

    Beside those of any other model there is nothing to put, and what an earlier run left is removed.

    Args:
        model: the model; if it is sharded, every process has to call this.
        folder: the checkpoint.
        write: whether this process is one that writes.
    """
    path = folder / RAW_WEIGHTS_NAME
    state = {name: _whole(tensor).contiguous() for name, tensor in raw_state_dict(model).items()}
    if not write:
        return
    if not state:
        path.unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)  # the Trainer may leave it to others to write the weights
    unfinished = path.with_suffix(".unfinished")
    save_file(state, unfinished, metadata={"modes": _modes(model)})
    os.replace(unfinished, path)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads what the checkpoint in ``folder`` holds of the model: all of its weights or, if it raises, none.

    Raises:
        ValueError: for a file that is missing or damaged, or weights that are not this model's; names them.
    """
    check_raw_weights(model, folder)
    files = weight_files(folder)
    found, state = _shapes(files), model.state_dict()
    if isinstance(model, PreTrainedModel) and (found.keys() - state.keys() or not _saved_as_it_is(model, state)):
        converted = _converted(model, folder)
        _check_fit(model, folder, state, {name: tuple(tensor.shape) for name, tensor in converted.items()})
        model.load_state_dict(converted)
    else:
        _check_fit(model, folder, state, found)
        for file in files:
            model.load_state_dict(load_file(file), strict=False)
    load_raw_weights(model, folder)


def load_raw_weights(model: nn.Module, folder: Path) -> None:
    """Loads what :func:`save_raw_weights` wrote, after the plain weights; nothing if the model is not standardized."""
    if is_standardized(model):
        load_raw_state_dict(model, load_file(folder / RAW_WEIGHTS_NAME))


def check_raw_weights(model: nn.Module, folder: Path) -> None:
    """Raises ``ValueError`` unless a checkpoint was standardized as the model is."""
    path = folder / RAW_WEIGHTS_NAME
    if not is_standardized(model):
        if path.is_file():
            raise ValueError(
                f"Checkpoint {folder} has to be resumed with the weight_standardization it was trained with"
            )
        return
    if not path.is_file():
        raise ValueError(f"Checkpoint {folder} was trained without weight_standardization: it holds no {path.name}")
    _check_fit(model, folder, raw_state_dict(model), _shapes([path]))
    with safe_open(path, framework="pt") as file:
        modes = file.metadata()["modes"]
    if modes != _modes(model):
        raise ValueError(f"Checkpoint {folder} was trained with weight_standardization {modes}, not {_modes(model)}")


def last_complete_checkpoint(folder: Path) -> Path:
    """The latest checkpoint in a run's folder that :func:`check_resumable` has nothing against.

    A process that is killed while it saves leaves one that is not complete; a warning names those that are passed over.

    Raises:
        ValueError: if there is none.
    """
    found = {
        int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)
    }
    refused = []
    for _, path in sorted(found.items(), reverse=True):
        try:
            check_resumable(path)
        except ValueError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            logger.warning(f"Not resuming from the latest checkpoint: {reason}")
        return path
    reasons = "".join(f"\n  {reason}" for reason in refused)
    raise ValueError(f"No checkpoint to resume from in {folder} (start without resume_from_checkpoint){reasons}")


def check_resumable(folder: Path) -> None:
    """Raises ``ValueError`` unless a checkpoint has, undamaged, what the Trainer resumes from besides weights.

    It would itself begin with a new optimizer where there is none saved. ``trainer_state.json`` is what it writes last.
    """
    refusal = f"Cannot resume from {folder} (remove it to resume from an earlier checkpoint)"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{refusal}: {TRAINER_STATE_NAME} is missing or damaged: {error}") from None
    # Those of all processes, so that none goes on where another one cannot.
    states = sorted(path.name for path in folder.glob("rng_state*.pth"))
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, *states):
        path = folder / name
        if path.is_file():
            # torch.save writes a zip archive, whose table of contents comes last.
            if not zipfile.is_zipfile(path):
                raise ValueError(f"{refusal}: {name} is damaged")
        elif name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            raise ValueError(f"{refusal}: it holds no {name} (save_only_model saves none)")
    _shapes(sorted(folder.glob("*.safetensors")))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's plain weights; none if they are stored otherwise.

    Raises:
        ValueError: for an index of shards that cannot be read.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError) as error:
        raise ValueError(f"Damaged checkpoint {folder}: {index.name}: {error!r}") from None
    return [folder / shard for shard in sorted(shards)]


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in files. Only reads their headers, which tell if they are cut off."""
    shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"Damaged checkpoint {path.parent}: {path.name}: {error}") from None
    return shapes


def _modes(model: nn.Module) -> str:
    """The modes in which a model's weights are standardized."""
    found = {standardization.mode for module in model.modules() if (standardization := standardization_of(module))}
    return ", ".join(sorted(found))


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _tied(state: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
    """Each name of a state dict, with all names of the same tensor."""
    names = defaultdict(list)
    for name, tensor in state.items():
        # Empty tensors have no storage to share.
        names[tensor.data_ptr() or name, tensor.shape].append(name)
    return {name: frozenset(group) for group in names.values() for name in group}


def _check_fit(
    model: nn.Module, folder: Path, state: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ``ValueError`` unless what was found covers a state dict, once for tensors that are tied."""
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    _refuse_if(
        model,
        folder,
        missing=[
            name for name, names in _tied(state).items() if not names & found.keys() and not names.intersection(unsaved)
        ],
        unknown=found.keys() - state.keys(),
        misshapen=[name for name in state if found.get(name, state[name].shape) != state[name].shape],
    )


def _refuse_if(model: nn.Module, folder: Path, **differences: Collection[str]) -> None:
    """Raises ``ValueError`` if there are differences between a checkpoint and a model, with the first names of each."""
    reasons = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in differences.items()
        if names
    ]
    if reasons:
        raise ValueError(
            f"Checkpoint {folder} does not fit {type(model).__name__}: of its tensors are {', '.join(reasons)}"
        )


def _saved_as_it_is(model: PreTrainedModel, state: Mapping[str, Tensor]) -> bool:
    """Whether ``save_pretrained`` writes the model's tensors as they are, under their own names."""
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    saved = revert_weight_conversion(model, dict(tensors))
    return saved.keys() == tensors.keys() and all(saved[name] is tensor for name, tensor in tensors.items())


def _converted(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The model's state dict as ``from_pretrained`` reads it from a checkpoint."""
    # Wide enough for every parameter: what was saved in a narrower type comes back as it was.
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()})
    try:
        loaded: Any = type(model).from_pretrained(
            folder,
            config=copy.deepcopy(model.config),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever it trips over, a half-read model is of no use
        raise ValueError(f"Checkpoint {folder} does not fit {type(model).__name__}: {error}") from error
    source, info = loaded
    _refuse_if(
        model,
        folder,
        missing=info["missing_keys"],
        unknown=info["unexpected_keys"],
        misshapen=[name for name, *_ in info["mismatched_keys"]],
        broken=info["error_msgs"],
    )
    state: dict[str, Tensor] = source.state_dict()
    return state
