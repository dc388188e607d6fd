"""State dicts and checkpoints of standardized models."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from hf_rotational import standardize
from hf_rotational.standardize import MODES, load_raw_state_dict, raw_state_dict, raw_state_dicts
from tests.helpers import copies, exactly_equal, noise
from tests.standardized import MODELS, difference, logits, make, train


def trained(name: str, mode: str = "function_preserving", **options: bool) -> nn.Module:
    """A standardized model whose weights no longer say what they are computed from."""
    model = standardize(make(name), mode, **options)  # type: ignore[call-overload]
    train(model)
    return model


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_save_pretrained_writes_is_plain(name: str, embeddings: bool, tmp_path: Path) -> None:
    plain, model = make(name), trained(name, embeddings=embeddings)
    plain.save_pretrained(tmp_path / "plain", max_shard_size="10KB")
    model.save_pretrained(tmp_path / "trained", max_shard_size="10KB")
    files = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("plain", "trained")]
    assert files[0] == files[1]
    assert len(files[0]) > 4
    loaded, report = type(plain).from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    exactly_equal(dict(loaded.state_dict()), dict(model.state_dict()))
    exactly_equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_state_dicts_have_the_plain_names_in_their_order_and_the_weights(name: str) -> None:
    model = trained(name, embeddings=True)
    state = model.state_dict()
    assert [(key, value.shape) for key, value in state.items()] == [
        (key, value.shape) for key, value in make(name).state_dict().items()
    ]
    assert {type(value) for value in state.values()} == {Tensor}
    assert not any(value.requires_grad for value in state.values())
    plain = make(name)
    plain.load_state_dict(state)
    exactly_equal(logits(plain), logits(model))
    if name == "gpt2":
        assert state["lm_head.weight"] is state["transformer.wte.weight"]
    inner = model.base_model.state_dict()
    exactly_equal(
        {f"{model.base_model_prefix}.{key}": value for key, value in inner.items()},
        {key: value for key, value in state.items() if key.startswith(model.base_model_prefix)},
    )


def test_a_state_dict_knows_nothing_of_the_last_one() -> None:
    model = trained("gpt2", embeddings=True)
    first = model.state_dict()
    kept = first["lm_head.weight"].clone()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)  # leaves no trace in the tensor's version
    second = model.state_dict()
    exactly_equal(first["lm_head.weight"], kept)
    assert difference(kept, second["lm_head.weight"]) > 0.5


def test_keep_vars_keeps_the_graph() -> None:
    model = standardize(nn.Linear(5, 4))
    model.state_dict(keep_vars=True)["weight"].sum().backward()
    assert model.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_loading_plain_weights_takes_them_apart_anew(mode: str, assign: bool) -> None:
    source = trained("gpt2", mode, embeddings=True)
    target = standardize(make("gpt2"), mode, embeddings=True)
    keys = target.load_state_dict(source.state_dict(), assign=assign)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert difference(logits(source), logits(target)) < 1e-5
    again = copies(raw_state_dict(target).values())
    target.load_state_dict(target.state_dict())
    for one, other in zip(copies(raw_state_dict(target).values()), again, strict=True):
        torch.testing.assert_close(one, other)
    train(target)


def test_loading_weights_of_another_shape_is_an_error() -> None:
    model = standardize(nn.Linear(5, 4))
    raw = copies(raw_state_dict(model).values())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        model.load_state_dict({"weight": noise(4, 6), "bias": noise(4)})
    with pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.weight\.original"):
        model.load_state_dict({"bias": noise(4)})
    exactly_equal(copies(raw_state_dict(model).values()), raw)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_raw_tensors_bring_back_every_bit(name: str, mode: str) -> None:
    model = trained(name, mode, embeddings=True)
    raw = {key: value.clone() for key, value in raw_state_dict(model).items()}
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    assert {key.rpartition(".")[2] for key in raw} <= {"original", "gain_norm", "mean_bias"}
    assert raw.keys() <= dict(model.named_parameters()).keys()
    resumed = standardize(make(name), mode, embeddings=True)
    resumed.load_state_dict(plain)
    assert any(not torch.equal(value, raw[key]) for key, value in raw_state_dict(resumed).items())
    load_raw_state_dict(resumed, raw)
    exactly_equal(raw_state_dict(resumed), raw)
    exactly_equal(dict(resumed.state_dict()), plain)
    exactly_equal(train(resumed, 3), train(model, 3))


def test_inside_raw_state_dicts_they_hold_the_parameters() -> None:
    model = trained("bert")
    with raw_state_dicts():
        state = {key: value.clone() for key, value in model.state_dict().items()}
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    exactly_equal({key: value for key, value in state.items() if key in named}, named)
    other = standardize(make("bert"))
    other.load_state_dict(state)
    exactly_equal(logits(other), logits(model))


def test_raw_tensors_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    model = standardize(make("gpt2"))
    raw = raw_state_dict(model)
    assert raw_state_dict(make("gpt2")) == {}
    kept = copies(raw.values())
    name = next(name for name in raw if name.endswith("gain_norm"))
    other = raw_state_dict(standardize(make("gpt2"), "gain"))
    with pytest.raises(
        ValueError, match=r"Invalid state: it lacks .*mean_bias.* and 5 more \(must be the raw_state_dict"
    ):
        load_raw_state_dict(model, other)
    with pytest.raises(ValueError, match="Invalid state: it has unknown extra"):
        load_raw_state_dict(model, {**raw, "extra": noise(3)})
    with pytest.raises(ValueError, match=rf"Invalid state: {name} of shape \(3,\) \(must be \(48,\)\)"):
        load_raw_state_dict(model, {**{key: value + 1 for key, value in raw.items()}, name: noise(3)})
    exactly_equal(copies(raw_state_dict(model).values()), kept)


def test_what_others_put_on_top_stays_in_the_state_dict() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, weight: Tensor) -> Tensor:
            return self.factor * weight

    model = standardize(nn.Linear(5, 4))
    register_parametrization(model, "weight", Scaled())
    state = copy.deepcopy(model.state_dict())
    assert "parametrizations.weight.1.factor" in state
    before = model.weight.detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    exactly_equal(model.weight.detach(), before)
