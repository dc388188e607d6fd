"""Standardized weights and peft: adapters of a standardized model, and standardized adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_rotational import fold, standardize
from hf_rotational.standardize import is_standardized, raw_state_dict
from tests.helpers import exactly_equal
from tests.standardized import difference, logits, make, train

peft = pytest.importorskip("peft")

TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "vit": {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
}
TOLERANCE = 1e-5  # relative, float32


def adapted(model: nn.Module, name: str) -> Any:
    """The model with adapters that do something from the start."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS[name]))


def merge_and_check(model: Any) -> Any:
    """Merges the adapters and returns the result."""
    outputs = logits(model)
    merged = model.merge_and_unload()
    assert difference(outputs, logits(merged)) < TOLERANCE
    return merged


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_of_a_standardized_model_train_and_merge_once_it_is_folded(name: str) -> None:
    model = adapted(standardize(make(name)), name)
    frozen = {name: tensor.clone() for name, tensor in raw_state_dict(model).items()}
    train(model)
    exactly_equal(raw_state_dict(model), frozen)  # peft trains adapters alone
    outputs = logits(model)
    for merge in (model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True), model.merge_adapter):
        with pytest.raises(RuntimeError, match=r"would be lost. Call hf_rotational\.fold\(model\) first"):
            merge()
    exactly_equal(logits(model), outputs)
    assert difference(outputs, logits(fold(model))) < TOLERANCE
    merge_and_check(model)


def test_peft_finds_no_standardized_parameters_to_adapt() -> None:
    model = standardize(make("mixtral"))
    with pytest.raises(ValueError, match="target_parameters"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]))


@pytest.mark.parametrize("name", TARGETS)
def test_standardized_adapters_train_save_and_merge(name: str, tmp_path: Path) -> None:
    model = adapted(make(name), name)
    outputs, names = logits(model), list(model.state_dict())
    standardize(model)
    trained = {key for key in raw_state_dict(model) if key.endswith("original")}
    assert trained
    assert all("lora_A" in key or "modules_to_save" in key for key in trained)
    assert difference(outputs, logits(model)) < TOLERANCE
    assert list(model.state_dict()) == names
    train(model)
    outputs = logits(model)
    model.save_pretrained(tmp_path)
    assert difference(outputs, logits(peft.PeftModel.from_pretrained(make(name), tmp_path))) < TOLERANCE
    merged = merge_and_check(copy.deepcopy(model))
    assert is_standardized(merged) == (name == "vit")  # its head, which is no adapter
    assert difference(outputs, logits(fold(merged))) < TOLERANCE
    model.merge_adapter()
    model.unmerge_adapter()
    assert difference(outputs, logits(fold(model))) < TOLERANCE
    assert list(model.state_dict()) == names
