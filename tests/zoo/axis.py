"""Which output feature a slice of a weight makes, found out by running the module that owns it.

The module runs three times on one random input: as it is, with one neuron's slice of the weight changed, and with all
but that slice changed. The dims are right if and only if the first change moves one output feature and the second moves
every feature but that one: dims too coarse move several, dims too fine leave weights of the feature outside the slice.

Where a module does more than one product (attention, experts, routers), the features are those of the product that
reads the weight, taken where the module's own forward computes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "_grouped_mm"})
TOKENS = 6


class NotProbed(Exception):
    """The module's inputs are not known here."""


def changes_one_feature(model: nn.Module, owner: str, name: str, dims: tuple[int, ...]) -> str | None:
    """``None`` if ``dims`` index the neurons of the parameter ``name`` of the module at ``owner``, or what is wrong.

    Raises:
        NotProbed: if there is no way here to run the module.
    """
    module = model.get_submodule(owner)
    weight = module.get_parameter(name)
    run = _runner(model, owner, module, name)
    slices: list[Any] = [slice(None)] * weight.ndim
    for dim in dims:
        slices[dim] = min(1, weight.shape[dim] - 1)
    neuron = torch.zeros(weight.shape, dtype=torch.bool)
    neuron[tuple(slices)] = True
    with torch.no_grad():
        original = weight.clone()
        start = torch.randn_like(weight)
        noise = torch.randn_like(weight)
        try:
            outputs = []
            for change in (torch.zeros_like(neuron), neuron, ~neuron):
                weight.copy_(torch.where(change, noise, start))
                outputs.append(run())
        finally:
            weight.copy_(original)
    return _verdict(*outputs)


def _verdict(before: list[Tensor], slice_changed: list[Tensor], rest_changed: list[Tensor]) -> str | None:
    if not before or not len(before) == len(slice_changed) == len(rest_changed):
        return f"{len(before)} products read the weight"
    moved = [_moved(a, b) for a, b in zip(before, slice_changed, strict=True)]
    rest_moved = [_moved(a, b) for a, b in zip(before, rest_changed, strict=True)]
    touched = [index for index, mask in enumerate(moved) if mask.any()]
    if len(touched) != 1:
        return f"a neuron changes {len(touched)} of {len(moved)} products"
    (index,) = touched
    mask, rest = moved[index], rest_moved[index]
    feature_dims = []
    for dim in range(mask.ndim):
        hit = mask.movedim(dim, 0).flatten(1).any(1)
        if mask.shape[dim] > 1 and hit.sum() == 1:
            feature_dims.append(dim)
    if not feature_dims:
        return f"a neuron changes several features of an output of shape {tuple(mask.shape)}"
    others = [dim for dim in range(mask.ndim) if dim not in feature_dims]
    features = mask.amax(others) if others else mask
    rest_features = rest.amax(others) if others else rest
    if not torch.equal(features, ~rest_features):
        return "the rest of the weight changes the same feature, or leaves others as they are"
    if not all(mask.any() for i, mask in enumerate(rest_moved) if i != index):
        return "the rest of the weight leaves whole products as they are"
    return None


def _moved(a: Tensor, b: Tensor) -> Tensor:
    # Rounding may differ with the values next to a row, so a change is what no rounding explains.
    return ~torch.isclose(a, b, rtol=1e-4, atol=1e-5)


class _Products(TorchDispatchMode):
    """Collects the outputs of the products that read one weight, directly or through views and copies of it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self._forms = [weight]  # kept alive, so that an id stays one tensor's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        ids = {id(form) for form in self._forms}
        if any(id(leaf) in ids for leaf in torch.utils._pytree.tree_leaves((args, kwargs))):
            outputs = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            if func.overloadpacket.__name__ in PRODUCTS:
                self.outputs += [output.detach().clone() for output in outputs]
            else:
                self._forms += outputs
        return result


def _runner(model: nn.Module, owner: str, module: nn.Module, name: str) -> Callable[[], list[Tensor]]:
    weight = module.get_parameter(name)
    is_product = isinstance(module, nn.Linear | Conv1D | _ConvNd)
    failures = []
    for inputs in _inputs(model, owner, module):
        callee = inputs.pop("module", module)

        def run(callee: nn.Module = callee, inputs: dict[str, Any] = inputs) -> list[Tensor]:
            with torch.random.fork_rng(), _Products(weight) as products:
                torch.manual_seed(0)
                try:
                    output = callee(**inputs)
                except Exception:
                    # What comes after the product does not matter: it may want more than a lone module has.
                    if not products.outputs:
                        raise
                    output = None
            return [output] if is_product and isinstance(output, Tensor) else products.outputs

        try:
            if run():
                return run
            failures.append("no product reads it")
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    raise NotProbed(f"{type(module).__name__}.{name}: {'; '.join(failures) or 'no inputs known'}")


def _inputs(model: nn.Module, owner: str, module: nn.Module) -> list[dict[str, Any]]:
    """Keyword arguments to try in turn for a module's forward."""
    if isinstance(module, nn.MultiheadAttention):
        return [_attention(module)]
    if isinstance(module, nn.Linear):
        width = module.in_features
        groups = getattr(module, "n_groups", 1)
        return [_first(module, torch.randn(*lead, width)) for lead in ((TOKENS,), (2, TOKENS), (2, TOKENS, groups))]
    if isinstance(module, Conv1D):
        return [_first(module, torch.randn(TOKENS, module.nx))]
    if isinstance(module, _ConvNd):
        reach = zip(module.kernel_size, module.dilation, strict=True)
        signal = torch.randn(2, module.in_channels, *[3 * (k - 1) * d + 3 for k, d in reach])
        return [_first(module, signal), _first(module, signal.transpose(1, -1))]
    for cls in type(module).__mro__:
        for suffix, inputs in INPUTS.items():
            if cls.__name__.endswith(suffix):
                return inputs(model, owner, module)
    return []


