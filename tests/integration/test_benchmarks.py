"""The training experiments train what is missing, once, and report what their files hold."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import adamw_angle, fine_tuning, fine_tuning_more, need_for_warmup, reports, training, training_tasks
from benchmarks.reports import Finished, differences, paired_table, student_95
from benchmarks.training import Method, Results, Run, grid, optimizer_of, train
from benchmarks.training_tasks import Classification, Images, LanguageModel, LoraClassification
from examples.paper import adam_l2_balance, imbalanced_rotation, lr_times_weight_decay, sensitivity
from hf_rotational import RotationalAdamW, plan
from hf_rotational.demo.model import load_classifier, load_tokenizer

TINY = LanguageModel(width=16, depth=1, vocabulary=256, length=16, rows=2, held_out_rows=4)
WORDS = ("red", "green", "blue", "one", "two", "three", "never")
PRETRAINING = (need_for_warmup, lr_times_weight_decay, adam_l2_balance, imbalanced_rotation, sensitivity)
SCRIPTS = (*PRETRAINING, fine_tuning, fine_tuning_more)
RATES = (1e-3, 1e-2)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Classification:
    """A model of one layer, and texts that say their label."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: index for index, word in enumerate(("[UNK]", "[PAD]", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), pad_token_id=1, **sizes)).save_pretrained(folder)
    used = WORDS[:-1]
    rows = [f"{first} {second},{first}\n" for first in used for second in used]
    file = folder / "train.csv"
    file.write_text("text,label\n" + "".join(rows))
    return Classification(model=str(folder), train_file=str(file), validation_file=str(file), length=4, rows=4)


def shrink(script: ModuleType, monkeypatch: pytest.MonkeyPatch, bert: Classification) -> tuple[str, ...]:
    """Makes a script's tasks tiny; returns the options that it takes besides."""
    if script is fine_tuning_more:
        images = Images(width=16, depth=1, heads=2, pretraining_steps=2, rows=4)
        tasks = {Classification: bert, LoraClassification: LoraClassification(**vars(bert)), Images: images}
        tiny = {
            title: replace(each, task=tasks[type(each.task)], learning_rates=RATES, steps=4)
            for title, each in script.EXPERIMENTS.items()
        }
        monkeypatch.setattr(script, "EXPERIMENTS", tiny)
        return ()
    monkeypatch.setattr(script, "STEPS", 4)
    monkeypatch.setattr(script, "LEARNING_RATES", RATES)
    if script is fine_tuning:
        monkeypatch.setattr(script, "DETAIL_RATES", RATES)
        return "--details", "--model", str(bert.model), "--train_file", str(bert.train_file)
    monkeypatch.setattr(script, "TASK", TINY)
    return ()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bert: Classification) -> Callable[..., tuple[Path, Path]]:
    """Runs a script on tiny tasks and two learning rates; returns its files."""

    def run(script: ModuleType, *options: str) -> tuple[Path, Path]:
        results, figure = tmp_path / "results.json", tmp_path / "figure.png"
        files = ("--results", str(results), "--figure", str(figure))
        options = (*options, *shrink(script, monkeypatch, bert))
        monkeypatch.setattr(sys, "argv", ["script", "--workers", "1", *files, *options])
        script.main()
        return results, figure

    return run


def rows_of(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["runs"]
    return rows


def methods_of(script: ModuleType) -> set[str]:
    """Names of all that a script trains."""
    if script is fine_tuning_more:
        return {f"{title}: {name}" for title, each in script.EXPERIMENTS.items() for name in each.methods}
    return {*script.METHODS, *getattr(script, "DETAILS", ())}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.split(".")[-1])
