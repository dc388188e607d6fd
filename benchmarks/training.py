"""The one core of all training experiments: a run as plain values, the loop that trains it, and a file that grows.

An experiment is a list of runs and a report. Its command (``benchmarks.reports``) trains what its results file lacks,
run by run on a pool of processes of one thread each, and writes the file after each: stop it and start it again, or ask
for more seeds, and it continues where it was. Table and figure are drawn from the file alone (``--report``).

    python -m benchmarks.fine_tuning --seeds 5 --minutes 60   # starts no run after an hour
    python -m benchmarks.fine_tuning --report
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from rich.progress import Progress
from torch import Tensor, nn
from transformers import get_scheduler, set_seed

from hf_rotational import RotationalLion, RotationalOptimizerFactory
from hf_rotational.optim.factory import OPTIMIZERS, decays_as_trainer

ROOT = Path(__file__).parent.parent


def plain_lion(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    return RotationalLion([{**group, "rotational": False} for group in groups], **settings)


PLAIN: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": partial(torch.optim.SGD, fused=True),
    "lion": plain_lion,
}
"""Torch has no Lion: it is ours, with nothing that rotates."""
CURVE = 50
"""Points of a stored training loss curve."""


class Task(Protocol):
    """What is learned: a frozen dataclass of plain values, since it is stored with each run."""

    def build(self, seed: int) -> nn.Module: ...
    def batches(self, seed: int) -> Iterator[Any]: ...
    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out ``loss``, and whatever else there is to say."""
        ...


@dataclass(frozen=True)
class Method:
    """How it is learned, besides the learning rate."""

    optim: str = "adamw"
    """A key of ``PLAIN``, or of the factory's ``OPTIMIZERS``."""
    warmup: float = 0.0
    """Share of the steps; from there the rate falls linearly to 0, as the Trainer's default has it."""
    weight_decay: float = 0.0
    """As the Trainer's: not of biases and norms."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other keyword arguments of the optimizer, or of the factory."""


@dataclass(frozen=True)
class Run:
    """Everything a training depends on. Equal runs give equal numbers on one machine."""

    name: str
    """Of the method, in tables; two names for one method are one run."""
    task: Task
    method: Method
    lr: float
    seed: int
    steps: int
    evaluations: int = 1
    """Evenly spread over the steps, the last after the last."""

    @property
    def values(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        values: dict[str, Any] = asdict(self)
        values["task"]["kind"] = type(self.task).__name__
        return values

    @property
    def key(self) -> str:
        return key_of(self.values)


def key_of(values: Mapping[str, Any]) -> str:
    """Equal for runs that are one and the same."""
    fields = {name: value for name, value in values.items() if name not in ("name", "outcome")}
    return json.dumps(fields, sort_keys=True)


Outcome = Mapping[str, Any]
"""``evaluations`` (each with its ``step``), ``losses`` (of training, ``CURVE`` means), ``loss`` (of training, mean of
the last tenth), ``seconds``, and ``step_seconds`` (the median). A loss that is not finite is infinite."""


def grid(
    task: Task,
    methods: Mapping[str, Method | Callable[[float], Method]],
    learning_rates: Iterable[float],
    *,
    seeds: int,
    steps: int,
    evaluations: int = 1,
) -> list[Run]:
    """All combinations; a method may depend on the learning rate. All of a seed first: an unfinished grid is even."""
    return [
        Run(name, task, method if isinstance(method, Method) else method(lr), lr, seed, steps, evaluations)
        for seed in range(seeds)
        for lr in learning_rates
        for name, method in methods.items()
    ]


def optimizer_of(model: nn.Module, method: Method, lr: float) -> torch.optim.Optimizer:
    """As the Trainer builds it."""
    if method.optim in OPTIMIZERS:
        return RotationalOptimizerFactory()(
            model, optim=method.optim, lr=lr, weight_decay=method.weight_decay, **method.settings
        )
    decays, kept, decayed = decays_as_trainer(model), [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (decayed if decays(name) else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": method.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return PLAIN[method.optim](groups, lr=lr, **method.settings)


def train(run: Run) -> Outcome:
    """One training, in one thread whatever else runs, so that its numbers do not depend on that."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = run.task.build(run.seed)
    set_seed(run.seed)  # dropout
    model.train()
    optimizer = optimizer_of(model, run.method, run.lr)
    schedule = get_scheduler("linear", optimizer, round(run.method.warmup * run.steps), run.steps)
    batches, losses, times, evaluations = run.task.batches(run.seed), [], [], []
    due = {run.steps * part // run.evaluations for part in range(1, run.evaluations + 1)}
    for step in range(1, run.steps + 1):
        started = time.perf_counter()
        loss = run.task.loss(model, next(batches))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))  # waits for a GPU
        times.append(time.perf_counter() - started)
        if step in due:
            model.eval()
            with torch.no_grad():
                evaluations.append({"step": step, **run.task.evaluate(model)})
            model.train()
    return {
        "evaluations": evaluations,
        "losses": [float(part.mean()) for part in torch.tensor(losses).tensor_split(min(CURVE, run.steps))],
        "loss": statistics.fmean(losses[-max(run.steps // 10, 1) :]),
        "seconds": time.perf_counter() - start,
        "step_seconds": statistics.median(times),
    }


class Results:
    """What has been trained, in a JSON file that is whole at any time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        content = json.loads(file.read_text("utf-8")) if file.exists() else {"runs": []}
        self.rows: dict[str, dict[str, Any]] = {key_of(row): row for row in content["runs"]}

    def outcome(self, run: Run) -> Outcome | None:
        row = self.rows.get(run.key)
        return None if row is None else finite_or_inf(row["outcome"])

    def add(self, run: Run, outcome: Outcome) -> None:
        """Adds a run and writes the file."""
        self.rows[run.key] = {**run.values, "outcome": none_for_infinite(outcome)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(row, allow_nan=False) for row in self.rows.values())
        draft = self.file.with_suffix(".tmp")
        draft.write_text(f'{{"machine": {json.dumps(machine())},\n"runs": [\n{rows}\n]}}\n', encoding="utf-8")
        os.replace(draft, self.file)


def none_for_infinite(value: Any) -> Any:
    """JSON has no infinity; losses to 5 digits."""
    if isinstance(value, Mapping):
        return {key: none_for_infinite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [none_for_infinite(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def finite_or_inf(value: Any) -> Any:
    """The way back."""
    if isinstance(value, Mapping):
        return {key: finite_or_inf(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite_or_inf(part) for part in value]
    return math.inf if value is None else value


def machine() -> dict[str, str | int]:
    """What the numbers depend on besides the runs: the corpora are those of the Python version."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def train_until(run: Run, deadline: float) -> Outcome | None:
    return train(run) if time.time() < deadline else None


def train_missing(runs: Sequence[Run], results: Results, workers: int, minutes: float) -> None:
    """Trains the runs that ``results`` lack, and adds each as it ends; starts none after so many minutes."""
    missing = list({run.key: run for run in runs if run.key not in results.rows}.values())
    deadline = time.time() + 60 * minutes
    with Progress() as progress:
        bar = progress.add_task(f"{len(missing)} of {len(runs)} runs to train", total=len(missing))
        for run, outcome in outcomes_of(missing, workers, deadline):
            if outcome is not None:
                results.add(run, outcome)
            progress.advance(bar)


def outcomes_of(runs: list[Run], workers: int, deadline: float) -> Iterator[tuple[Run, Outcome | None]]:
    if workers == 1:
        yield from ((run, train_until(run, deadline)) for run in runs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train_until, run, deadline): run for run in runs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)
