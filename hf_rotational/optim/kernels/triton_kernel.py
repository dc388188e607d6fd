"""One step of all tensors of a dtype in one launch, as a Triton kernel (needs the package ``triton``).

A program takes one tile of one tensor; which, it reads from a table with a row per tensor: addresses, sizes, and every
number that may change from step to step. So neither a schedule nor new gradients recompile anything or wait for the
device, and 300 tensors cost one launch.

The formulas are :func:`~hf_rotational.optim.rotation.rotate_`'s. From the sums u.u, u.w and w.w over a neuron's update
u and weights w follow, in closed form, how large the tangent update is and how long the neuron will be after the step,
so that projection, step and rescaling are one ``w = a w - b u + c``. Neurons that fit into registers are read once (28
bytes a parameter in float32), others twice (44), with sums in float64. Every order of summation follows from the
shapes: a step repeats bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

# Columns of the table, 8 bytes each: integers and addresses, then numbers.
FIRST_TILE, VARIANT, NEURONS, SPAN, PART = map(tl.constexpr, range(5))
WEIGHT, FIRST, SECOND, COMPENSATION, NORM, UPDATE_NORM_SQ, STEP, ROTATION_STEP = map(tl.constexpr, range(5, 13))
# From here on they change from step to step.
GRAD, SEED, LR_AT, SIGN, L2_FIRST, L2_SECOND, BETA1, NEW1, BETA2, NEW2 = map(tl.constexpr, range(13, 23))
ROOT_SCALE, EPS, LR, KEPT, ANGLE, NEW_SIZE, RELATIVE, CORRECTION, ROTATIONAL_EPS = map(tl.constexpr, range(23, 32))
# What others of these follow from where steps are counted on the device (triton_counts.py).
EPS_GIVEN, DECAY, UNIT_ANGLE, ROOT = map(tl.constexpr, range(32, 36))
COLUMNS = tl.constexpr(36)

PARTIALS = tl.constexpr(8)
"""Room for what a part of a neuron leaves: six sums, and the average so far."""
MOST_PARTS = tl.constexpr(512)
NOISE_SQ = tl.constexpr(64.0 * 2.0**-46)
"""What a projection leaves, 8 units of float32 rounding, squared: ``rotate_``'s ``ROUNDING_SQ``."""


@dataclass(frozen=True)
class Settings:
    """What all tensors of a launch share; each combination is compiled once."""

    kind: str
    """``"adam"``, ``"sgd"`` (no momentum), ``"momentum"``, ``"nesterov"`` or ``"lion"``."""
    centers: bool
    forgetful: bool
    rounding: str
    dtype: tl.dtype
    grad_dtype: tl.dtype


@dataclass(frozen=True, order=True)
class Variant:
    """How programs go over the tiles of a tensor."""

    form: str
    """``"plain"``: it does not rotate. ``"held"``: a tile is whole neurons and stays in registers. ``"walked"``:
    neurons are longer than a tile, and a program reads them twice. ``"shared"``: so do many programs with one neuron;
    they leave their sums to a second launch."""
    columns: bool
    """Whether the neurons of a tile lie side by side in memory rather than one after the other."""
    neurons: int
    span: int
    """Entries of each neuron that a tile has."""
    aligned: bool
    """Whether 16 bytes can be loaded at a time."""


@triton.jit
def _number(row, column, dtype: tl.constexpr = tl.float32):
    return tl.load((row + column).to(tl.pointer_type(tl.float64))).to(dtype)


