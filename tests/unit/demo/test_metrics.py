import evaluate
import pytest

from hf_rotational.demo.experiment import ACCURACY


@pytest.mark.parametrize(("predictions", "share"), [([0, 1, 2, 3], 1.0), ([0, 1, 2, 0], 0.75), ([1, 2, 3, 0], 0.0)])
def test_accuracy_is_the_share_of_hits(predictions: list[int], share: float) -> None:
    metric = evaluate.load(str(ACCURACY), keep_in_memory=True)
    assert metric.compute(predictions=predictions, references=[0, 1, 2, 3]) == {"accuracy": share}
