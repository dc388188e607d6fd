"""The plan over transformers' own architectures: none crashes it, and every axis it names is proved numerically."""

import functools
import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_rotational import plan
from hf_rotational.layouts import BY_NAME
from tests.zoo.axis import changes_one_feature
from tests.zoo.coverage import Coverage, cover
from tests.zoo.small_models import architectures, build, quiet, time_limit

FAMILIES = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "BertForMaskedLM",
    "RobertaForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "XLNetLMHeadModel",
    "ConvBertModel",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "Wav2Vec2ForCTC",
    "HubertModel",
    "SpeechT5ForTextToSpeech",
    "ViTForImageClassification",
    "SwinModel",
    "ConvNextModel",
    "BitModel",
    "DPTForDepthEstimation",
    "DetrForObjectDetection",
    "CLIPModel",
    "SiglipModel",
    "LlavaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "Llama4ForCausalLM",
    "DbrxForCausalLM",
    "JetMoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM",
    "LongcatFlashForCausalLM",
    "InklingTextModel",
    "SwitchTransformersForConditionalGeneration",
    "CsmDepthDecoderForCausalLM",
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "FalconMambaForCausalLM",
    "JambaForCausalLM",
    "ZambaForCausalLM",
    "RecurrentGemmaForCausalLM",
    "RwkvForCausalLM",
)


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


@functools.cache
def covered(class_name: str) -> Coverage:
    return cover([class_name])


def check(coverage: Coverage) -> None:
    assert not coverage.wrong
    assert not coverage.unproved
    assert coverage.proved


@pytest.mark.parametrize("class_name", FAMILIES)
def test_every_axis_of_a_family_is_proved(class_name: str) -> None:
    coverage = covered(class_name)
    assert coverage.not_built == {}
    assert coverage.built == {class_name: "cpu"}
    check(coverage)


def test_no_row_of_the_table_goes_unproved() -> None:
    proved = {(cls, name) for family in FAMILIES for cls, name, _, _ in covered(family).proved}
    for pattern, names, dims in BY_NAME:
        matched = [name for cls, name in proved if re.fullmatch(pattern, cls) and re.fullmatch(names, name)]
        assert isinstance(dims, str) or matched, f"{pattern}.{names}"


@pytest.mark.slow
def test_every_axis_of_every_architecture_is_proved() -> None:
    """One class of each model type; `python -m benchmarks.zoo_coverage` goes through all of them."""
    coverage = cover(architectures(bare=True))
    check(coverage)
    assert len(coverage.built) > 15 * len(coverage.not_built)


HEADS = (
    "BertForSequenceClassification",
    "DPTForSemanticSegmentation",
    "HGNetV2ForImageClassification",
    "LwDetrForObjectDetection",
    "PerceiverForImageClassificationLearned",
    "RTDetrForObjectDetection",
    "SegformerForSemanticSegmentation",
)
LABELLED = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|CTC|XVector|Segmentation|Detection)")


def rotating_label_weights(class_name: str) -> list[str] | None:
    """Weights that grow with the number of labels, and rotate; ``None`` if the model cannot be built."""
    try:
        with time_limit(60.0):
            few, many = (plan(build(class_name, labels)) for labels in (13, 17))
    except Exception:
        return None
    shapes = {entry.name: entry.parameter.shape for entry in few}
    return [entry.name for entry in many if entry.rotates and shapes[entry.name] != entry.parameter.shape]


@pytest.mark.parametrize("class_name", HEADS)
def test_what_grows_with_the_number_of_labels_does_not_rotate(class_name: str) -> None:
    assert rotating_label_weights(class_name) == []


@pytest.mark.slow
def test_nor_does_it_in_any_architecture() -> None:
    quiet()
    found = {name: rotating_label_weights(name) for name in architectures() if LABELLED.search(name)}
    assert {name: weights for name, weights in found.items() if weights} == {}
    assert len(found) > 15 * sum(weights is None for weights in found.values())


