"""Tiny models of seven kinds with inputs for them, for tests of what standardizing does to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {**SIZES, "num_key_value_heads": 1, "vocab_size": 40}
EXPERTS = {**GROUPED, "num_local_experts": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES, **NO_DROPOUT, vocab_size=40))


def gpt2() -> PreTrainedModel:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=0, **dropout)
    return GPT2LMHeadModel(config)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True))


def t5() -> PreTrainedModel:
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        vocab_size=40,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def vit() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**SIZES, **NO_DROPOUT, image_size=16, patch_size=8, num_labels=3))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**EXPERTS))


def gpt_oss() -> PreTrainedModel:
    """Experts stored the other way round."""
    return GptOssForCausalLM(GptOssConfig(**EXPERTS, head_dim=8, num_experts_per_tok=2))


MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    build.__name__: build for build in (bert, gpt2, llama, t5, vit, mixtral, gpt_oss)
}


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of this name, the same one each time, with biases and norms that are not at 0 and 1."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) + 0.01)
    return model.to(dtype)


def batch(model: nn.Module) -> dict[str, Tensor]:
    """Inputs and labels."""
    tokens = torch.arange(24).reshape(2, 12) * 7 % 40
    if model.config.model_type == "vit":
        dtype = next(model.parameters()).dtype
        return {
            "pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16).to(dtype),
            "labels": tokens[0, :2] % 3,
        }
    return {"input_ids": tokens, "labels": tokens}


def logits(model: nn.Module) -> Tensor:
    """What the model says to the batch."""
    model.eval()
    with torch.no_grad():
        output: Tensor = model(**batch(model)).logits
    return output


def train(model: nn.Module, steps: int = 5, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """Takes steps on the batch, of AdamW if nothing else is given; returns their losses."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def difference(one: Tensor, other: Tensor) -> float:
    """Largest, relative to the largest entry of the first."""
    return float((one - other).abs().max() / one.abs().max())
