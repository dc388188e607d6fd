from dataclasses import replace

from huggingface_hub import EvalResult

from hf_rotational.hub.card import CardFacts, model_card

FACTS = CardFacts(
    name="my-model",
    summary="What it is.",
    usage="load()",
    training={"optimizer": "rotational AdamW", "steps": "10"},
    rotating="37 of 105 tensors rotate",
    angle=1.25e-3,
)


def test_a_card_of_bare_facts() -> None:
    card = model_card(FACTS)
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["rotational-equilibrium"]}
    assert card.text.startswith("\n# my-model\n\nWhat it is.\n")
    assert "```python\nload()\n```" in card.text
    assert "1.25e-03 rad" in card.text
    assert "37 of 105 tensors rotate." in card.text
    assert "| optimizer | rotational AdamW |\n| steps | 10 |" in card.text
    assert "## Results" not in card.text
    assert "![" not in card.text


def test_results_picture_and_metadata() -> None:
    result = EvalResult("text-classification", "text", "Some texts", "accuracy", 0.5)
    facts = replace(
        FACTS,
        results=[{"run": "a|b", "loss": "1.0"}, {"run": "c", "loss": "2.0"}],
        eval_results=[result],
        plot="training.png",
        base_model="owner/base",
        license="apache-2.0",
        pipeline_tag="text-classification",
        tags=["more"],
    )
    card = model_card(facts)
    assert card.data.base_model == "owner/base"
    assert card.data.license == "apache-2.0"
    assert card.data.metrics == ["accuracy"]
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["rotational-equilibrium", "more"]
    assert card.data.eval_results == [result]
    assert "| run | loss |\n| --- | --- |\n| a\\|b | 1.0 |\n| c | 2.0 |" in card.text
    assert "](training.png)" in card.text
