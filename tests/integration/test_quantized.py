"""Adapters of models that bitsandbytes has quantized train; what is quantized stays as it is.

Runs where it is installed: ``pip install bitsandbytes``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from hf_rotational import RotationalAdamW, RotationalTrainer, RotationalTrainingArguments
from tests.helpers import exactly_equal

pytest.importorskip("bitsandbytes")

QUANTIZED: dict[str, dict[str, Any]] = {
    "4 bits": {"load_in_4bit": True},
    "4 bits, stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},  # for FSDP
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(params=QUANTIZED.values(), ids=QUANTIZED)
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    set_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=40
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**request.param), dtype=torch.float32, device_map="cpu"
    )
    return model


def trainer(model: Any, folder: Path) -> RotationalTrainer:
    rows = [[(7 * row + column**2) % 40 for column in range(6)] for row in range(32)]
    args = RotationalTrainingArguments(
        output_dir=str(folder), learning_rate=1e-2, max_steps=3, save_strategy="no", use_cpu=True, report_to="none"
    )
    return RotationalTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows})
    )


def test_adapters_train_and_the_quantized_model_does_not(quantized: PreTrainedModel, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(quantized), lora)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = trainer(model, tmp_path)
    trained.train()
    optimizer = trained.optimizer.optimizer
    assert isinstance(optimizer, RotationalAdamW)
    rotating = {id(parameter) for parameter, _ in optimizer.rotating()}
    for name, parameter in model.named_parameters():
        assert ("lora_A" in name) == (id(parameter) in rotating)  # B is zero at the start
        if "lora" in name:
            assert not torch.equal(parameter, before[name])
        else:
            exactly_equal(parameter.detach(), before[name])


def test_a_quantized_model_without_adapters_is_refused(quantized: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"purely quantized models\. Please attach trainable adapters"):
        trainer(quantized, tmp_path)
