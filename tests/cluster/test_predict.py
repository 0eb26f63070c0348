"""Prediction as a whole: resumption after kills, formats of the table."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from crowdray.cluster.predict import predict
from crowdray.errors import UserError
from crowdray.pipeline import predict as pipeline
from crowdray.registry.packaging import package_counter

from ..support.counters import exported_counter, photo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("package") / "model"
    package_counter(exported_counter(), photo(1, 64, 96), folder, config={}, metrics={}, tags={})
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven small photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(11):
        pixels = photo(1, 24, 40, seed=number)[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the photos that are counted, in parts of three and without drawing."""
    names: list[str] = []
    count = pipeline._count

    def counting(counter: Any, photo: Any, image: Any, options: Any) -> Any:
        names.append(photo.name)
        return count(counter, photo, image, options)

    monkeypatch.setattr(pipeline, "_count", counting)
    monkeypatch.setattr(pipeline, "PART_PHOTOS", 3)
    monkeypatch.setattr(pipeline, "draw_prediction_sheet", lambda *_: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return names


class Killed(BaseException):
    """In place of SIGKILL, after which no handler runs."""


@contextmanager
def killed_after(total: int, done: int) -> Iterator[Any]:
    progress = {"left": 5}

    def advance(number: int) -> None:
        progress["left"] -= number
        if progress["left"] == 0:
            raise Killed

    yield advance


def test_predict_killed_twice_counts_each_photo_exactly_once(
    model: str, photos: Path, counted: list[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    for finished in (3, 6):  # of five photos, those of one part are kept
        with pytest.raises(Killed):
            predict(model, str(photos), output, table_format="parquet", progress=killed_after)
        assert not (tmp_path / "out" / "counts.parquet").exists()
        assert len(counted) == 5
        del counted[:]
        done: list[int] = []

        @contextmanager
        def resumed(total: int, before: int, done: list[int] = done) -> Iterator[Any]:
            done.append(before)
            raise Killed
            yield

        with pytest.raises(Killed):
            predict(model, str(photos), output, table_format="parquet", progress=resumed)
        assert done == [finished]
    prediction = predict(model, str(photos), output, table_format="parquet")
    assert len(counted) == 11 - 6 and prediction.photos == 11
    found = pq.read_table(prediction.table)
    assert found["image"].to_pylist() == [f"{number:02d}.png" for number in range(11)]
    assert found["count"].null_count == 0 and str(found.schema.field("width").type) == "int32"


def test_predict_again_counts_only_what_is_new_or_failed(
    model: str, photos: Path, counted: list[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    package = tmp_path / "out" / ".prediction" / "package"
    package.mkdir(parents=True)  # as workers of a killed process leave it
    (photos / "bad.png").write_bytes(b"not an image")
    assert predict(model, str(photos), output).failed == 1
    del counted[:]
    (photos / "bad.png").write_bytes((photos / "00.png").read_bytes())
    (photos / "new.png").write_bytes((photos / "01.png").read_bytes())
    (photos / "02.png").write_bytes((photos / "03.png").read_bytes())  # another photo of that name
    prediction = predict(model, str(photos), output)
    assert sorted(counted) == ["02.png", "bad.png", "new.png"]
    rows = {
        row["image"]: float(row["count"]) for row in csv.DictReader(Path(prediction.table).read_text().splitlines())
    }
    assert rows["02.png"] == rows["03.png"] and rows["bad.png"] == rows["00.png"] and len(rows) == 13
    del counted[:]
    assert predict(model, str(photos), output).photos == 13 and counted == []
    predict(model, str(photos), output, save=["points"])  # another command
    assert len(counted) == 13
    assert not package.exists()
    assert len({part.name.split("-")[1] for part in (tmp_path / "out" / ".prediction").iterdir()}) == 1


def test_tables_of_all_formats_agree(model: str, photos: Path, counted: list[str], tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"not an image")
    output = str(tmp_path / "out")
    tables: dict[str, list[dict[str, Any]]] = {}
    tables["parquet"] = pq.read_table(predict(model, str(photos), output, table_format="parquet").table).to_pylist()
    path = predict(model, str(photos), output, table_format="jsonl").table
    tables["jsonl"] = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rows = list(csv.DictReader(Path(predict(model, str(photos), output).table).read_text().splitlines()))
    assert len(counted) == 11  # the format does not decide the counts
    assert tables["parquet"] == tables["jsonl"]
    assert [row["image"] for row in rows] == [row["image"] for row in tables["jsonl"]]
    for text, row in zip(rows, tables["jsonl"], strict=True):
        assert row.keys() == text.keys()
        assert text["count"] == ("" if row["count"] is None else f"{row['count']:.6f}")
        assert bool(row["error"]) is (row["image"] == "bad.png")


def test_predict_without_a_damaged_part_counts_its_photos_again(
    model: str, photos: Path, counted: list[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    predict(model, str(photos), output)
    parts = sorted((tmp_path / "out" / ".prediction").iterdir())
    parts[0].write_text(parts[0].read_text().replace('"count": ', '"count": 1'))
    parts[1].write_text("{")
    del counted[:]
    assert predict(model, str(photos), output).photos == 11
    assert 3 <= len(counted) <= 6


def test_predict_with_an_unknown_model_or_zones_file_raises(model: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no packaged counter"):
        predict(str(tmp_path / "nowhere"), str(photos), str(tmp_path / "out"))
    with pytest.raises(UserError, match="does not exist"):
        predict(model, str(photos), str(tmp_path / "out"), zones=str(tmp_path / "zones.json"))
    assert not (tmp_path / "out").exists()