def test_a_script_trains_reports_and_draws_every_method(
    script: ModuleType, start: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    results, figure = start(script, "--seeds", "1")

    printed = capsys.readouterr().out
    assert figure.stat().st_size > 0
    rows = rows_of(results)
    assert {(row["name"], row["lr"]) for row in rows} == {(name, lr) for name in methods_of(script) for lr in RATES}
    assert all(math.isfinite(row["outcome"]["evaluations"][-1]["loss"]) for row in rows)
    for name in methods_of(script) - getattr(script, "DETAILS", {}).keys():  # which are told as differences
        losses = [row["outcome"]["evaluations"][-1]["loss"] for row in rows if row["name"] == name]
        line = "| ".join(f"{loss:.3f} " for loss in losses)
        assert any(name.rpartition(": ")[2] in row and line in row for row in printed.splitlines())


def test_a_gpu_scale_run_trains_on_all_installed_sources(
    start: Callable[..., tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [tmp_path / f"{index}.py" for index in range(20)]
    for file in files:
        file.write_text(f"print('{file.name}')\n" * 20)
    monkeypatch.setattr(training_tasks, "installed_files", lambda: tuple(files))
    monkeypatch.setattr(need_for_warmup, "GPU_LEARNING_RATES", RATES)
    sizes = {"width": 16, "depth": 1, "heads": 2, "vocabulary": 260, "length": 16, "rows": 2, "steps": 40}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    results, figure = start(need_for_warmup, "--scale", "gpu", "--device", "cpu", "--seeds", "1", *options)

    assert figure.stat().st_size > 0
    rows = rows_of(results)
    assert {(row["name"], row["lr"]) for row in rows} == {
        (name, lr) for name in need_for_warmup.GPU_METHODS for lr in RATES
    }
    assert all(row["outcome"]["evaluations"][-1]["loss"] < math.log(260) for row in rows)  # it has learned something
    assert "Median step" in capsys.readouterr().out


def test_a_scale_has_files_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reports, "ROOT", tmp_path)
    for options, name in ((), "need_for_warmup.json"), (("--scale", "gpu"), "need_for_warmup_gpu.json"):
        monkeypatch.setattr(sys, "argv", ["script", "--report", *options])
        with pytest.raises(SystemExit):
            need_for_warmup.main()
        assert f"{tmp_path / 'benchmarks' / 'results' / name}: none of the" in capsys.readouterr().err


def test_an_image_model_starts_from_its_checkpoint_with_a_new_head() -> None:
    task = Images(width=16, depth=1, heads=2, pretraining_steps=2)
    one, other, stored = task.build(1).state_dict(), task.build(2).state_dict(), training_tasks.pretrained_weights(task)
    body = [name for name in stored if "classifier" not in name]
    assert len(body) == len(stored) - 2
    assert all(torch.equal(one[name], stored[name]) and torch.equal(other[name], stored[name]) for name in body)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    train, held_out = training_tasks.digits(5)
    assert len(train["labels"]) == pytest.approx(4 * len(held_out["labels"]), abs=4)
    assert set(train["labels"].tolist()) == set(held_out["labels"].tolist()) == set(range(5))


def test_lion_without_rotation_takes_the_sign_of_its_interpolated_momentum(bert: Classification) -> None:
    model, lr, (beta1, beta2) = bert.build(0), 1e-3, (0.9, 0.99)
    optimizer = optimizer_of(model, Method("lion", weight_decay=0.1), lr)
    weight = model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight")
    expected, momentum, batches = weight.detach().clone(), torch.zeros_like(weight), bert.batches(0)
    for _ in range(3):
        bert.loss(model, next(batches)).backward()
        expected = (1 - lr * 0.1) * expected - lr * (beta1 * momentum + (1 - beta1) * weight.grad).sign()
        momentum = beta2 * momentum + (1 - beta2) * weight.grad
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("page", ["evidence.md", "paper.md"])
def test_tables_of_the_docs_are_those_of_the_results(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (training.ROOT / "docs" / page).read_text("utf-8")
    scripts = {script.__name__: script for script in SCRIPTS}
    commands = [shlex.split(line, comments=True)[2:] for line in text.splitlines() if line.startswith("python -m ")]
    monkeypatch.chdir(training.ROOT)
    for script, *arguments in commands:
        if script in scripts and "gpu" not in arguments:
            given = [*arguments, "--report", "--figure", str(tmp_path / "figure.png")]
            monkeypatch.setattr(sys, "argv", [script, *given])
            scripts[script].main()
    printed = {cells(line) for line in capsys.readouterr().out.splitlines()}
    assert printed
    for section in text.split("\n## ")[1:]:  # what comes before is told in words of its own
        for line in section.splitlines():
            assert not line.startswith("|") or set(line) <= set("|-: ") or cells(line) in printed


def test_the_table_of_adamws_angle_is_that_of_its_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["adamw_angle", "--report"])
    adamw_angle.main()
    printed = {cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| b1")}
    page = (training.ROOT / "docs" / "equilibrium.md").read_text("utf-8")
    assert len(printed) == 6
    assert printed <= {cells(line) for line in page.splitlines()}


def test_adamws_first_updates_are_as_large_as_the_learning_rate(
    monkeypatch: pytest.MonkeyPatch, bert: Classification
) -> None:
    monkeypatch.setattr(adamw_angle, "STEPS", 3)
    monkeypatch.setattr(adamw_angle, "Classification", lambda: bert)
    first, *later = adamw_angle.measure(0.9, 1e-3, seed=0)
    assert first == pytest.approx(1.0, abs=0.1)  # Adam divides by a little more than a root
    assert all(size < 1.0 for size in later)


def cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().split("|"))


def test_runs_in_the_file_are_not_trained_again(
    start: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, trained = need_for_warmup, []
    monkeypatch.setattr(training, "train", lambda run: trained.append(run) or train(run))
    monkeypatch.setattr(script, "METHODS", dict(list(script.METHODS.items())[:2]))

    results, figure = start(script, "--seeds", "1")
    first, report = rows_of(results), capsys.readouterr().out.partition("Held-out")[2]
    assert [run.seed for run in trained] == [0] * 4

    figure.unlink()
    start(script, "--seeds", "1", "--report")
    assert capsys.readouterr().out.partition("Held-out")[2] == report
    assert figure.exists()

    start(script, "--seeds", "2")
    assert [run.seed for run in trained] == [0] * 4 + [1] * 4
    assert rows_of(results)[:4] == first

    start(script, "--seeds", "3", "--minutes", "0")
    assert len(trained) == len(rows_of(results)) == 8


def test_a_report_of_nothing_says_so(
    start: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        start(sensitivity, "--report")
    assert stopped.value.code == 1
    assert f"none of the {len(sensitivity.METHODS) * 2 * 3} runs has been trained" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_stored_and_comes_back_as_infinite(tmp_path: Path) -> None:
    run = Run("a", TINY, Method(), 1.0, 0, 1)
    outcome = {"evaluations": [{"step": 1, "loss": math.nan}], "losses": [math.inf], "loss": 1.23456789, "seconds": 1.0}
    Results(tmp_path / "results.json").add(run, outcome)
    stored = Results(tmp_path / "results.json")
    assert stored.outcome(run) == {
        "evaluations": [{"step": 1, "loss": math.inf}],
        "losses": [math.inf],
        "loss": 1.2346,
        "seconds": 1.0,
    }
    assert stored.outcome(replace(run, name="another name")) is not None
    for change in ({"lr": 2.0}, {"seed": 1}, {"steps": 2}, {"method": Method(warmup=0.1)}, {"task": LanguageModel()}):
        assert stored.outcome(replace(run, **change)) is None


def test_a_training_is_what_a_loop_written_out_computes() -> None:
    """AdamW with warmup and decay of matrices only, against torch alone."""
    run = Run("AdamW", TINY, Method("adamw", 0.5, 0.1, {"betas": (0.9, 0.95)}), 1e-2, 3, 4, 2)
    model, batches = TINY.build(3), TINY.batches(3)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, evaluations = torch.optim.AdamW(groups, betas=(0.9, 0.95)), []
    for step, share in enumerate((0.0, 0.5, 1.0, 0.5), start=1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * share
        optimizer.zero_grad()
        TINY.loss(model, next(batches)).backward()
        optimizer.step()
        if step in (2, 4):
            with torch.no_grad():
                evaluations.append({"step": step, **TINY.evaluate(model)})
    # The fused and the plain implementation round differently.
    assert train(run)["evaluations"] == [
        {"step": each["step"], "loss": pytest.approx(each["loss"], rel=1e-5)} for each in evaluations
    ]


@pytest.mark.slow
def test_a_pool_of_processes_trains_the_same(tmp_path: Path) -> None:
    runs = grid(TINY, {"a": Method(), "b": Method("rotational_adamw")}, (1e-2,), seeds=2, steps=2)
    stored = Results(tmp_path / "results.json")
    training.train_missing(runs, stored, workers=2, minutes=math.inf)
    for run in runs:
        assert stored.outcome(run)["evaluations"][0]["loss"] == pytest.approx(
            train(run)["evaluations"][0]["loss"],
            rel=1e-4,  # stored to five digits
        )


def test_tokens_that_do_not_occur_change_nothing(bert: Classification) -> None:
    """Loss and gradients are those of the whole model."""
    tokenizer, names = load_tokenizer(bert.source), sorted(WORDS[:-1])
    whole, batch = load_classifier(bert.source, tokenizer, names, seed=5), next(bert.batches(0))
    small = bert.build(5)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(["[PAD]", *WORDS[:-1]])])[0]
    assert small.get_input_embeddings().weight.shape[0] == len(ids) < len(tokenizer)
    losses = []
    for model, rows in ((small, batch), (whole, {**batch, "input_ids": ids.sort().values[batch["input_ids"]]})):
        model.eval()
        losses.append(bert.loss(model, rows))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [dict(model.named_parameters()) for model in (small, whole)]
    for name, parameter in gradients[0].items():
        expected = gradients[1][name].grad
        torch.testing.assert_close(
            parameter.grad, expected[ids.sort().values] if name.endswith("word_embeddings.weight") else expected
        )


def test_weights_in_two_pieces_compute_the_same_and_turn_at_two_rates() -> None:
    whole, pieces = TINY.build(0), imbalanced_rotation.InPieces(**vars(TINY)).build(0)
    batch = next(TINY.batches(0))
    torch.testing.assert_close(TINY.loss(pieces, batch), TINY.loss(whole, batch), rtol=0, atol=0)
    assert len(plan(pieces).rotating) == 2 * len(plan(whole).rotating)

    before = {name: module.weight.detach().clone() for name, module in modules(pieces).items()}
    optimizer = optimizer_of(pieces, imbalanced_rotation.METHODS["a tenth 10 x faster"], lr=1e-3)
    assert isinstance(optimizer, RotationalAdamW)
    TINY.loss(pieces, batch).backward()
    optimizer.step()
    angle = min(optimizer.target_rotation(group) for group in optimizer.param_groups if group["rotational"])
    for name, module in modules(pieces).items():
        # Conv1D: neurons are columns. A first step has exactly its target as the tangent of its angle.
        turned = torch.linalg.vector_norm(module.weight - before[name], dim=0) / before[name].norm(dim=0)
        expected = torch.where(torch.arange(len(turned)) % 10 == 9, 10 * angle, angle).atan()
        torch.testing.assert_close(2 * (turned / 2).asin(), expected, rtol=1e-3, atol=0)


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Conv1D")}


def finished(losses: dict[str, dict[float, list[float]]], steps: int = 1) -> Finished:
    """As if these had been trained: last losses of each method and learning rate, by seed."""
    return Finished(
        (
            Run(name, TINY, Method(), lr, seed, steps),
            {"evaluations": [{"step": 1, "loss": loss + 1}, {"step": 2, "loss": loss}], "loss": loss},
        )
        for name, by_lr in losses.items()
        for lr, values in by_lr.items()
        for seed, loss in enumerate(values)
    )


def test_differences_leave_out_what_a_seed_does_to_all() -> None:
    # Baseline, and two methods that are 1 and 2 above it; seeds shift all by 5; what is left is +-0.1.
    losses = {fine_tuning.BASELINE: [1.1, 5.9], "a": [1.9, 7.1], "b": [3.0, 8.0]}
    runs = finished({name: {0.1: values} for name, values in losses.items()})
    result, half_width = differences(runs, fine_tuning.BASELINE, 0.1, "loss")
    assert result == pytest.approx({fine_tuning.BASELINE: 0.0, "a": 1.0, "b": 2.0})
    # Residuals +-(0.1, 0.1, 0) over 2 degrees of freedom: 0.04/2; the interval of a difference of two means of 2.
    assert half_width == pytest.approx(student_95(2) * math.sqrt(0.02) * math.sqrt(2 / 2))


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.7764), (8, 2.3060), (20, 2.0860), (100, 1.9840)])
def test_student_quantile_is_that_of_tables(freedom: int, quantile: float) -> None:
    assert student_95(freedom) == pytest.approx(quantile, rel=0.02)


