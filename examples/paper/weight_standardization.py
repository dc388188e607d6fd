"""Weight standardization, rotation and learned gains: what each does to the loss and to the balance between neurons.

Two small networks learn the source of Python's standard library, with every method for as many steps on the same
batches. Learning rate and weight decay are chosen for each method from one grid, by the held-out loss with seed 0; the
tables are of the seeds after it.

1. A network that predicts a byte from the 16 before it, with LayerNorm after every hidden layer: that makes the scale
   of a layer irrelevant, not that of its single neurons, and nothing normalizes what the readout computes.
2. A GPT-2 with 4 layers and tied embeddings, which rotate or not, with norms that are held or learned.

    python examples/paper/weight_standardization.py   # about half an hour on 2 cores

prints two tables, writes benchmarks/results/weight_standardization.json and draws
docs/figures/weight_standardization.png. ``--scale 0.02 --seeds 1`` takes a minute and says nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_rotational import RotationalAdamW, plan, standardize
from hf_rotational.demo.corpus import is_validation
from hf_rotational.monitor.measure import neuron_angles
from hf_rotational.optim.rotation import reduced_dims

BETAS, WARMUP, EVERY = (0.9, 0.95), 0.1, 5
QUANTILES = torch.linspace(0, 1, 41)


@dataclass(frozen=True)
class Method:
    """How a network is trained. What does not rotate takes AdamW's update, with the same hyperparameters."""

    standardized: bool = False
    """``standardize(model, "drop_mean")`` before training."""
    module_gain_lr: float = 1.0
    """Factor on the learning rate of the standardized modules' gains."""
    rotation: Mapping[str, Any] | None = None
    """Options of ``RotationalAdamW``; None: AdamW."""
    embeddings: bool = False
    """Whether embeddings rotate."""
    warmup: float = WARMUP
    """Share of the steps."""


@dataclass(frozen=True)
class Task:
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    vocabulary: int
    """Tokens of the corpus; 256: bytes."""
    length: int
    """Tokens in a row of a batch, what is predicted included."""
    batch: int
    """Rows."""
    held_out_rows: int
    steps: int
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    methods: dict[str, Method]
    columns: tuple[str, ...]
    """Of its table, besides losses: from ``COLUMNS``."""


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    lr: float
    weight_decay: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    train: float
    """Mean loss of the last tenth of the steps."""
    held_out: float
    """Loss after training."""
    losses: list[float]
    """Training losses, in 50 means."""
    row_norms: list[float]
    """10th, 50th and 90th percentile of the embedding rows' norms at the end, over their mean norm at the start."""
    angles: list[float]
    """Quantiles of the neurons' mean angles per step in the second half, in radians."""
    spread: float
    """90th over 10th percentile of these, of all neurons that are measured."""
    spreads: dict[str, float]
    """The same within each weight."""
    spread_in_a_step: float
    """90th over 10th percentile of the angles in one step; median over the steps."""
    turned_over: float
    """How often a neuron came to point the other way in one step, its gain having changed sign: per 1,000 of its
    steps."""


class ByteNetwork(nn.Module):
    """Logits of the byte after 16; every hidden layer is normalized as a whole."""

    def __init__(self, context: int = 16, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width // context)
        self.hidden = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.readout = nn.Linear(width, 256)

    def forward(self, context: Tensor) -> Tensor:
        x = self.embedding(context).flatten(1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = F.gelu(norm(linear(x)))
        return self.readout(x)


def byte_loss(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]), rows[:, -1])