class Timm(nn.Module):
    """As timm's models are: their classifier has one of many names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

    def get_classifier(self) -> nn.Module:
        return self.fc


def test_the_head_of_a_timm_model_is_what_timm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
    from transformers.models.timm_wrapper import modeling_timm_wrapper as wrapper

    monkeypatch.setattr(wrapper, "_create_timm_model_with_error_handling", lambda *_, **__: Timm())
    monkeypatch.setattr(wrapper, "requires_backends", lambda *_: None)
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet18", num_labels=5))
    reasons = {entry.name: entry.reason for entry in plan(model)}
    assert (reasons["timm_model.stem.weight"], reasons["timm_model.fc.weight"]) == ("weight matrix", "task head")


def test_what_is_left_out_of_known_families() -> None:
    reasons = {entry.name: entry.reason for entry in plan(build("DbrxForCausalLM"))}
    assert reasons["transformer.blocks.0.ffn.experts.mlp.w2"].startswith("experts stacked along their inputs")
    reasons = {entry.name: entry.reason for entry in plan(build("MambaForCausalLM"))}
    assert reasons["backbone.layers.0.mixer.A_log"] == "not a known weight matrix"
    reasons = {entry.name: entry.reason for entry in plan(build("Wav2Vec2ForCTC"))}
    assert reasons["lm_head.weight"] == "task head"
    convolution = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    assert reasons[convolution] == "parametrized by the model"
    assert {entry.reason for entry in plan(build("SwitchTransformersModel"))} >= {"embedding"}


class Attention(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)


@pytest.mark.parametrize(
    ("model", "name", "right"),
    [
        (nn.Sequential(nn.Linear(5, 7)), "0.weight", (0,)),
        (nn.Sequential(nn.Linear(6, 6)), "0.weight", (0,)),
        (nn.Sequential(Conv1D(7, 5)), "0.weight", (1,)),
        (nn.Sequential(nn.Conv1d(4, 6, 3)), "0.weight", (0,)),
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), "0.weight", (0,)),
        (nn.Sequential(nn.Conv3d(4, 4, 2, groups=2)), "0.weight", (0,)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), "0.weight", (1,)),
        (Attention(), "attention.in_proj_weight", (0,)),
        (Attention(kdim=5, vdim=6), "attention.k_proj_weight", (0,)),
    ],
    ids=["linear", "square", "conv1d-of-gpt2", "conv1d", "grouped", "conv3d", "transposed", "attention", "keys"],
)
def test_the_proof_accepts_the_right_dims_and_no_others(model: nn.Module, name: str, right: tuple[int, ...]) -> None:
    owner, _, leaf = name.rpartition(".")
    (entry,) = (entry for entry in plan(model) if entry.name == name)
    assert entry.neuron_dims == right
    before = entry.parameter.clone()
    ndim = entry.parameter.ndim
    dims = [tuple(d for d in range(ndim) if mask >> d & 1) for mask in range(1, 2**ndim)]
    accepted = [choice for choice in dims if changes_one_feature(model, owner, leaf, choice) is None]
    assert accepted == [right]
    assert torch.equal(entry.parameter, before)


@pytest.mark.parametrize(
    ("class_name", "name", "right"),
    [
        ("MixtralModel", "layers.0.mlp.experts.gate_up_proj", (0, 1)),
        ("MixtralModel", "layers.0.mlp.experts.down_proj", (0, 1)),
        ("GptOssModel", "layers.0.mlp.experts.gate_up_proj", (0, 2)),
        ("GptOssModel", "layers.0.mlp.experts.down_proj", (0, 2)),
        ("XLNetModel", "layer.0.rel_attn.q", (1, 2)),
        ("XLNetModel", "layer.0.rel_attn.o", (0,)),
    ],
)
def test_so_does_the_proof_for_stacked_weights(class_name: str, name: str, right: tuple[int, ...]) -> None:
    model = build(class_name)
    owner, _, leaf = name.rpartition(".")
    dims = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    assert [choice for choice in dims if changes_one_feature(model, owner, leaf, choice) is None] == [right]
