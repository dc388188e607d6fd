"""The rotation plan of a standardized model."""

import pytest
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hf_rotational import RotationalAdamW, plan, standardize
from hf_rotational.standardize import MODES
from tests.standardized import MODELS, make, train


def plain(name: str) -> str:
    return name.removesuffix(".original").replace("parametrizations.", "")


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_weights_are_computed_from_rotates_as_they_did(name: str, embeddings: bool) -> None:
    before = {entry.name: entry for entry in plan(make(name))}
    after = {plain(entry.name): entry for entry in plan(standardize(make(name), embeddings=embeddings))}
    for parameter, entry in before.items():
        found = after.pop(parameter)
        assert (found.neuron_dims, found.reason) == (entry.neuron_dims, entry.reason)
        assert found.module_type == entry.module_type
    assert after
    assert {entry.reason for entry in after.values()} == {"1 dims"}
    assert {parameter.rpartition(".")[2] for parameter in after} == {"gain_norm", "mean_bias"}


def test_patterns_find_a_weight_by_the_name_it_had() -> None:
    model = standardize(make("gpt2"), embeddings=True)
    options = {"include": ["wte.weight$"], "exclude": ["^transformer.h.0.attn.c_attn.weight$"]}
    found = plan(model, **options, multipliers={"c_fc.weight$": 0.5})  # type: ignore[arg-type]
    rotating = {plain(entry.name): entry for entry in found.rotating}
    assert "transformer.wte.weight" in rotating
    assert "transformer.h.0.attn.c_attn.weight" not in rotating
    assert rotating["transformer.h.1.mlp.c_fc.weight"].multiplier == 0.5
    with pytest.raises(ValueError, match="exclude: 'original' matches no parameter"):
        plan(make("gpt2"), exclude=["original"])
    assert not plan(model, exclude=["original"]).rotating


def test_parametrizations_of_others_still_do_not_rotate() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Linear(4, 5))
    rotating = plan(standardize(model)).rotating
    assert [entry.name for entry in rotating] == ["1.parametrizations.weight.original"]


def test_heads_rotate_if_asked_for() -> None:
    model = nn.ModuleDict({"body": nn.Linear(5, 4), "classifier": nn.Linear(4, 5)})
    assert [entry.name for entry in plan(model).rotating] == ["body.weight"]
    assert [entry.name for entry in plan(model, heads=True).rotating] == ["body.weight", "classifier.weight"]


@pytest.mark.parametrize("mode", MODES)
def test_a_rotational_optimizer_trains_a_standardized_model(mode: str) -> None:
    model = standardize(make("gpt2"), mode)
    groups = plan(model).parameter_groups()
    norms = {p: p.detach().norm() for group in groups if group["rotational"] for p in group["params"]}
    assert len(norms) == 8
    losses = train(model, 10, optimizer=RotationalAdamW(groups, lr=1e-2, weight_decay=0.1))
    assert losses[-1] < losses[0]
    assert all(abs(p.detach().norm() / norm - 1) < 1e-5 for p, norm in norms.items())