def test_paired_differences_are_of_the_seeds_that_both_have() -> None:
    runs = finished({"reference": {0.1: [1.0, 2.0, 9.0], 0.2: [1.0]}, "a": {0.1: [1.5, 2.7]}})
    columns = [list(column.cells) for column in paired_table("", runs, ["a", "not trained"], "reference").columns]
    assert columns == [["a"], ["+42.5% ± 10.6%"], ["2"]]  # 50 % and 35 %


def test_good_range_is_interpolated_between_learning_rates() -> None:
    # 2 % above the best is reached halfway between 1 and 10, and between 10 and 100 after a quarter.
    losses = {"a": {1.0: [104.0], 10.0: [100.0], 100.0: [108.0]}}
    assert need_for_warmup.good_range(finished(losses), "a") == pytest.approx(10 ** (0.5 + 0.25))
    diverged = {"a": {1.0: [101.0], 10.0: [100.0], 100.0: [math.inf]}}
    assert need_for_warmup.good_range(finished(diverged), "a") == pytest.approx(10.0)


def test_steps_to_a_loss_are_interpolated_on_the_mean_curve() -> None:
    runs = finished({"a": {1.0: [2.0, 4.0]}})  # the mean is 4 after step 1 and 3 after step 2
    assert need_for_warmup.steps_to(runs, "a", 1.0, 3.25) == pytest.approx(1.75)
    assert need_for_warmup.steps_to(runs, "a", 1.0, 2.9) == math.inf


def test_a_grid_has_all_of_a_seed_first_and_methods_that_depend_on_the_learning_rate() -> None:
    runs = grid(TINY, {"a": Method(), "b": lambda lr: Method(weight_decay=lr)}, (1.0, 2.0), seeds=2, steps=1)
    assert [(run.seed, run.lr, run.name, run.method.weight_decay) for run in runs[:4]] == [
        (0, 1.0, "a", 0.0),
        (0, 1.0, "b", 1.0),
        (0, 2.0, "a", 0.0),
        (0, 2.0, "b", 2.0),
    ]
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
