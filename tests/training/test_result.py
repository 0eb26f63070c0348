"""The result of a training run as JSON, and its description of workers."""

from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.result import describe_workers


def test_describe_workers_with_changes_names_their_first_epochs() -> None:
    rows: list[EpochMetrics] = [
        {"epoch": epoch, "workers": workers} for epoch, workers in enumerate((2, 2, 1, 1, 3), 1)
    ]
    assert describe_workers(rows) == "2, 1 from epoch 3, 3 from epoch 5"
    assert describe_workers(rows[:2]) == "2"
