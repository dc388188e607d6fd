"""What a step of every optimizer costs on a CPU, against torch's fused AdamW (docs/speed.md).

    python -m benchmarks.optimizer_speed            # or: make bench; about ten minutes on two cores
    python -m benchmarks.optimizer_speed --report   # the tables of the results file

Each optimizer takes turns with torch's fused AdamW on the same weights in one process, and the ratio counts, so that
what else the machine does hits both alike: of the medians of processor time on one thread, of the least wall time on
more. How fast memory is changes over minutes where machines are shared, so all of it is measured in several rounds, of
which the median counts. Prints tables and writes benchmarks/results/optimizer_speed.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from benchmarks.memory_traffic import MemoryTraffic
from benchmarks.published_adamw import PublishedRotationalAdamW
from benchmarks.reports import table
from hf_rotational import RotationalAdamW, RotationalLion, RotationalSGD, plan

RESULTS = Path(__file__).parent / "results" / "optimizer_speed.json"
SECONDS, FEWEST, MOST = 2.0, 3, 40  # of turns of a pair, and how many turns
ROUNDS = 3
LR, WEIGHT_DECAY = 1e-4, 0.1


def minilm() -> nn.Module:
    """BERT with the sizes of all-MiniLM-L6-v2."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(**sizes))


def gpt2() -> nn.Module:
    """GPT-2 with 124M parameters, whose neurons are columns."""
    return GPT2LMHeadModel(GPT2Config())


def small() -> nn.Module:
    """A million parameters in 200 tensors."""
    return nn.Sequential(*(nn.Linear(100, 100) for _ in range(100)))


MODELS: dict[str, Callable[[], nn.Module]] = {"MiniLM": minilm, "GPT-2": gpt2, "200 small tensors": small}
BATCHES = {"MiniLM": (16, 64), "GPT-2": (1, 128)}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return plan(model).parameter_groups(weight_decay=WEIGHT_DECAY)