@triton.jit
def _memory(row, column, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def _size(row, column, aligned: tl.constexpr):
    size = tl.load(row + column)
    return tl.multiple_of(size, 8) if aligned else size


@triton.jit
def _entries(row, base, at, here, settings: tl.constexpr, aligned: tl.constexpr):
    """Weights, updates (to subtract, per unit of learning rate), moments after the step, and gradients."""
    weight = tl.load(_memory(row, WEIGHT, settings.dtype, aligned) + base + at, here, 0.0).to(tl.float32)
    if settings.rounding == "kahan":
        weight += tl.load(_memory(row, COMPENSATION, settings.dtype, aligned) + base + at, here, 0.0).to(tl.float32)
    grad = tl.load(_memory(row, GRAD, settings.grad_dtype, aligned) + base + at, here, 0.0).to(tl.float32)
    plain = _number(row, SIGN) * grad
    whole = plain + _number(row, L2_FIRST) * weight
    first, second = whole, whole
    if settings.kind != "sgd":
        before = tl.load(_memory(row, FIRST, tl.float32, aligned) + base + at, here, 0.0)
        first = _number(row, BETA1) * before + _number(row, NEW1) * whole
    if settings.kind == "adam":
        squared = plain + _number(row, L2_SECOND) * weight
        second = tl.load(_memory(row, SECOND, tl.float32, aligned) + base + at, here, 0.0)
        second = _number(row, BETA2) * second + _number(row, NEW2) * squared * squared
        update = tl.div_rn(first, _number(row, ROOT_SCALE) * tl.sqrt_rn(second) + _number(row, EPS))
    elif settings.kind == "lion":
        update = (first > 0).to(tl.float32) - (first < 0).to(tl.float32)
        first = _number(row, BETA2) * before + _number(row, NEW2) * whole
    elif settings.kind == "nesterov":
        update = whole + _number(row, BETA1) * first
    else:
        update = first
    return weight, tl.where(here, update, 0.0), first, second, grad


@triton.jit
def _write(row, base, at, here, weight, first, second, settings: tl.constexpr, aligned: tl.constexpr):
    """Stores weights and moments; with ``lr == 0`` moments alone."""
    if settings.kind != "sgd":
        tl.store(_memory(row, FIRST, tl.float32, aligned) + base + at, first, here)
    if settings.kind == "adam":
        tl.store(_memory(row, SECOND, tl.float32, aligned) + base + at, second, here)
    if _number(row, LR) != 0:
        stored = weight.to(settings.dtype)
        if settings.rounding == "kahan":
            cut_off = (weight - stored.to(tl.float32)).to(settings.dtype)
            tl.store(_memory(row, COMPENSATION, settings.dtype, aligned) + base + at, cut_off, here)
        if settings.rounding == "stochastic":
            stored = _stochastically_rounded(weight, stored, tl.rand(tl.load(row + SEED), (base + at).to(tl.int32)))
        tl.store(_memory(row, WEIGHT, settings.dtype, aligned) + base + at, stored, here)


@triton.jit
def _stochastically_rounded(weight, nearest, draw):
    """As :func:`hf_rotational.optim.precision.stochastically_rounded`, on the bits of 16-bit floats."""
    error = weight - nearest.to(tl.float32)
    bits = nearest.to(tl.int16, bitcast=True)
    # Bits are sign and magnitude: one more is one step away from 0. From 0 itself the step is to the smallest number.
    other = bits + tl.where((error > 0) == (bits >= 0), 1, -1)
    other = tl.where(nearest == 0, tl.where(error > 0, 1, -32767), other).to(tl.int16)
    other = other.to(nearest.dtype, bitcast=True)
    gap = tl.abs(other.to(tl.float32) - nearest.to(tl.float32))
    return tl.where(draw * gap < tl.abs(error), other, nearest)


@triton.jit
def _inverse_sq(norm):
    return tl.where(norm > 0, 1.0 / (norm * norm), 0.0)


@triton.jit
def _sqrt(value):
    return tl.sqrt_rn(value) if value.dtype == tl.float32 else tl.sqrt(value)


@triton.jit
def _tangent(norm, fan_in, here, weight, update, settings: tl.constexpr):
    """Updates without mean and radial part, and the squared size of what is taken out."""
    removed_sq = tl.zeros_like(norm)
    if settings.centers:
        mean = tl.sum(update, 1, True) / fan_in
        update = tl.where(here, update - mean, 0.0)
        removed_sq += mean * mean * fan_in
    projection = tl.sum(update * weight, 1, True)
    update -= projection * _inverse_sq(norm) * weight
    return update, removed_sq + projection * projection * _inverse_sq(norm)


@triton.jit
def _move(row, norm, average, removed_sq, sums, settings: tl.constexpr):
    """The coefficients of every neuron's step ``w = a w - (b u - c)``, and its new average of updates' squared sizes.

    A neuron with ``b == 0`` does not move.

    Args:
        norm: that each is held at.
        average: of squared sizes so far.
        removed_sq: squared size of what had been taken out of the updates before the sums were taken.
        sums: of u.u, u.w, w.w, u and w, and how many gradients are not 0. Their dtype is computed in.
    """
    uu, uw, ww, u_sum, w_sum, grads = sums
    dtype: tl.constexpr = uu.dtype
    norm, average = norm.to(dtype), average.to(dtype)
    fan_in = tl.load(row + SPAN).to(dtype)
    mean = u_sum / fan_in
    uu -= mean * u_sum
    uw -= mean * w_sum
    radial = uw * _inverse_sq(norm)
    size_sq = uu - 2.0 * radial * uw + radial * radial * ww
    broken = size_sq != size_sq
    removed_sq += mean * mean * fan_in + uw * radial
    size_sq = tl.where(size_sq > removed_sq * NOISE_SQ, size_sq, 0.0)
    late = average + _number(row, NEW_SIZE, dtype) * (size_sq / _number(row, RELATIVE, dtype) - average)
    # It begins with the first update that is not 0.
    late = tl.where(average == 0, size_sq / _number(row, CORRECTION, dtype), late)
    if settings.forgetful:
        late = tl.where(grads > 0, late, average)
    moves = (norm > 0) & (size_sq != 0)
    size = _sqrt(late * _number(row, CORRECTION, dtype)) + _number(row, ROTATIONAL_EPS, dtype)
    b = tl.where(moves, _number(row, ANGLE, dtype) * norm / size, tl.where(norm > 0, 0.0, _number(row, LR, dtype)))
    scale = tl.where(moves, norm / _sqrt(ww - 2.0 * b * (uw - radial * ww) + b * b * size_sq), 1.0)
    a = scale * tl.where(moves, 1.0 + b * radial, 1.0)
    b = tl.where(broken, float("nan"), scale * b)
    return a.to(tl.float32), b.to(tl.float32), (b * mean).to(tl.float32), late.to(tl.float32)


@triton.jit
def _turned(weight, update, a, b, c):
    return tl.where(b != 0, a * weight - (b * update - c), weight)


@triton.jit
def _sums_over(row, origin, stride, at, known, start, end, settings: tl.constexpr, variant: tl.constexpr):
    """Sums over entries ``start`` to ``end`` of every neuron of a tile, a tile at a time; see :func:`_move`."""
    neurons: tl.constexpr = variant.neurons
    uu = tl.zeros([neurons, 1], tl.float64)
    uw, ww, u_sum, w_sum, grads = uu, uu, uu, uu, uu
    for begin in range(start, end, variant.span):
        here = known & (begin + tl.arange(0, variant.span)[None, :] < end)
        weight, update, _, _, grad = _entries(row, origin + begin * stride, at, here, settings, variant.aligned)
        u, w = update.to(tl.float64), weight.to(tl.float64)
        uu += tl.sum(u * u, 1, True)
        uw += tl.sum(u * w, 1, True)
        ww += tl.sum(w * w, 1, True)
        if settings.centers:
            u_sum += tl.sum(u, 1, True)
            w_sum += tl.sum(w, 1, True)
        if settings.forgetful:
            grads += tl.sum((grad != 0).to(tl.float64), 1, True)
    return uu, uw, ww, u_sum, w_sum, grads


@triton.jit
def _step_over(row, origin, stride, at, known, start, end, a, b, c, settings: tl.constexpr, variant: tl.constexpr):
    for begin in range(start, end, variant.span):
        here = known & (begin + tl.arange(0, variant.span)[None, :] < end)
        base = origin + begin * stride
        weight, update, first, second, _ = _entries(row, base, at, here, settings, variant.aligned)
        weight = _turned(weight, update, a, b, c)
        _write(row, base, at, here, weight, first, second, settings, variant.aligned)


@triton.jit
def _turn(row, tile, settings: tl.constexpr, variant: tl.constexpr):
    """Takes the step of a tile of whole neurons."""
    neurons = _size(row, NEURONS, variant.aligned and variant.columns)
    span = _size(row, SPAN, variant.aligned and not variant.columns)
    tiles = tl.cdiv(neurons, variant.neurons)
    matrix, place = tile // tiles, tile % tiles * variant.neurons
    across, along = tl.arange(0, variant.neurons)[:, None], tl.arange(0, variant.span)[None, :]
    known, neuron = place + across < neurons, matrix * neurons + place + across
    # Addresses are a 64-bit number for the tile and small ones within it.
    if variant.columns:
        stride = neurons
        origin, at = matrix * span * neurons + place, across + along * neurons.to(tl.int32)
    else:
        stride = 1
        origin, at = (matrix * neurons + place) * span, across * span.to(tl.int32) + along

    norm = tl.load(_memory(row, NORM, tl.float32, False) + neuron, known, 0.0)
    average_at = _memory(row, UPDATE_NORM_SQ, tl.float32, False) + neuron
    average = tl.load(average_at, known, 0.0)
    if variant.form == "held":
        here = known & (along < span)
        weight, update, first, second, grad = _entries(row, origin, at, here, settings, variant.aligned)
        grads, zero = tl.sum((grad != 0).to(tl.float32), 1, True), tl.zeros_like(norm)
        update, removed_sq = _tangent(norm, span.to(tl.float32), here, weight, update, settings)
        uu, uw = tl.sum(update * update, 1, True), tl.sum(update * weight, 1, True)
        ww = tl.sum(weight * weight, 1, True)
        a, b, c, average = _move(row, norm, average, removed_sq, (uu, uw, ww, zero, zero, grads), settings)
        weight = _turned(weight, update, a, b, c)
        _write(row, origin, at, here, weight, first, second, settings, variant.aligned)
    else:
        sums = _sums_over(row, origin, stride, at, known, 0, span, settings, variant)
        a, b, c, average = _move(row, norm, average, 0.0, sums, settings)
        _step_over(row, origin, stride, at, known, 0, span, a, b, c, settings, variant)
    tl.store(average_at, average, known)


@triton.jit
def _part(row, tile, aligned: tl.constexpr):
    """Of a neuron that many programs share: its number and origin, what this tile has of it, and where its sums are."""
    span, length = _size(row, SPAN, aligned), _size(row, PART, aligned)
    parts = tl.cdiv(span, length)
    neuron, start = tile // parts, tile % parts * length
    slot = tl.load(row + FIRST_TILE) + neuron * parts  # tensors with shared neurons come first
    return neuron + tl.zeros([1, 1], tl.int64), neuron * span, start, tl.minimum(start + length, span), parts, slot


@triton.jit
def _leave_sums(row, tile, partials, settings: tl.constexpr, variant: tl.constexpr):
    neuron, origin, start, end, parts, slot = _part(row, tile, variant.aligned)
    along = tl.arange(0, variant.span)[None, :]
    sums = _sums_over(row, origin, 1, along, along >= 0, start, end, settings, variant)
    # The old average goes with them: it is replaced while others may still have to read it.
    average = tl.load(_memory(row, UPDATE_NORM_SQ, tl.float32, False) + neuron)
    average = tl.where(start == 0, average, 0.0)
    at = partials + (slot + tile % parts) * PARTIALS + tl.zeros([1, 1], tl.int32)
    for place in tl.static_range(6):
        tl.store(at + place, sums[place])
    tl.store(at + 6, average)


@triton.jit
def _finish(row, tile, partials, settings: tl.constexpr, variant: tl.constexpr):
    neuron, origin, start, end, parts, slot = _part(row, tile, variant.aligned)
    part = tl.arange(0, MOST_PARTS)[None, :]
    at, here = partials + (slot + part) * PARTIALS, part < parts
    uu, uw, ww = _total(at, here), _total(at + 1, here), _total(at + 2, here)
    sums = uu, uw, ww, _total(at + 3, here), _total(at + 4, here), _total(at + 5, here)
    norm = tl.load(_memory(row, NORM, tl.float32, False) + neuron)
    a, b, c, average = _move(row, norm, _total(at + 6, here), 0.0, sums, settings)
    tl.store(_memory(row, UPDATE_NORM_SQ, tl.float32, False) + neuron, average, (neuron >= 0) & (start == 0))
    along = tl.arange(0, variant.span)[None, :]
    _step_over(row, origin, 1, along, along >= 0, start, end, a, b, c, settings, variant)


@triton.jit
def _total(at, here):
    return tl.sum(tl.load(at, here, 0.0), 1, True)


@triton.jit
def _descend(row, tile, settings: tl.constexpr, variant: tl.constexpr):
    """Takes the plain step of a tile of a tensor that does not rotate."""
    base, at = tile * variant.span, tl.arange(0, variant.span)
    here = base + at < _size(row, SPAN, variant.aligned)
    weight, update, first, second, _ = _entries(row, base, at, here, settings, variant.aligned)
    weight = _number(row, KEPT) * weight - _number(row, LR) * update
    _write(row, base, at, here, weight, first, second, settings, variant.aligned)


@triton.jit
def _take(
    row,
    tile,
    partials,
    settings: tl.constexpr,
    variants: tl.constexpr,
    place: tl.constexpr,
    finishes: tl.constexpr,
):
    variant: tl.constexpr = variants[place]
    if variant.form == "shared":
        if finishes:
            _finish(row, tile, partials, settings, variant)
        else:
            _leave_sums(row, tile, partials, settings, variant)
    elif not finishes:
        if variant.form == "plain":
            _descend(row, tile, settings, variant)
        else:
            _turn(row, tile, settings, variant)


@triton.jit
def rotational_step(
    table,
    partials,
    rows: tl.constexpr,
    settings: tl.constexpr,
    variants: tl.constexpr,
    finishes: tl.constexpr,
):
    """Takes one tile's step.

    Args:
        table: ``rows`` of :data:`COLUMNS`, a power of 2; rows beyond the tensors' begin at a tile that never comes,
            and those whose gradient has the address 0 are not stepped.
        partials: sums that programs leave for the second launch.
        variants: that ``VARIANT`` numbers.
        finishes: whether this is that launch.
    """
    program = tl.program_id(0).to(tl.int64)
    first_tiles = tl.load(table + tl.arange(0, rows) * COLUMNS + FIRST_TILE)
    row = table + (tl.sum((first_tiles <= program).to(tl.int32), 0) - 1) * COLUMNS
    tile = program - tl.load(row + FIRST_TILE)
    present = tl.load(row + GRAD) != 0
    for place in tl.static_range(len(variants)):
        if present & (tl.load(row + VARIANT) == place):
            _take(row, tile, partials, settings, variants, place, finishes)
