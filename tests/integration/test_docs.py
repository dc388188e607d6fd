"""The documentation says what the code does: blocks run, commands parse, tables and messages are those of the code."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import shlex
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import hf_rotational
import trainer_patches
from hf_rotational import cli
from hf_rotational.optim.optimizer import RotationalOptimizer
from tests.hub import loopback
from tests.hub.conftest import hub, sketched  # noqa: F401  # the page about the Hub gets one

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {page.relative_to(ROOT).as_posix(): page for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
EXAMPLES = {file.name: file for file in sorted((ROOT / "examples").glob("*.py"))}

BLOCK = re.compile(r"^(?P<not_run><!-- not run: .+? -->\n)? *```(?P<language>\w+)\n(?P<code>.*?)^ *```$", re.M | re.S)
ELIDED = re.compile(r"\.\.\., |, \.\.\.(?=\))")
"""In a call: arguments that the reader has already."""

SCRIPT_ARGUMENTS = {"--model_name_or_path", "--train_file", "--validation_file"}
"""What stands for a script's own arguments."""


def blocks(page: Path, language: str) -> list[str]:
    """Code of a page, but for blocks that a comment before them exempts: ``<!-- not run: the reason -->``."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(block["code"]) for block in found if block["language"] == language and not block["not_run"]]


def stand_ins() -> dict[str, Any]:
    """What the pages take for granted, tiny: a model, data, a trainer, and everything the package exports."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=10, max_position_embeddings=8))
    words = Tokenizer(WordLevel({str(number): number for number in range(10)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1")
    dataset = datasets.Dataset.from_dict({"input_ids": [[2, 3, 4]] * 4, "labels": [0, 1] * 2})

    def trainer(model: Any = model, args: Any = None, **given: Any) -> Trainer:
        return Trainer(model, args, **{"train_dataset": dataset, **given})

    return {
        **{name: getattr(hf_rotational, name) for name in hf_rotational.__all__},
        "Trainer": trainer,
        "TrainingArguments": TrainingArguments,
        "args": hf_rotational.RotationalTrainingArguments(output_dir="out", max_steps=1),
        "dataset": dataset,
        "fully_shard": lambda model: model,  # on one device there is nothing to shard
        "get_model_state_dict": get_model_state_dict,
        "groups": hf_rotational.plan(model).parameter_groups(),
        "model": model,
        "options": StateDictOptions(),
        "raw_state_dicts": importlib.import_module("hf_rotational.standardize").raw_state_dicts,
        "tokenizer": tokenizer,
        "torch": torch,
        "trainer": trainer(),
    }


@pytest.mark.parametrize("page", [name for name, page in PAGES.items() if blocks(page, "python")])
def test_python_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = stand_ins()
    if page == "README.md":
        # Folders of these names go before the Hub.
        for save in (namespace["model"].save_pretrained, namespace["tokenizer"].save_pretrained):
            save("google-bert/bert-base-uncased")
        Path("stanfordnlp/sst2").mkdir(parents=True)
        Path("stanfordnlp/sst2/train.csv").write_text("sentence,label\n2 3,0\n4 5,1\n")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if page == "docs/hub.md":
        monkeypatch.setattr(loopback, "USER", "me")
        request.getfixturevalue("hub")
    with contextlib.ExitStack() as undo:
        undo.callback(trainer_patches.revert)
        for number, code in enumerate(blocks(PAGES[page], "python"), start=1):
            exec(compile(ELIDED.sub("", code), f"{page}, block {number}", "exec"), namespace)


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command of a console block; what is printed there begins with a name and a colon."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and not words[0].endswith(":"):
            yield words


class Parsed(Exception):
    """The arguments were understood."""


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a command has arguments that do not exist."""
    program, *rest = (word for word in words if word != "...")
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        target, *settings = rest
        assert target in targets
        for setting in settings:
            name, _, value = setting.partition("=")
            assert re.search(rf"^{name} *\?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            if name == "ARGS":
                check_command(["hf-rotational", "demo", *shlex.split(value)], monkeypatch)
    elif "trainer_patches" in rest or rest[0] == "run":
        known = {*options_of_patched_scripts(), *SCRIPT_ARGUMENTS}
        script = next(place for place, word in enumerate(rest) if word.endswith(".py"))
        assert {word for word in rest[script:] if word.startswith("--")} <= known
        assert all((ROOT / word).is_file() for word in rest[:script] if word.endswith(".yaml"))
    elif program == "hf-rotational":
        original = ArgumentParser.parse_args

        def parse(parser: ArgumentParser, *arguments: Any) -> Namespace:
            return Namespace(**{**vars(original(parser, *arguments)), "run": lambda _: None})

        with monkeypatch.context() as patch:
            patch.setattr(ArgumentParser, "parse_args", parse)
            cli.main(rest)
    elif program == "python" and rest[0] == "-m":
        assert find_spec(rest[1]) is not None
    elif program == "python" and Path(rest[0]).name not in EXAMPLES:
        assert (ROOT / rest[0]).is_file()
    elif program == "python":
        example = importlib.import_module(f"examples.{Path(rest[0]).stem}")
        with monkeypatch.context() as patch:
            patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", lambda self: parsed(self, rest[1:]))
            with pytest.raises(Parsed):
                example.main()
    else:
        assert program in ("accelerate", "hf", "pip"), f"nobody checks {shlex.join(words)}"


def parsed(parser: HfArgumentParser, words: list[str]) -> None:
    parser.parse_args(words)
    raise Parsed


@cache
def options_of_patched_scripts() -> frozenset[str]:
    with trainer_patches.patched():
        return frozenset(HfArgumentParser(TrainingArguments)._option_string_actions)


@pytest.mark.parametrize("page", [name for name, page in PAGES.items() if blocks(page, "console")])
def test_console_blocks_have_commands_and_arguments_that_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in blocks(PAGES[page], "console"):
        for words in commands(text):
            check_command(words, monkeypatch)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_usage_of_an_example_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ast.get_docstring(ast.parse(EXAMPLES[name].read_text(encoding="utf-8"))) or ""
    usage = re.search(r"^    python .*?(?=\n\n)", text, re.M | re.S)
    assert usage is not None
    for words in commands(textwrap.dedent(usage[0])):
        check_command(words, monkeypatch)


@pytest.mark.parametrize("page", ["adamw", "sgd", "lion", "adam", "index"])
def test_tables_of_arguments_list_each_with_its_default(page: str) -> None:
    shared = inspect.signature(RotationalOptimizer.__init__).parameters
    classes = {name.removeprefix("Rotational").lower(): name for name in hf_rotational.__all__}
    own = {} if page == "index" else inspect.signature(getattr(hf_rotational, classes[page]).__init__).parameters
    parameters = own or {name: p for name, p in shared.items() if p.kind is p.KEYWORD_ONLY}
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    text = (DOCS / "optimizers" / f"{page}.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.M))
    assert {name: ast.literal_eval(value) for name, value in table.items()} == defaults


def rendered(node: ast.AST | None, known: dict[str, ast.AST]) -> str:
    """The text an expression makes, with an ellipsis for what depends on more than the lines before."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        return rendered(known.get(node.value.id), known) if isinstance(node.value, ast.Name) else "…"
    return "".join(rendered(part, known) for part in node.values) if isinstance(node, ast.JoinedStr) else "…"


def messages() -> Iterator[str]:
    """What the package raises and warns of, but for the demo, whose messages name its arguments."""
    for package in ("hf_rotational", "trainer_patches"):
        for file in sorted((ROOT / package).rglob("*.py")):
            if "demo" in file.parts:
                continue
            tree = ast.parse(file.read_text(encoding="utf-8"))
            strings = {
                node.targets[0].id: node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                if isinstance(node.value, ast.JoinedStr)
            }
            for node in ast.walk(tree):
                call = node.exc if isinstance(node, ast.Raise) else node
                if not isinstance(call, ast.Call) or not call.args:
                    continue
                name = ast.unparse(call.func)
                # What says why there is no kernel is quoted by the error that a user meets.
                is_error = isinstance(node, ast.Raise) and name not in ("AttributeError", "KernelUnavailable")
                if is_error or name in ("logger.warning", "say", "self._say"):
                    yield rendered(call.args[0], strings)


def test_troubleshooting_has_every_message_and_no_other() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    entries = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    patterns = {
        entry: re.compile(re.escape(entry).replace(r"\.\.\.", ".*").replace("\\ ", " "), re.S) for entry in entries
    }
    said = {message for message in messages() if message.strip("…: ")}
    unexplained = sorted(message for message in said if not any(p.search(message) for p in patterns.values()))
    unsaid = sorted(entry for entry, pattern in patterns.items() if not any(map(pattern.search, said)))
    assert (unexplained, unsaid) == ([], [])
