"""Evaluation of rows: failed images, threads, intervals; equal for all ways to divide the rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.evaluation.images import EvaluatedImage, FailedImage
from crowdray.pipeline.evaluate import describe_dataset, evaluate_rows, load_models
from crowdray.registry.interval import CountInterval
from crowdray.registry.loading import LoadedCounter
from crowdray.registry.packaging import package_counter

from ..support.builders import samples, write_dataset
from ..support.counters import TAGS, exported_counter, photo


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Fifteen images, of which the fourth is damaged."""
    rows = samples(15, split="test")
    rows[3] = replace(rows[3], image=bytes(rows[3].image)[:150])
    return write_dataset(str(tmp_path_factory.mktemp("data")), rows)


@pytest.fixture(scope="module")
def counter() -> LoadedCounter:
    exported = exported_counter()
    return LoadedCounter(exported, torch.device("cpu"), {}, exported.geometry)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_evaluate_rows_in_parts_and_threads_equals_one_process(
    parts: int, dataset: Dataset, counter: LoadedCounter
) -> None:
    rows = dataset.rows("test").tolist()
    whole = list(evaluate_rows(counter, dataset, rows, 0))
    divided = [
        outcome
        for part in range(parts)
        for outcome in evaluate_rows(counter, dataset, rows[part::parts], 0, threads=1 + part % 2)
    ]
    assert sorted(divided, key=lambda outcome: outcome.row) == whole and [o.row for o in whole] == rows


def test_evaluate_rows_reports_a_damaged_image_and_evaluates_the_others(
    dataset: Dataset, counter: LoadedCounter
) -> None:
    threads = torch.get_num_threads()
    outcomes = list(evaluate_rows(counter, dataset, dataset.rows("test").tolist(), 0, threads=2))
    (failed,) = [outcome for outcome in outcomes if isinstance(outcome, FailedImage)]
    assert (failed.row, failed.name) == (3, "003") and "cannot be decoded" in failed.error
    assert torch.get_num_threads() == threads
    evaluated = [outcome for outcome in outcomes if isinstance(outcome, EvaluatedImage)]
    assert all((image.quality is None) == (image.inside.truth == 0) for image in evaluated)


def test_evaluate_rows_states_intervals_of_counts_inside_the_region_of_interest(
    dataset: Dataset, counter: LoadedCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    interval = CountInterval(2.0, 100)
    monkeypatch.setattr(counter, "interval", interval)
    for outcome in evaluate_rows(counter, dataset, [0, 1, 2], 0):
        assert isinstance(outcome, EvaluatedImage) and outcome.interval == interval.around(outcome.inside.predicted)
    unlike: Any = type("Unlike", (), {"differences": lambda *_: ["it looks different"]})()
    monkeypatch.setattr(counter, "training_data", unlike)
    (outcome,) = evaluate_rows(counter, dataset, [0], 0)
    assert isinstance(outcome, EvaluatedImage) and outcome.interval is None


def test_load_models_describes_counters_and_refuses_one_given_twice(tmp_path: Path) -> None:
    folder = str(tmp_path / "run" / "model")
    package_counter(exported_counter(), photo(1, 64, 96), Path(folder), config={}, metrics={}, tags=TAGS)
    (loaded,) = load_models([folder], "cpu", None, "fp32")
    assert (loaded.model.label, loaded.model.revision, loaded.uri) == ("run", "abc+dirty", folder)
    assert loaded.model.digest == loaded.counter.digest and loaded.model.cell == loaded.counter.geometry.cell
    with pytest.raises(UserError, match="a counter that it has already; give each once"):
        load_models([folder, str(tmp_path / "run")], "cpu", None, "fp32")


def test_describe_dataset_counts_all_images_of_the_split(dataset: Dataset) -> None:
    described = describe_dataset(dataset, "test")
    assert (described.images, described.heads) == (15, sum(number % 7 for number in range(15)))
    with pytest.raises(UserError, match="has no split 'holidays'"):
        describe_dataset(dataset, "holidays")
