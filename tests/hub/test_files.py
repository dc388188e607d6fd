"""Which files of a directory are published, and in what form."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_rotational.errors import UserError
from hf_rotational.hub.files import check_private, checkpoint_files, model_files, stage

PUBLISHED = (
    *("README.md", "rotation.jsonl", "rotation.png", "trainer_state.json", "eval_results.json"),
    *("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "source.spm", "chat_template.jinja"),
    *("additional_chat_templates/tools.jinja", "qformer_tokenizer/tokenizer.json"),
    *("target_vocab.json", "entity_vocab.json", "tekken.json", "alphabet.json", "language_model/unigrams.txt"),
    *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/model.safetensors"),
    *("mine/adapter_config.json", "mine/adapter_model.safetensors"),
)
KEPT_BACK = (
    *("training_args.bin", "optimizer.pt", "pytorch_model.bin", "notes.txt", ".env", "train.log", "script.py"),
    *("generated_predictions.txt", "demo.json", "rotation-report.html", "_rotational_weights.safetensors"),
    *("checkpoint-5/model.safetensors", "runs/events.out.tfevents.1.host.2.0", "adamw/config.json", ".git/config"),
    *("qformer_tokenizer/notes.txt", "additional_chat_templates/.secret", "mine/optimizer.pt", "1_Pooling/notes.txt"),
)


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_a_run_is_published_without_what_else_lies_there(tmp_path: Path) -> None:
    make(tmp_path, *PUBLISHED, *KEPT_BACK)
    assert sorted(model_files(tmp_path, tmp_path)) == sorted(PUBLISHED)


def test_an_adapter_by_any_name_is_a_model(tmp_path: Path) -> None:
    make(tmp_path, "mine/adapter_config.json", "mine/adapter_model.safetensors")
    assert sorted(model_files(tmp_path, tmp_path)) == ["mine/adapter_config.json", "mine/adapter_model.safetensors"]


def test_the_models_own_code_is_published(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors", "modeling_mine.py")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_mine.Mine"}}')
    assert "modeling_mine.py" in model_files(tmp_path, tmp_path)


def test_a_checkpoint_comes_with_the_runs_card(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-5"
    make(checkpoint, "model.safetensors", "config.json", "README.md")
    make(tmp_path, "README.md", "rotation.jsonl", "model.safetensors")
    files = model_files(checkpoint, tmp_path)
    assert files == {
        "model.safetensors": checkpoint / "model.safetensors",
        "config.json": checkpoint / "config.json",
        "README.md": tmp_path / "README.md",
        "rotation.jsonl": tmp_path / "rotation.jsonl",
    }


def test_all_that_a_checkpoint_resumes_from_is_published(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-5"
    resumed = ("optimizer.pt", "rng_state_0.pth", "_rotational_weights.safetensors", "global_step5/mp_rank_00.pt")
    make(checkpoint, *resumed, "training_args.bin", "README.md")
    assert sorted(checkpoint_files(checkpoint, tmp_path)) == sorted(resumed)


@pytest.mark.parametrize("checkpoints", [(), (5, 40, 100)])
def test_a_folder_without_weights(tmp_path: Path, checkpoints: tuple[int, ...]) -> None:
    make(tmp_path, "config.json", *(f"checkpoint-{step}/config.json" for step in checkpoints))
    with pytest.raises(UserError, match=r"holds no weights" + (r".*checkpoint-100\)$" if checkpoints else "")):
        model_files(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "vocab.txt", "additional_chat_templates"])
def test_links_out_of_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    make(run, "config.json", *({"model.safetensors"} - {name}))
    make(outside, "a.jinja", "file")
    (run / name).symlink_to(outside / "file" if "." in name else outside)
    with pytest.raises(UserError, match="link to a file outside"):
        model_files(run, run)


def test_links_out_of_the_directory_are_refused_in_checkpoints(tmp_path: Path) -> None:
    make(tmp_path, "run/checkpoint-5/optimizer.pt", "outside")
    (tmp_path / "run" / "checkpoint-5" / "rng_state.pth").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="link to a file outside"):
        checkpoint_files(tmp_path / "run" / "checkpoint-5", tmp_path / "run")


def test_links_within_it_are_followed_and_others_nobody_asked_for_ignored(tmp_path: Path) -> None:
    run = tmp_path / "real"
    make(run, "checkpoint-5/model.safetensors", "config.json")
    make(tmp_path, "secret")
    (run / "model.safetensors").symlink_to("checkpoint-5/model.safetensors")
    (run / "notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "run").symlink_to(run)  # the directory itself may be one
    files = model_files(tmp_path / "run", tmp_path / "run")
    assert sorted(files) == ["config.json", "model.safetensors"]
    stage(files, tmp_path / "staged")
    assert not (tmp_path / "staged" / "model.safetensors").is_symlink()


def test_paths_are_taken_out_of_configs_and_state(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors")
    written = {
        "config.json": {"_name_or_path": "/data/base", "id2label": {"0": "/m/09x0r"}},
        "adapter_config.json": {"base_model_name_or_path": "/data/base", "r": 4},
        "tokenizer_config.json": {"name_or_path": "owner/base", "added": {"0": {"content": "/usr/x"}}},
        "trainer_state.json": {"best_model_checkpoint": "/out/checkpoint-5", "log_history": [{"loss": 1.5}], "a": None},
    }
    for name, content in written.items():
        (tmp_path / name).write_text(json.dumps(content))
    files = model_files(tmp_path, tmp_path)
    published = {
        name: json.loads(source if isinstance(source, bytes) else source.read_text())
        for name, source in files.items()
        if name in written
    }
    assert published == {
        "config.json": {"_name_or_path": "base", "id2label": {"0": "/m/09x0r"}},
        "adapter_config.json": {"base_model_name_or_path": "base", "r": 4},
        "tokenizer_config.json": written["tokenizer_config.json"],
        "trainer_state.json": {"best_model_checkpoint": "checkpoint-5", "log_history": [{"loss": 1.5}], "a": None},
    }
    assert files["tokenizer_config.json"] == tmp_path / "tokenizer_config.json"  # not rewritten for nothing


def test_what_is_staged_stays_as_it_was(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors", "rotation.jsonl")
    stage(model_files(tmp_path, tmp_path), tmp_path / "staged")
    (tmp_path / "model.safetensors").unlink()
    with (tmp_path / "rotation.jsonl").open("a") as file:
        file.write("more")
    assert {path.name: path.read_text() for path in (tmp_path / "staged").iterdir()} == {
        "model.safetensors": "{}",
        "rotation.jsonl": "{}",
    }


def test_staging_copies_where_nothing_can_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    make(tmp_path, "model.safetensors")
    stage(model_files(tmp_path, tmp_path), tmp_path / "staged")
    assert (tmp_path / "staged" / "model.safetensors").read_text() == "{}"


def test_texts_with_a_token_or_a_path_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-another-form")
    monkeypatch.setenv("HOME", "/home/someone")
    for text, reason in (
        ("hf_" + "a1" * 12, "token"),
        ("secret-of-another-form", "token"),
        ("given-here", "token"),
        (f"ran in {tmp_path}/sub", "folder"),
        (f"{tmp_path}.", "folder"),
        ("see /home/someone/data", "folder"),
    ):
        with pytest.raises(UserError, match=f"README.md .*{reason}"):
            check_private({"README.md": text.encode()}, tmp_path, "given-here")
    for text in ("hf_hub", f"{tmp_path}-elsewhere", "https://example.org/home/someone", "/home/someone-else"):
        check_private({"README.md": text.encode()}, tmp_path, "given-here")
    check_private({"vocab.txt": b"/home/someone", "model.safetensors": b"given-here"}, tmp_path, "given-here")
