"""A Trainer whose losses have parameters, and whose checkpoints are of its own kind, made rotational by the mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from hf_rotational import RotationalTrainerMixin
from hf_rotational.hub.files import model_files
from hf_rotational.optim.optimizer import RotationalOptimizer
from tests.helpers import copies, exactly_equal

st = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.losses")
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small sentence transformer."""
    bert = tmp_path_factory.mktemp("bert")
    words = Tokenizer(models.WordLevel({f"w{place}": place for place in range(40)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1").save_pretrained(bert)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    set_seed(0)
    BertModel(BertConfig(**sizes, vocab_size=40)).save_pretrained(bert)
    whole = tmp_path_factory.mktemp("whole")
    st.SentenceTransformer(str(bert), device="cpu").save(str(whole))
    return str(whole)


def trainer(folder: str, output_dir: Path, ranks: bool = False, **settings: Any) -> Any:
    """With a classifier in the loss, which no checkpoint holds, or with a loss that ranks and has no parameters."""

    class Rotational(RotationalTrainerMixin, st.SentenceTransformerTrainer):  # type: ignore[misc, name-defined]
        pass

    model = st.SentenceTransformer(folder, device="cpu")
    set_seed(0)
    loss = losses.SoftmaxLoss(model, model.get_sentence_embedding_dimension(), num_labels=3)
    rows = [f"w{place % 7 + 2} w{place % 11 + 9}" for place in range(16)]
    data = Dataset.from_dict({"a": rows, "b": rows[::-1], "label": [place % 3 for place in range(16)]})
    if ranks:
        loss, data = losses.MultipleNegativesRankingLoss(model), data.remove_columns("label")
    args = st.SentenceTransformerTrainingArguments(
        str(output_dir),
        learning_rate=1e-2,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    return Rotational(model=model, args=args, train_dataset=data, eval_dataset=data, loss=loss)


def test_losses_train_with_the_model_and_do_not_rotate(folder: str, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path)
    before = run.loss.classifier.weight.detach().clone()
    run.train()
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, RotationalOptimizer)
    assert not torch.equal(run.loss.classifier.weight, before)
    rotating = {id(parameter) for parameter, _ in optimizer.rotating()}
    assert rotating < {id(parameter) for parameter in run.model.parameters()}


def test_checkpoints_are_those_of_the_class(folder: str, tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": STEPS // 2, "load_best_model_at_end": True}
    trainer(folder, tmp_path / "best", ranks=True, **best).train()
    whole = trainer(folder, tmp_path, ranks=True)
    whole.train()
    resumed = trainer(folder, tmp_path, ranks=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert resumed.state.global_step == STEPS
    exactly_equal(copies(resumed.model.parameters()), copies(whole.model.parameters()))


def test_what_is_published_loads(folder: str, tmp_path: Path) -> None:
    run = trainer(folder, tmp_path / "run")
    run.train()
    run.save_model()
    for name, source in model_files(tmp_path / "run", tmp_path / "run").items():
        (tmp_path / "published" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "published" / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    loaded = st.SentenceTransformer(str(tmp_path / "published"), device="cpu")
    torch.testing.assert_close(
        loaded.encode("w3 w4", convert_to_tensor=True), run.model.encode("w3 w4", convert_to_tensor=True)
    )
