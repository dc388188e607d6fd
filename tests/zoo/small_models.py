"""Small models of every architecture of the installed transformers, built from their default configs made small.

All widths of a config are divided by one factor, which keeps whatever relations hold between them, and everything that
is counted (layers, experts, tokens) is capped. Where a model refuses, a smaller factor is tried.
"""

from __future__ import annotations

import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.models.auto import modeling_auto
from transformers.utils import logging

MAX_PARAMETERS = 60_000_000
MAX_SECONDS = 20.0
FACTORS = (32, 16, 8, 4, 2, 1)
"""What widths are divided by; the first that builds a model of at most ``MAX_PARAMETERS`` is taken."""

MAX_LAYERS, MAX_EXPERTS, MAX_TOKENS = 4, 4, 128

WIDTH = re.compile(
    r"size|dim|width|channels|d_model|d_ff|d_kv|d_inner|d_head|ffn|rank|n_embd|n_inner|hidden|features|embed|filters"
)
NOT_A_WIDTH = re.compile(
    r"vocab|patch|image|kernel|window|stride|position|token|num_|_num|n_layer|layers|image_size|sample_size|batch|"
    r"chunk|queue|spatial|temporal|_idx|_id$|_ids$|index|groups|scale|max_|grid|context_size|conv_dim_kernel|conv_size|"
    r"state_size|pool|crop|memory_size|block_size|block_dim|tile_size|merge|dropout|mlp_ratio"
)
LAYERS = re.compile(r"layers$|n_layer$|num_blocks$|^depth$|_depth$")
EXPERTS = re.compile(r"experts$|expert_num$")
CAPPED = {
    "mm_tokens_per_image": 4,
    "vocab": MAX_TOKENS,
    "max_position_embeddings": MAX_TOKENS,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
}

SETTINGS: dict[str, dict[str, Any] | Callable[[], dict[str, Any]]] = {
    **{name: {"prediction_length": 8} for name in ("autoformer", "informer", "time_series_transformer")},
    **{name: {"head_dim": 128} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    **{
        name: lambda: {"backbone_config": ResNetConfig(out_indices=[1, 2, 3, 4])}
        for name in ("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer")
    },
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "convbert": {"num_groups": 2},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0}},
    "dots1": {"n_routed_experts": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
}
"""What a default config lacks, or has in a way that needs a library that may be absent."""


CONFIG_CLASSES = {"CsmDepthDecoderForCausalLM": "CsmDepthDecoderConfig"}
"""Where ``config_class`` is not the config a model takes: in transformers 5.20 this one names its parent's."""


def architectures(*, bare: bool = False) -> list[str]:
    """Names of the model classes in transformers' auto mappings; with ``bare``, one for each model type."""
    found: dict[str, list[str]] = {}
    mappings = sorted(name for name in vars(modeling_auto) if re.fullmatch("MODEL_.*MAPPING_NAMES", name))
    for mapping in sorted(mappings, key=lambda name: name != "MODEL_MAPPING_NAMES"):
        for model_type, classes in getattr(modeling_auto, mapping).items():
            found.setdefault(model_type, []).extend([classes] if isinstance(classes, str) else classes)
    return list(dict.fromkeys(name for names in found.values() for name in (names[:1] if bare else names)))


def small_config(config_class: type[PreTrainedConfig], factor: int) -> PreTrainedConfig:
    """A default config, widths divided by ``factor`` and counts capped."""
    settings = SETTINGS.get(config_class.model_type, {})
    config = config_class(**(settings() if callable(settings) else settings))
    _shrink(config, factor)
    return config


def build(class_name: str, labels: int | None = None) -> PreTrainedModel:
    """Builds a small model on the CPU, or on the meta device if it stays too big.

    Args:
        class_name: of transformers.
        labels: how many the model is to tell apart, instead of its config's default; then on the meta device.

    Raises:
        Exception: whatever the model raised for its mildest config, if none could be built.
    """
    cls = getattr(transformers, class_name)
    config_class = getattr(transformers, CONFIG_CLASSES.get(class_name, ""), cls.config_class)
    smallest: PreTrainedModel | None = None
    error: Exception | None = None
    for factor in FACTORS:
        try:
            config = small_config(config_class, factor)
            if labels is not None:
                config.num_labels = labels
            with torch.device("meta"):
                model: PreTrainedModel = cls(config)
            if labels is not None:
                return model
            if sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS:
                small: PreTrainedModel = cls(small_config(config_class, factor))
                return small
            smallest = smallest or model
        except ImportError:
            raise
        except Exception as e:
            error = e
    if smallest is None:
        assert error is not None
        raise error
    return smallest


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` in the body after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not built within {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _shrink(config: PreTrainedConfig, factor: int) -> None:
    values = vars(config)
    lengths = {value for name, value in values.items() if LAYERS.search(name) and isinstance(value, int)}
    for name, value in list(values.items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value, factor)
        elif isinstance(value, list | tuple) and len(value) in lengths and len(value) > MAX_LAYERS:
            values[name] = type(value)(_varied(value))
        elif isinstance(value, list | tuple):
            values[name] = type(value)(_number(name, v, factor) for v in value)
        else:
            values[name] = _number(name, value, factor)


def _varied(per_layer: Any) -> list[Any]:
    """Every kind of layer in turn."""
    kinds = {str(value): value for value in reversed(per_layer)}
    return list(islice(cycle(reversed(kinds.values())), MAX_LAYERS))


def _number(name: str, value: Any, factor: int) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    for key, cap in CAPPED.items():
        if key in name:
            return min(value, cap)
    if name.endswith(("token_id", "token_index", "_idx", "token_ids")):
        return value % MAX_TOKENS
    if EXPERTS.search(name):
        return min(value, MAX_EXPERTS)
    if LAYERS.search(name):
        return min(value, MAX_LAYERS)
    if name.startswith("depths") or name.endswith("depths"):
        return min(value, 2)
    if WIDTH.search(name) and not NOT_A_WIDTH.search(name) and value >= 2 * factor and value % factor == 0:
        return value // factor
    return value


def quiet() -> None:
    """Silences what transformers says of configs as odd as these."""
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