def all_of(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def plain(cls: Callable[..., Any], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: cls(all_of(model), lr=LR, **options)


def rotational(cls: Callable[..., Any], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: cls(groups_of(model), lr=LR, weight_decay=WEIGHT_DECAY, **options)


BASELINE = plain(partial(torch.optim.AdamW, fused=True))
FUSED = {
    "RotationalAdamW fused": rotational(RotationalAdamW, backend="fused"),
    "RotationalLion fused": rotational(RotationalLion, backend="fused"),
    "RotationalSGD fused, momentum": rotational(RotationalSGD, backend="fused", momentum=0.9),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch AdamW (a loop)": plain(torch.optim.AdamW),
    "torch AdamW foreach": plain(torch.optim.AdamW, foreach=True),
    "torch SGD fused, momentum": plain(torch.optim.SGD, fused=True, momentum=0.9),
    **FUSED,
    "RotationalAdamW foreach": rotational(RotationalAdamW, backend="foreach"),
    "RotationalAdamW eager": rotational(RotationalAdamW, backend="eager"),
    "published RotationalAdamW": plain(PublishedRotationalAdamW, weight_decay=WEIGHT_DECAY),
    "reads and writes of RotationalAdamW": partial(MemoryTraffic, moments=2),
    "reads and writes of RotationalSGD, RotationalLion": partial(MemoryTraffic, moments=1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["torch Muon (matrices alone)"] = lambda model: torch.optim.Muon(matrices_of(model), lr=LR)
try:
    from pytorch_optimizer import AdamP, Lion

    OPTIMIZERS["pytorch_optimizer AdamP"] = plain(AdamP)
    OPTIMIZERS["pytorch_optimizer Lion"] = plain(Lion)
except ImportError:
    pass
# A step of it takes seconds, and orthogonalizes matrices that nobody trains with it.
TOO_LONG = {("torch Muon (matrices alone)", "GPT-2"), ("torch Muon (matrices alone)", "MiniLM")}


def peak_mb(step: Callable[[], Any]) -> float | None:
    """Memory that one step takes beside what it finds, in MB; ``None`` where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier step took and gave back would be found
        reset.write_text("5")
        before = kilobytes("VmRSS")
        step()
        return max(kilobytes("VmHWM") - before, 0) / 1024
    except (OSError, AttributeError):
        return None


def take_turns(model: nn.Module, build: Callable[[nn.Module], Any], threads: int) -> dict[str, Any]:
    """Steps of an optimizer and of the baseline on the same weights, in turns."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    optimizer, baseline = build(model), BASELINE(model)
    times: tuple[list[float], list[float]] = ([], [])
    for each in (optimizer, baseline):
        each.step()  # makes the state
    end = time.perf_counter() + SECONDS
    while len(times[0]) < FEWEST or (len(times[0]) < MOST and time.perf_counter() < end):
        for series, each in zip(times, (optimizer, baseline), strict=True):
            start = clock()
            each.step()
            series.append(clock() - start)
    own, its = (median(series) if threads == 1 else min(series) for series in times)
    return {"ms": 1e3 * own, "ratio": own / its, "turns": len(times[0]), "temporaries_mb": peak_mb(optimizer.step)}


def steps() -> Iterator[dict[str, Any]]:
    """The table: every optimizer on one thread, the fused ones on two."""
    for name, build_model in MODELS.items():
        torch.manual_seed(0)
        model = build_model()
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        for threads, optimizers in ((1, {"torch AdamW fused": BASELINE, **OPTIMIZERS}), (2, FUSED)):
            torch.set_num_threads(threads)
            for optimizer, build in optimizers.items():
                if (optimizer, name) not in TOO_LONG and threads <= (os.cpu_count() or 1):
                    yield {
                        "model": name,
                        "threads": threads,
                        "optimizer": optimizer,
                        **take_turns(model, build, threads),
                    }


def training_step_ms(name: str) -> tuple[float, float]:
    """Forward and backward pass on one thread, median, and the baseline's step, measured after it."""
    torch.set_num_threads(1)
    model, times = MODELS[name](), []
    tokens = torch.randint(10_000, BATCHES[name], generator=torch.Generator().manual_seed(0))
    labels = tokens if name == "GPT-2" else torch.zeros(len(tokens), dtype=torch.long)
    for _ in range(4):
        start = time.thread_time()
        model(input_ids=tokens, labels=labels).loss.backward()
        times.append(time.thread_time() - start)
    return 1e3 * median(times[1:]), take_turns(model, BASELINE, 1)["ms"]


def shares(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What steps take of a whole training step, from their ratios, which do not change with the machine's speed."""
    for model in BATCHES:
        passes, baseline = training_step_ms(model)
        for row in rows:
            if row["model"] == model and row["threads"] == 1:
                step = row["ratio"] * baseline
                share = step / (step + passes)
                yield {"model": model, "optimizer": row["optimizer"], "share": share, "passes_ms": passes}


def first_use_seconds() -> float:
    """Time to build and load the kernel, wall."""
    program = (
        "import time; from hf_rotational.optim.kernels.build import kernel; "
        "start = time.perf_counter(); kernel(); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
    return float(done.stdout)


def measure() -> dict[str, Any]:
    """Everything, as the results file has it; says how far it is."""
    rounds: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for number in range(ROUNDS):
        for row in steps():
            rounds.setdefault((row["model"], row["threads"], row["optimizer"]), []).append(row)
            label = f"{number + 1}: {row['optimizer']}, {row['model']}, {row['threads']} threads"
            print(f"{label:<68} {row['ms']:9.2f} ms {row['ratio']:6.2f} x", flush=True)
    rows = []
    for each in rounds.values():
        ratios = sorted(row["ratio"] for row in each)
        rows.append({**next(row for row in each if row["ratio"] == ratios[len(each) // 2]), "rounds": ratios})
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {"machine": machine, "steps": rows, "shares": [*shares(rows)], "first_use_seconds": first_use_seconds()}


def report(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of docs/speed.md."""
    lines = list(dict.fromkeys((row["optimizer"], row["threads"]) for row in result["steps"]))
    cells = {(row["optimizer"], row["threads"], row["model"]): row for row in result["steps"]}

    def ratios() -> Iterator[tuple[str, ...]]:
        for optimizer, threads in lines:
            by_model = [cells.get((optimizer, threads, model)) for model in MODELS]
            memory = (cells.get((optimizer, threads, "GPT-2")) or {}).get("temporaries_mb")
            times = ("" if row is None else f"{row['ratio']:.2f}" for row in by_model)
            yield optimizer, str(threads), *times, "" if memory is None else f"{memory:.0f}"

    yield table("Time of one step", ("", "threads", *MODELS, "temporaries on GPT-2, MB"), ratios())

    def ranges() -> Iterator[tuple[str, ...]]:
        for optimizer, threads in lines:
            if optimizer in FUSED or optimizer.startswith("reads and writes"):
                ratios = (cells[optimizer, threads, model]["rounds"] for model in MODELS)
                yield optimizer, str(threads), *(f"{least:.2f} to {most:.2f}" for least, *_, most in ratios)

    yield table("The least and the most of the rounds", ("", "threads", *MODELS), ranges())
    parts = {(row["optimizer"], row["model"]): row["share"] for row in result["shares"]}
    optimizers = dict.fromkeys(row["optimizer"] for row in result["shares"])
    yield table(
        "Share of a training step",
        ("", *(f"{model}, {rows} x {tokens} tokens" for model, (rows, tokens) in BATCHES.items())),
        (
            (
                optimizer,
                *(f"{parts[optimizer, model]:.1%}" if (optimizer, model) in parts else "" for model in BATCHES),
            )
            for optimizer in optimizers
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing: the tables of what there is")
    if not parser.parse_args().report:
        RESULTS.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    console = Console(width=200)
    for printed in report(result):
        console.print(printed)
    console.print(f"Building the kernel at its first use: {result['first_use_seconds']:.1f} s")


if __name__ == "__main__":
    main()
