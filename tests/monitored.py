"""Run directories as a monitored training leaves them, written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_rotational import equilibrium
from hf_rotational.monitor.records import FILE_NAME, VERSION, write_records

LR, WEIGHT_DECAY, BETAS = 1e-3, 0.1, (0.9, 0.95)
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
EVERY = 10


def layer_names(depth: int) -> list[str]:
    return [f"model.layers.{place}.{module}.weight" for place in range(depth) for module in MODULES]


def angle_at(learning_rate: float) -> float:
    return equilibrium.adamw(lr=learning_rate, weight_decay=WEIGHT_DECAY, betas=BETAS).rotation or 0.0


def records(names: Iterable[str], steps: int, rotational: bool) -> list[dict[str, Any]]:
    """Measured steps under a linear schedule: on target, or with every layer at a rate of its own."""
    measured = []
    for place in range(steps):
        learning_rate = LR * (1 - place / steps)
        angle = angle_at(learning_rate)
        layers = {
            name: {
                "angle": [angle if rotational else angle * (1.5 + math.sin(number)), 0.1 * angle],
                "relative_update": [angle, 0.1 * angle],
                "norm": [1.25 if rotational else 1.25 + 0.01 * place, 0.1],
                "target": angle if rotational else None,
            }
            for number, name in enumerate(names)
        }
        measured.append(
            {
                "step": 1 + EVERY * place,
                "learning_rate": learning_rate,
                "rotation": sum(layer["angle"][0] for layer in layers.values()) / len(layers),
                "target": angle if rotational else None,
                "balance": 1.25 if rotational else 20.0 - place,
                "layers": layers,
            }
        )
    return measured


def write_run(folder: Path, *, rotational: bool = True, depth: int = 2, steps: int = 6, **header: Any) -> Path:
    """A run directory with records and losses."""
    names = layer_names(depth)
    head = {
        "version": VERSION,
        "model": "LlamaForCausalLM",
        "optimizer": "RotationalAdamW" if rotational else "AdamW",
        "optim": "rotational_adamw" if rotational else "adamw_torch",
        "settings": {"lr": LR, "weight_decay": WEIGHT_DECAY, "betas": list(BETAS)},
        "warmup_steps": 0,
        "max_steps": steps * EVERY,
        "every": EVERY,
        "parameters": {name: {"shape": [32, 64], "neuron_dims": [0], "dtype": "float32"} for name in names},
        **header,
    }
    write_records(folder / FILE_NAME, [head, *records(names, steps, rotational)])
    write_losses(folder, steps * EVERY)
    return folder


def write_losses(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, float]] = [{"step": step, "loss": 3.0 - step / steps} for step in range(1, steps + 1)]
    history += [{"step": steps, "eval_loss": 2.125}, {"step": steps, "train_loss": 2.5}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