def _first(module: nn.Module, value: Any) -> dict[str, Any]:
    return {next(iter(inspect.signature(module.forward).parameters)): value}


def _attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    module.train()  # in eval mode one fused kernel does it all
    sizes = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
    lead = (2, TOKENS) if module.batch_first else (TOKENS, 2)
    return {key: torch.randn(*lead, size) for key, size in sizes.items()}


def _router(model: nn.Module, owner: str, module: Any) -> list[dict[str, Any]]:
    width = module.weight.shape[1]
    names = inspect.signature(module.forward).parameters
    extra = {
        "input_ids": torch.zeros(1, TOKENS, dtype=torch.long),
        "e_score_correction_bias": torch.zeros(module.weight.shape[0]),
    }
    rest = {key: value for key, value in extra.items() if key in names}
    return [_first(module, torch.randn(*lead, width)) | rest for lead in ((1, TOKENS), (TOKENS,))]


def _experts(model: nn.Module, owner: str, module: Any) -> list[dict[str, Any]]:
    if hasattr(module, "config"):
        module.config._experts_implementation = "eager"  # one product per expert
    count, width = module.down_proj.shape[0], module.down_proj.shape[2 if _transposed(module) else 1]
    tokens = torch.randn(2 * count, width)
    first = torch.arange(2 * count).remainder(count)
    chosen = torch.stack((first, (first + 1).remainder(count)), 1)  # every expert has several tokens
    values = (tokens, chosen, torch.ones(2 * count, 2))
    return [dict(zip(inspect.signature(module.forward).parameters, values, strict=False))]


def _transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"))


def _jetmoe(model: nn.Module, owner: str, module: Any) -> list[dict[str, Any]]:
    experts = module.num_experts
    return [{"inputs": torch.randn(2 * experts, module.input_size), "expert_size": [2] * experts}]


def _dbrx(model: nn.Module, owner: str, module: Any) -> list[dict[str, Any]]:
    experts, tokens = module.moe_num_experts, 2 * module.moe_num_experts
    parent = model.get_submodule(owner.rpartition(".")[0])
    chosen = torch.arange(tokens).remainder(experts).unsqueeze(1)
    weights = torch.ones(tokens, 1)
    values = (torch.randn(1, tokens, module.hidden_size), chosen, weights)
    return [{"module": parent, **dict(zip(inspect.signature(parent.forward).parameters, values, strict=True))}]


def _xlnet(model: nn.Module, owner: str, module: Any) -> list[dict[str, Any]]:
    hidden, positions = torch.randn(TOKENS, 2, module.d_model), torch.randn(2 * TOKENS, 2, module.d_model)
    return [{"h": hidden, "g": None, "attn_mask_h": None, "attn_mask_g": None, "r": positions, "seg_mat": None}]


def _gated_recurrence(model: nn.Module, owner: str, module: Any) -> list[dict[str, Any]]:
    width = module.recurrent_param.shape[0]
    return [{"activations": torch.randn(2, TOKENS, width), "position_ids": torch.arange(TOKENS).expand(2, TOKENS)}]


def _hyper_connection(model: nn.Module, owner: str, module: Any) -> list[dict[str, Any]]:
    weight = next(p for p in module.parameters(recurse=False) if p.ndim == 2)
    return [_first(module, torch.randn(2, TOKENS, module.hc_mult, weight.shape[1] // module.hc_mult))]


def _projector(model: nn.Module, owner: str, module: Any) -> list[dict[str, Any]]:
    width = module.mm_input_projection_weight.shape[0]
    return [_first(module, torch.randn(2, module.patches_per_image**2, width))]


INPUTS: dict[str, Callable[[nn.Module, str, Any], list[dict[str, Any]]]] = {
    "Router": _router,
    "DbrxExpertGLU": _dbrx,
    "JetMoeParallelExperts": _jetmoe,
    "InklingSharedExperts": lambda model, owner, module: [
        {
            "hidden_states": torch.randn(1, TOKENS, module.gate_proj.shape[2]),
            "gammas": torch.rand(1, TOKENS, module.n_shared_experts),
        }
    ],
    "Experts": _experts,
    "XLNetRelativeAttention": _xlnet,
    "MultiModalProjector": _projector,
    "RecurrentGemmaRglru": _gated_recurrence,
    "HyperConnection": _hyper_connection,
    "HyperHead": _hyper_connection,
    "GroupedLinearLayer": lambda model, owner, module: [{"hidden_states": torch.randn(2, TOKENS, module.input_size)}],
    "CsmCodebooksHead": lambda model, owner, module: [
        {
            "hidden_states": torch.randn(2, module.num_codebooks - 1, module.weight.shape[1]),
            "codebook_indices": torch.arange(1, module.num_codebooks),
        }
    ],
    "ZambaMambaMixer": lambda model, owner, module: [{"hidden_states": torch.randn(1, TOKENS, module.hidden_size)}],
}
"""End of a class name to what its forward takes."""
