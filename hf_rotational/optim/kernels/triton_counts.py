"""Counts steps on the device, and works out there what depends on the count: what a CUDA graph has to replay.

Elsewhere the host counts, and puts learning rate, angle and bias corrections into the table (``cuda.numbers_of``, whose
formulas these are); a graph would repeat the ones it was captured with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_rotational.optim.kernels.triton_kernel import (
    ANGLE,
    BETA1,
    BETA2,
    COLUMNS,
    CORRECTION,
    DECAY,
    EPS,
    EPS_GIVEN,
    GRAD,
    KEPT,
    LR,
    LR_AT,
    NEW_SIZE,
    RELATIVE,
    ROOT,
    ROOT_SCALE,
    ROTATION_STEP,
    SEED,
    STEP,
    UNIT_ANGLE,
)


@triton.jit
def _column(row, column):
    return (row + column).to(tl.pointer_type(tl.float64))


@triton.jit
def _counted(row, column, counts):
    """Counts at the addresses in a column, one more of them where ``counts`` says so."""
    address = tl.load(row + column)
    here = counts & (address != 0)
    at = address.to(tl.pointer_type(tl.float32))
    count = tl.load(at, here, 0.0) + 1.0
    tl.store(at, count, here)
    return count.to(tl.float64)


@triton.jit
def _forgotten(decay, steps):
    """``1 - decay^steps``."""
    return 1.0 - tl.where(decay > 0, tl.exp(steps * tl.log(decay)), 0.0)


@triton.jit
def count_steps(table, rows: tl.constexpr):
    """Counts a step of every tensor that has a gradient, and completes its row of the table for it.

    Args:
        table: of ``rotational_step``, with addresses of counters and, where it is on the device, of the learning rate.
        rows: of the table.
    """
    row = table + tl.arange(0, rows) * COLUMNS
    counts = tl.load(row + GRAD) != 0
    step = _counted(row, STEP, counts)
    rotation_step = _counted(row, ROTATION_STEP, counts)

    seed = tl.load(row + SEED)
    tl.store(row + SEED, (seed >> 32 << 32) + step.to(tl.int64), counts)

    # Adam's corrections of biases; with betas of 0, as other optimizers have them, there are none.
    corrected = _forgotten(tl.load(_column(row, BETA1)), step)
    squared = _forgotten(tl.load(_column(row, BETA2)), step)
    tl.store(_column(row, ROOT_SCALE), corrected / tl.sqrt(squared), counts)
    tl.store(_column(row, EPS), corrected * tl.load(_column(row, EPS_GIVEN)), counts)

    lr_at = tl.load(row + LR_AT)
    on_device = counts & (lr_at != 0)
    lr = tl.load(lr_at.to(tl.pointer_type(tl.float32)), on_device, 0.0).to(tl.float64)
    lr = tl.where(on_device, lr, tl.load(_column(row, LR)))
    tl.store(_column(row, LR), lr, counts)
    tl.store(_column(row, KEPT), 1.0 - lr * tl.load(_column(row, DECAY)), counts)
    factor = tl.where(tl.load(_column(row, ROOT)) != 0, tl.sqrt(lr), lr)
    tl.store(_column(row, ANGLE), tl.load(_column(row, UNIT_ANGLE)) * factor, counts)

    seen = _forgotten(1.0 - tl.load(_column(row, NEW_SIZE)), rotation_step)
    tl.store(_column(row, CORRECTION), tl.load(_column(row, RELATIVE)) / seen, counts)
