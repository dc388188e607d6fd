"""The plan: what rotates, along which dims, and why not."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_rotational import plan


@pytest.fixture(scope="module")
def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=30)
    )


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def dims(model: nn.Module, **options: object) -> dict[str, tuple[int, ...]]:
    return {entry.name: entry.neuron_dims for entry in plan(model, **options).rotating}  # type: ignore[arg-type]


def reasons(model: nn.Module) -> dict[str, str]:
    return {entry.name: entry.reason for entry in plan(model)}


def test_every_parameter_is_listed_once(bert: nn.Module, gpt2: nn.Module) -> None:
    for model in (bert, gpt2):
        assert [entry.name for entry in plan(model)] == [name for name, _ in model.named_parameters()]


def test_bert_rotates_its_linear_layers_but_not_the_new_head(bert: nn.Module) -> None:
    linear = {f"{name}.weight": (0,) for name, module in bert.named_modules() if isinstance(module, nn.Linear)}
    assert linear.pop("classifier.weight") == (0,)
    assert dims(bert) == linear
    assert reasons(bert)["classifier.weight"] == "task head"
    assert reasons(bert)["bert.embeddings.word_embeddings.weight"] == "embedding"


def test_gpt2_neurons_are_columns_and_the_tied_head_stays(gpt2: nn.Module) -> None:
    conv = {f"{name}.weight": (1,) for name, module in gpt2.named_modules() if isinstance(module, Conv1D)}
    assert len(conv) == 4
    assert dims(gpt2) == conv
    assert reasons(gpt2)["transformer.wte.weight"] == "tied to an embedding"


@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(5, 4), (3, 5)), (Conv1D(4, 5), (3, 5))])
def test_a_neuron_is_one_output_feature(layer: nn.Module, shape: tuple[int, ...]) -> None:
    (entry,) = plan(layer).rotating
    inputs = torch.randn(shape)
    before = layer(inputs)
    with torch.no_grad():
        entry.parameter.select(entry.neuron_dims[0], 2).add_(1.0)
    changed = (layer(inputs) != before).any(dim=0)
    assert changed.tolist() == [False, False, True, False]


def test_safe_side() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5))

    model = nn.ModuleDict({"unknown": Unknown(), "narrow": nn.Linear(2, 4), "zero": nn.Linear(5, 4)})
    nn.init.zeros_(model["zero"].weight)
    assert not plan(model).rotating
    assert reasons(model)["unknown.weight"] == "not a known weight matrix"
    assert reasons(model)["narrow.weight"] == "fan-in 2 is below 3"
    assert reasons(model)["zero.weight"] == "zero at the start"


def test_overrides(bert: nn.Module, gpt2: nn.Module) -> None:
    assert "classifier.weight" in dims(bert, include=["^classifier"])
    assert not dims(bert, include=["^classifier"], exclude=["weight$"])
    assert dims(gpt2, embeddings=True)["transformer.wte.weight"] == (0,)
    assert "classifier.bias" not in dims(bert, include=["^classifier"])


def test_patterns_that_cannot_work_are_refused(bert: nn.Module) -> None:
    with pytest.raises(ValueError, match="exclude: 'decoder' matches no parameter of BertForSequenceClassification"):
        plan(bert, exclude=["decoder"])
    with pytest.raises(ValueError, match=r"include: '\(' is not a regular expression"):
        plan(bert, include=["("])
    with pytest.raises(ValueError, match="include='classifier' must be a sequence"):
        plan(bert, include="classifier")


def test_groups_hold_what_trains_once_and_keep_decays_apart(bert: BertForSequenceClassification) -> None:
    bert.bert.embeddings.requires_grad_(False)
    try:
        groups = plan(bert).parameter_groups(
            weight_decay=0.01, decays=lambda name: "bias" not in name, rotating={"weight_decay": 0.2}
        )
        grouped = [parameter for group in groups for parameter in group["params"]]
        assert len({id(parameter) for parameter in grouped}) == len(grouped)
        assert {id(p) for p in grouped} == {id(p) for p in bert.parameters() if p.requires_grad}
        assert {(group["rotational"], group["weight_decay"]) for group in groups} == {
            (True, 0.2),
            (False, 0.01),
            (False, 0.0),
        }
    finally:
        bert.requires_grad_(True)


def test_prints_as_a_table(gpt2: nn.Module) -> None:
    lines = str(plan(gpt2)).splitlines()
    assert lines[0].split() == ["parameter", "module", "shape", "neurons", "rotates"]
    (row,) = [line for line in lines if "c_fc.weight" in line]
    assert row.split(None, 4) == ["transformer.h.0.mlp.c_fc.weight", "Conv1D", "16x64", "1", "yes: weight matrix"]
    assert lines[-1].startswith("4 of 16 tensors rotate")