def gpt2() -> nn.Module:
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 2048}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    # The default activation, in one pass.
    config = GPT2Config(**sizes, **dropout, activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def gpt2_loss(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())


LEARNED = {"gains": "learned"}
BYTES, GPT2 = "LayerNorm network", "GPT-2"
TASKS = {
    BYTES: Task(
        build=ByteNetwork,
        loss=byte_loss,
        vocabulary=256,
        length=17,
        batch=256,
        held_out_rows=32768,
        steps=1000,
        learning_rates=(1e-3, 3e-3, 1e-2),
        weight_decays=(0.1, 1.0),
        methods={
            "AdamW": Method(),
            "AdamW, standardized": Method(standardized=True),
            # These neurons' standard deviations are 1/16 of their norms, and Adam's steps the same for large and small.
            "AdamW, standardized, gains lr/16": Method(standardized=True, module_gain_lr=1 / 16),
            "rotational": Method(rotation={}),
            "rotational, learned gains": Method(rotation=LEARNED),
            "rotational, standardized": Method(rotation={}, standardized=True),
            "rotational, standardized, gains lr/16": Method(rotation={}, standardized=True, module_gain_lr=1 / 16),
        },
        columns=("spread", "median weight", "widest", "in a step", "turned over"),
    ),
    GPT2: Task(
        build=gpt2,
        loss=gpt2_loss,
        vocabulary=2048,
        length=65,
        batch=16,
        held_out_rows=512,
        steps=300,
        learning_rates=(5e-4, 2e-3, 8e-3, 3.2e-2),
        weight_decays=(0.1,),
        methods={
            "AdamW, 10 % warmup": Method(),
            "AdamW": Method(warmup=0.0),
            "rotational": Method(rotation={}, warmup=0.0),
            "rotational, learned gains": Method(rotation=LEARNED, warmup=0.0),
            "embeddings too, fixed norms": Method(rotation={}, embeddings=True, warmup=0.0),
            "embeddings too, learned gains": Method(rotation=LEARNED, embeddings=True, warmup=0.0),
            "embeddings too, gains lr x 10": Method(
                rotation={**LEARNED, "gain_lr_multiplier": 10.0}, embeddings=True, warmup=0.0
            ),
        },
        columns=("spread", "row norm 10 %", "50 %", "90 %"),
    ),
}
COLUMNS: dict[str, Callable[[Outcome], float]] = {
    "spread": lambda outcome: outcome.spread,
    "median weight": lambda outcome: statistics.median(outcome.spreads.values()),
    "widest": lambda outcome: max(outcome.spreads.values()),
    "in a step": lambda outcome: outcome.spread_in_a_step,
    "turned over": lambda outcome: outcome.turned_over,
    "row norm 10 %": lambda outcome: outcome.row_norms[0],
    "50 %": lambda outcome: outcome.row_norms[1],
    "90 %": lambda outcome: outcome.row_norms[2],
}


@cache
def corpus(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and tokens of the modules that are held out."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts[is_validation(file.name)].append(file.read_text("utf-8", errors="replace"))
    train, held_out = "".join(texts[False]), "".join(texts[True])
    if vocabulary == 256:
        return torch.tensor(list(train.encode())), torch.tensor(list(held_out.encode()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts[False], trainer)
    return torch.tensor(tokenizer.encode(train).ids), torch.tensor(tokenizer.encode(held_out).ids)


def rows_of(tokens: Tensor, task: Task, rows: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - task.length, (rows, 1), generator=generator)
    return tokens[starts + torch.arange(task.length)]


def optimizer_of(model: nn.Module, method: Method, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Both take the same groups: what has two dims or more decays, or rotates as its plan says."""
    gains = {parameter for name, parameter in model.named_parameters() if name.endswith("gain_norm")}
    groups = plan(model, embeddings=method.embeddings).parameter_groups()
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gains]
    groups.append({"params": list(gains), "rotational": False, "weight_decay": 0.0, "lr": lr * method.module_gain_lr})
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "betas": BETAS}
    if method.rotation is None:
        return torch.optim.AdamW(groups, **options, fused=True)
    return RotationalAdamW(groups, **options, **method.rotation, backend="foreach")


class Angles:
    """Collects how far the neurons of every weight matrix turn, as the modules that read them see it."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        rotating = plan(model).rotating  # of the plain model: standardization takes weights apart
        self.dims = {entry.name: reduced_dims(entry.parameter.ndim, entry.neuron_dims) for entry in rotating}
        self.model, self.first = model, steps // 2
        self.seen: list[dict[str, Tensor]] = []
        self.turned_over: list[float] = []

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Measures what happens inside, in every ``EVERY``-th step of the second half."""
        if step < self.first or (step - self.first) % EVERY:
            yield
            return
        before = self._weights()
        yield
        after = self._weights()
        angles = {name: neuron_angles(before[name], after[name], dims) for name, dims in self.dims.items()}
        self.turned_over.append(float((torch.cat(list(angles.values())) > math.pi / 2).float().mean()))
        # A gain that changes sign puts the weight on the other end of its direction, which has hardly turned.
        self.seen.append({name: torch.minimum(angle, math.pi - angle) for name, angle in angles.items()})

    def summary(self) -> dict[str, Any]:
        """Fields of ``Outcome``."""
        means = {name: torch.stack([angles[name] for angles in self.seen]).mean(0) for name in self.dims}
        together = torch.cat(list(means.values()))
        return {
            "angles": together.quantile(QUANTILES).tolist(),
            "spread": spread(together),
            "spreads": {name: spread(angles) for name, angles in means.items()},
            "spread_in_a_step": statistics.median(spread(torch.cat(list(step.values()))) for step in self.seen),
            "turned_over": 1000 * statistics.fmean(self.turned_over),
        }

    def _weights(self) -> dict[str, Tensor]:
        parts = {name: name.rpartition(".") for name in self.dims}
        modules = {name: (self.model.get_submodule(path), leaf) for name, (path, _, leaf) in parts.items()}
        return {name: getattr(module, leaf).detach().clone() for name, (module, leaf) in modules.items()}


def spread(angles: Tensor) -> float:
    """90th over 10th percentile."""
    low, high = angles.quantile(torch.tensor([0.1, 0.9]))
    return float(high / low)


def train(run: Run) -> Outcome:
    """One training, in one thread whatever else runs, so that its numbers do not depend on that."""
    torch.set_num_threads(1)
    task = TASKS[run.task]
    method = task.methods[run.method]
    training, held_out = corpus(task.vocabulary)
    torch.manual_seed(run.seed)
    model = task.build()
    embedding = next(module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    first_norm = embedding.detach().norm(dim=1).mean()
    angles = Angles(model, run.steps)
    if method.standardized:
        standardize(model, "drop_mean")
    optimizer = optimizer_of(model, method, run.lr, run.weight_decay)
    warmup = int(method.warmup * run.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), (run.steps - step) / (run.steps - warmup))
    )
    batches, losses = torch.Generator().manual_seed(1000 + run.seed), []
    for step in range(run.steps):
        loss = task.loss(model, rows_of(training, task, task.batch, batches))
        loss.backward()
        with angles.measured(step):
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    rows = rows_of(held_out, task, task.held_out_rows, torch.Generator().manual_seed(0))
    with torch.no_grad():
        held_out_loss = statistics.fmean(float(task.loss(model, part)) for part in rows.chunk(16))
    return Outcome(
        train=statistics.fmean(losses[-max(run.steps // 10, 1) :]),
        held_out=held_out_loss,
        losses=[float(part.mean()) for part in torch.tensor(losses).tensor_split(min(50, run.steps))],
        row_norms=(embedding.detach().norm(dim=1) / first_norm).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(),
        **angles.summary(),
    )


def train_all(runs: list[Run], workers: int, what: str) -> dict[Run, Outcome]:
    if workers == 1:
        return dict(zip(runs, track(map(train, runs), what, len(runs)), strict=True))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(runs, track(pool.map(train, runs), what, len(runs)), strict=True))


def table(name: str, final: dict[Run, Outcome]) -> Table:
    """A row for each method: means over the seeds, and of losses also the standard deviation."""
    task, steps, seeds = TASKS[name], next(iter(final)).steps, len({run.seed for run in final})
    printed = Table(title=f"{name}: {steps} steps of {task.batch} rows, {seeds} seeds")
    fixed = ("method", "lr, decay", "training loss", "held-out loss")
    for column in (*fixed, *task.columns):
        printed.add_column(column, justify="left" if column == "method" else "right", no_wrap=column in fixed)
    for method in task.methods:
        runs = [run for run in final if run.method == method]
        losses = [[final[run].train for run in runs], [final[run].held_out for run in runs]]
        numbers = [statistics.fmean(COLUMNS[column](final[run]) for run in runs) for column in task.columns]
        printed.add_row(
            method,
            f"{runs[0].lr:g}, {runs[0].weight_decay:g}",
            *(f"{statistics.fmean(values):.3f} ± {deviation(values):.3f}" for values in losses),
            *(f"{number:.2f}" for number in numbers),
        )
    return printed


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def draw(final: dict[str, dict[Run, Outcome]], file: Path) -> None:
    """Left: how unequal the neurons of the first network are. Right: losses of the GPT-2. Means over the seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for panel, name in ((left, BYTES), (right, GPT2)):
        for method in TASKS[name].methods:
            outcomes = [outcome for run, outcome in final[name].items() if run.method == method]
            if panel is left:
                angles = torch.tensor([outcome.angles for outcome in outcomes]).mean(0)
                panel.plot(100 * QUANTILES, angles / angles.median(), label=method)
            else:
                losses = torch.tensor([outcome.losses for outcome in outcomes]).mean(0)
                panel.plot(torch.linspace(0, 100, len(losses)), losses, label=method)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    left.set(title=BYTES, xlabel="neurons, in order (%)", ylabel="angle / median angle", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    right.set(title=GPT2, xlabel="steps (%)", ylabel="training loss")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def records(outcomes: dict[Run, Outcome]) -> list[dict[str, Any]]:
    """For JSON, without the series of the figure."""
    rows = [{**asdict(run), **asdict(outcome)} for run, outcome in outcomes.items()]
    return [{key: value for key, value in row.items() if key not in ("task", "angles", "losses")} for row in rows]


def machine() -> dict[str, str | int]:
    """What the numbers depend on: the corpus is that of the Python version."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, besides those that tune it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trainings at a time, of one thread each")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/weight_standardization.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/weight_standardization.png"))
    arguments = parser.parse_args()

    start, final = time.monotonic(), {}
    result: dict[str, Any] = {"machine": machine(), "workers": arguments.workers}
    for name, task in TASKS.items():
        steps = max(round(arguments.scale * task.steps), 2)
        settings = product(task.methods, task.learning_rates, task.weight_decays)
        tries = [Run(name, method, lr, decay, 0, steps) for method, lr, decay in settings]
        grid = train_all(tries, arguments.workers, f"{name}: tuning")
        best = [
            min((run for run in grid if run.method == method), key=lambda run: grid[run].held_out)
            for method in task.methods
        ]
        runs = [replace(run, seed=seed) for run in best for seed in range(1, 1 + arguments.seeds)]
        final[name] = train_all(runs, arguments.workers, name)
        Console(width=140).print(table(name, final[name]))
        result[name] = {"grid": records(grid), "runs": records(final[name])}
    draw(final, arguments.figure)
    result["minutes"] = (time.monotonic() - start) / 60
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
