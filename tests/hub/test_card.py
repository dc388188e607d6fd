"""The text and the metadata of a card, from facts alone."""

from dataclasses import replace

import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_rotational.hub.card import (
    NOTICE,
    OURS,
    CardFacts,
    add_metadata,
    data_of,
    is_generated,
    model_card,
)
from tests.hub.loopback import metadata_errors

FACTS = CardFacts(
    name="my-model",
    summary="What it is.",
    usage="load()",
    training={"optimizer": "rotational AdamW", "steps": "10"},
    rotating="37 of 105 tensors rotate",
    angle=1.25e-3,
)
RESULT = EvalResult("text-classification", "text", "Some texts", "accuracy", 0.5)


def test_a_card_of_bare_facts() -> None:
    card = model_card(FACTS)
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["rotational-equilibrium"]}
    assert card.text.startswith(f"{NOTICE}\n\n# my-model\n\nWhat it is.\n")
    assert "```python\nload()\n```" in card.text
    assert "1.25e-03 rad" in card.text
    assert "37 of 105 tensors rotate." in card.text
    assert "| optimizer | rotational AdamW |\n| steps | 10 |" in card.text
    assert "## Results" not in card.text
    assert "![" not in card.text


def test_results_picture_and_metadata() -> None:
    facts = replace(
        FACTS,
        results=[{"run": "a|b", "loss": "1.0"}, {"run": "c", "loss": "2.0"}],
        eval_results=[RESULT],
        plot="training.png",
        base_model="owner/base",
        datasets=["owner/data"],
        license="apache-2.0",
        pipeline_tag="text-classification",
        tags=["more"],
    )
    card = model_card(facts)
    assert card.data.base_model == "owner/base"
    assert card.data.datasets == ["owner/data"]
    assert card.data.license == "apache-2.0"
    assert card.data.metrics == ["accuracy"]
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["rotational-equilibrium", "more"]
    assert card.data.eval_results == [RESULT]
    assert "| run | loss |\n| --- | --- |\n| a\\|b | 1.0 |\n| c | 2.0 |" in card.text
    assert "](training.png)" in card.text
    assert metadata_errors(str(card)) == []


def test_nothing_is_said_of_rotation_where_nothing_was_rotated() -> None:
    card = model_card(replace(FACTS, rotating=None))
    assert card.data.tags is None
    assert "rotational equilibrium" not in card.text


DRAFT = """\
---
language: en
tags: [generated_from_trainer]
datasets: [theirs/data]
model-index: [{name: run, results: []}]
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# run

By the Trainer.
"""


def test_a_draft_is_completed() -> None:
    draft = ModelCard(DRAFT)
    assert is_generated(draft)
    card = model_card(replace(FACTS, eval_results=[RESULT]), draft)
    assert card.data.language == "en"
    assert card.data.datasets == ["theirs/data"]
    assert card.data.tags == ["generated_from_trainer", "rotational-equilibrium"]
    assert card.data.eval_results == [RESULT]
    assert card.text.startswith(f"{NOTICE}\n\n# my-model\n\nBy the Trainer.\n\n{OURS}\n\n## Use")
    assert "proofread" not in card.text  # there is one comment to remove, not two
    assert metadata_errors(str(card)) == []


def test_a_completed_card_can_be_completed_again() -> None:
    once = model_card(FACTS, ModelCard(DRAFT))
    assert is_generated(once)
    again = model_card(replace(FACTS, name="other"), ModelCard(str(once)))
    assert str(again) == str(once).replace("# my-model", "# other")


@pytest.mark.parametrize("text", ["", "---\ntags: [mine]\n---\n# My model\n", f"{OURS}\n# My model"])
def test_a_card_that_nobody_generated(text: str) -> None:
    assert not is_generated(ModelCard(text))


def test_metadata_are_added_to_what_somebody_wrote() -> None:
    card = ModelCard("---\nlicense: mit\ntags: [mine]\nbase_model: my/base\n---\n# Mine\n")
    facts = replace(FACTS, base_model="owner/base", datasets=["owner/data"], license="apache-2.0")
    assert add_metadata(data_of(card), facts, replace=False)
    assert card.data.to_dict() == {
        "license": "mit",
        "tags": ["mine", "rotational-equilibrium"],
        "base_model": "my/base",
        "datasets": ["owner/data"],
        "library_name": "transformers",
    }
    assert not add_metadata(data_of(card), facts, replace=False)


def test_an_adapter_is_loaded_by_its_own_library() -> None:
    card = model_card(replace(FACTS, library="peft"))
    assert card.data.library_name == "peft"
    assert "it needs `peft`" in card.text
