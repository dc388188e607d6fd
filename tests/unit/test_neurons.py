"""The plan: what rotates, along which dims, and why not."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaForSequenceClassification,
    T5ForQuestionAnswering,
    Wav2Vec2ForCTC,
)
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
    assert linear.pop("classifier.weight") == linear.pop("bert.pooler.dense.weight") == (0,)
    assert dims(bert) == linear
    assert reasons(bert)["bert.pooler.dense.weight"] == "task head"
    assert dims(bert.bert)["pooler.dense.weight"] == (0,)
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
    assert [entry.name for entry in plan(model).rotating] == ["zero.weight"]
    assert reasons(model)["unknown.weight"] == "not a known weight matrix"
    assert reasons(model)["narrow.weight"] == "fan-in 2 is below 3"
    # Its values must not decide: a run that is resumed finds others there.
    assert reasons(model)["zero.weight"].startswith("weight matrix, zero now")


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


def test_what_has_no_shape_yet_is_listed_and_not_counted() -> None:
    printed = str(plan(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))))
    assert "not initialized yet" in printed
    assert printed.endswith("1 of 4 tensors rotate: 12 of 15 parameters (80.0%)")


@pytest.mark.parametrize(
    ("cls", "head", "body"),
    [
        (
            RobertaForSequenceClassification,
            ["classifier.dense.weight", "classifier.out_proj.weight"],
            "roberta.encoder",
        ),
        (DistilBertForSequenceClassification, ["pre_classifier.weight", "classifier.weight"], "distilbert."),
        (T5ForQuestionAnswering, ["qa_outputs.weight"], "encoder."),
        (Wav2Vec2ForCTC, ["lm_head.weight"], "wav2vec2."),
        (BertForMaskedLM, [], "cls.predictions.transform"),
        (LlamaForCausalLM, [], "lm_head"),
    ],
)
def test_a_task_head_is_what_a_task_adds_to_the_body(cls: type[PreTrainedModel], head: list[str], body: str) -> None:
    with torch.device("meta"):
        model = cls(cls.config_class())  # type: ignore[misc]
    planned = plan(model)
    assert [entry.name for entry in planned if entry.reason == "task head"] == head
    assert any(entry.name.startswith(body) for entry in planned.rotating)


def test_a_router_in_a_layer_is_no_task_head() -> None:
    layers = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"classifier": nn.Linear(4, 5)})])})
    assert dims(layers) == {"layers.0.classifier.weight": (0,)}
    assert not dims(nn.ModuleDict({"decoder": layers["layers"][0]}))


def test_multipliers_go_to_what_rotates_and_the_last_match_counts(bert: nn.Module) -> None:
    scaled = plan(bert, multipliers={"attention": 0.5, "query|intermediate": 2, "word_embeddings|value": 3.0})
    factors = {entry.name.split("bert.")[1]: entry.multiplier for entry in scaled if entry.multiplier != 1}
    layer = "encoder.layer.0.attention"
    assert factors == {
        f"{layer}.self.query.weight": 2,
        f"{layer}.self.key.weight": 0.5,
        f"{layer}.self.value.weight": 3,
        f"{layer}.output.dense.weight": 0.5,
        "encoder.layer.0.intermediate.dense.weight": 2,
    }
    groups = scaled.parameter_groups(rotating={"weight_decay": 0.1})
    assert {group.get("rotation_scale") for group in groups if group["rotational"]} == {None, 0.5, 2, 3}
    assert not any("rotation_scale" in group for group in groups if not group["rotational"])
    (row,) = [line for line in str(scaled).splitlines() if "key.weight" in line]
    assert row.endswith("yes: weight matrix, angle x 0.5")


@pytest.mark.parametrize("factor", [0, -1, float("inf"), float("nan")])
def test_multipliers_are_positive_numbers(bert: nn.Module, factor: float) -> None:
    with pytest.raises(ValueError, match=f"Invalid multiplier: 'query': {factor}"):
        plan(bert, multipliers={"query": factor})


def test_a_multiplier_of_nothing_is_refused(bert: nn.Module) -> None:
    with pytest.raises(ValueError, match="multipliers: 'word_embeddings' matches nothing that rotates"):
        plan(bert, multipliers={"word_embeddings": 2.0})
    with pytest.raises(ValueError, match="multipliers: 'decoder' matches no parameter"):
        plan(bert, multipliers={"decoder": 2.0})


def test_without_weights_zero_is_not_seen() -> None:
    with torch.device("meta"):
        assert plan(nn.Linear(5, 4)).rotating


class TestLora:
    @staticmethod
    def adapted(model: PreTrainedModel, **options: object) -> nn.Module:
        peft = pytest.importorskip("peft")
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
        return adapted

    def test_a_rotates_and_b_does_not_even_once_it_has_trained(self, bert: BertForSequenceClassification) -> None:
        model = self.adapted(copy.deepcopy(bert), target_modules=["query"], modules_to_save=["classifier"])
        adapter = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_{}.default.weight"
        for trained in (False, True):
            with torch.no_grad():
                model.get_parameter(adapter.format("B")).fill_(0.1 * trained)
            found = reasons(model)
            assert found[adapter.format("A")] == "weight matrix"
            assert found[adapter.format("B")] == "LoRA B"
            assert found["base_model.model.classifier.modules_to_save.default.weight"] == "task head"
            trains = {entry.name for entry in plan(model).rotating if entry.parameter.requires_grad}
            assert trains == {adapter.format("A")}

    def test_adapters_of_columns_have_rows(self, gpt2: nn.Module) -> None:
        model = self.adapted(copy.deepcopy(gpt2), target_modules=["c_fc"], fan_in_fan_out=True)  # type: ignore[arg-type]
        assert dims(model)["base_model.model.transformer.h.0.mlp.c_fc.lora_A.default.weight"] == (0,)

    def test_adapters_of_stacked_experts_do_not_rotate(self) -> None:
        config = MixtralConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
            vocab_size=30, num_local_experts=3,
        )  # fmt: skip
        model = self.adapted(
            MixtralForCausalLM(config), target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]
        )
        adapters = {name: reason for name, reason in reasons(model).items() if "lora_" in name}
        assert len(adapters) == 2
        assert set(adapters.values()) == {"adapter of stacked experts"}
