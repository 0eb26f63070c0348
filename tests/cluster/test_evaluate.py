"""Evaluation on Ray equals that of this process."""

from pathlib import Path

import pytest

from crowdray.cluster.evaluate import evaluate, slice_rows
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.pipeline.evaluate import load_models
from crowdray.registry.packaging import package_counter

from ..support.builders import samples, write_dataset
from ..support.counters import TAGS, exported_counter, photo


@pytest.mark.parametrize("length", [1, 3, 7, 40])
@pytest.mark.parametrize("number", [0, 1, 6, 40])
def test_slice_rows_contain_each_row_once(number: int, length: int) -> None:
    slices = slice_rows(range(number), length)
    assert [row for part in slices for row in part] == list(range(number))
    assert all(0 < len(part) <= length for part in slices)


@pytest.mark.parametrize(("option", "message"), [({"workers": 0}, "--workers is 0"), ({"block": 0}, "--block is 0")])
def test_evaluate_with_an_option_without_meaning_raises(option: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate([], [], [], **option)  # type: ignore[arg-type]


@pytest.mark.end_to_end
def test_evaluate_on_two_workers_equals_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    dataset: Dataset = write_dataset(str(tmp_path / "data"), samples(40, split="test"))
    folders = [tmp_path / name / "model" for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        package_counter(exported_counter(seed=seed), photo(1, 64, 96), folder, config={}, metrics={}, tags=TAGS)
    models = load_models([str(folder) for folder in folders], "cpu", None, "fp32")
    alone, shared = (
        evaluate(models, [dataset], ["test"], workers=workers, device="cpu").to_dict() for workers in (None, 2)
    )
    assert shared | {"created": ""} == alone | {"created": ""} and len(shared["results"][1]["images"]) == 40
