"""Prediction: files found, counts and files written, failures listed."""

import csv
import io
import os
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from crowdray import storage
from crowdray.data.decoding import decode_image
from crowdray.errors import UserError
from crowdray.models.export import Geometry
from crowdray.pipeline import predict
from crowdray.pipeline.predict import (
    OVERLAY,
    SAVED,
    Prediction,
    PredictionError,
    PredictOptions,
    choose_device,
    combine,
    count_part,
    find_images,
    list_photos,
    result_stems,
    split_into_parts,
)
from crowdray.registry.loading import LoadedCounter


class Brightness(nn.Module):
    """A density proportional to brightness, with a cell for each pixel."""

    def forward(self, image: Tensor) -> Tensor:
        assert min(image.shape[2:]) >= 5, "Guard failed"
        return image.float().mean(dim=1, keepdim=True) / 255 / 100


COUNTER = LoadedCounter(Brightness(), torch.device("cpu"), {}, Geometry(1, 1, 4, 8))


def predict_images(images: list[str], output: str) -> Prediction:
    """Count photos whatever was counted before."""
    options = PredictOptions(output, "models:/brightness/1", SAVED)
    photos = list_photos(images, options.save)
    for part in split_into_parts(photos):
        assert len(list(count_part(COUNTER, part, options, "command"))) == len(part)
    return combine(COUNTER, photos, options, "command")


def table(output: Path | str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(storage.read_bytes(f"{output}/counts.csv").decode())))


def photo(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos in two formats, two with the same stem, a text file and an empty folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("b.jpg", "a.PNG", "b.png")):
        photo(number).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures without drawing, which takes most of the time."""
    for name in ("draw_overlay", "draw_prediction_sheet"):
        monkeypatch.setattr(predict, name, lambda _, __, path: storage.write_bytes(path, b"figure"))


def names(uris: list[str]) -> list[str]:
    return [uri.rpartition("/")[2] for uri in uris]


def test_find_images_by_file_folder_and_pattern(photos: Path) -> None:
    assert names(find_images(str(photos), "out")) == ["a.PNG", "b.jpg", "b.png"]
    assert names(find_images(f"{photos}/b.*", "out")) == ["b.jpg", "b.png"]
    assert names(find_images(f"{photos}/[a-z].png", "out")) == ["b.png"]
    assert names(find_images(str(photos / "b.jpg"), str(photos))) == ["b.jpg"]
    photo(9).save(photos / "odd[1].png")
    assert names(find_images(str(photos / "odd[1].png"), "out")) == ["odd[1].png"]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("photos/empty", "there is no image in .*empty; give a file or a folder with .jpg"),
        ("photos/*.webp", "there is no image in"),
        ("photos/c.jpg", "cannot list .*c.jpg: it does not exist"),
        ("nowhere", "cannot list .*nowhere: it does not exist"),
        ("photos", "the images are in --output .*; give another folder"),
    ],
)
def test_find_images_without_images_raises_with_the_fix(photos: Path, location: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_images(str(photos.parent / location), str(photos))


@pytest.mark.parametrize("remote", [False, True], ids=["local", "memory"])
def test_predict_images_counts_are_the_sums_of_the_densities(photos: Path, tmp_path: Path, remote: bool) -> None:
    source, output = str(photos), str(tmp_path / "out")
    if remote:
        source, output = (f"memory://{uuid.uuid4().hex}/{name}" for name in ("in", "out"))
        for file in photos.glob("*.*"):
            storage.write_bytes(storage.join(source, file.name), file.read_bytes())
    prediction = predict_images(find_images(source, output), output)
    rows = table(output)
    assert [row["image"] for row in rows] == ["a.PNG", "b.jpg", "b.png"]
    for row, stem in zip(rows, ("a", "b.jpg", "b.png"), strict=True):
        density = np.load(io.BytesIO(storage.read_bytes(f"{output}/{stem}.density.npy")))
        pixels = decode_image((photos / row["image"]).read_bytes())
        np.testing.assert_allclose(density, pixels.mean(axis=2) / 25500, rtol=1e-5)
        assert density.dtype == np.float32
        assert float(row["count"]) == pytest.approx(density.sum(dtype=np.float64), abs=1e-6)
        assert (row["width"], row["height"], row["model"], row["error"]) == ("56", "40", "models:/brightness/1", "")
        with Image.open(io.BytesIO(storage.read_bytes(f"{output}/{stem}.overlay.png"))) as overlay:
            assert overlay.size == (640, round(640 * 40 / 56))
        points = storage.read_bytes(f"{output}/{stem}.points.csv").decode().splitlines()
        assert points[0] == "x,y" and len(points) == 1 + round(float(row["count"]))
    assert prediction.photos == 3
    assert prediction.heads == pytest.approx(sum(float(row["count"]) for row in rows), abs=1e-5)
    assert prediction.sheet and storage.read_bytes(prediction.sheet).startswith(b"\x89PNG")
    prediction.check()


@pytest.mark.usefixtures("no_drawing")
def test_predict_images_with_unreadable_photos_lists_them_and_counts_the_others(photos: Path, tmp_path: Path) -> None:
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:400])
    photo(4, (3, 8)).save(photos / "tiny.png")
    output = str(tmp_path / "out")
    gone = os.fsdecode(b"gone-caf\xe9.jpg")
    images = [*find_images(str(photos), output), str(photos / gone)]
    prediction = predict_images(images, output)
    assert [photo.image for photo in prediction.first] == ["a.PNG", "b.jpg", "b.png"]
    with pytest.raises(PredictionError) as error:
        prediction.check()
    first, *reasons = str(error.value).splitlines()
    assert first == "3 of 6 images could not be counted:"
    for reason, words in zip(
        reasons,
        (("cut.jpg", "cannot be decoded"), ("tiny.png", "too small"), ("gone-caf", "does not exist")),
        strict=True,
    ):
        assert all(word in reason for word in words)


def test_find_images_leaves_out_companions_of_file_managers(photos: Path) -> None:
    for name in ("._a.PNG", ".hidden.jpg", "Thumbs.db", ".DS_Store"):
        (photos / name).write_bytes(b"\0\5\x16\7")
    (photos / "c.HEIC").write_bytes(b"\0\0\0\x18ftypheic")  # reported as not decoded, instead of skipped in silence
    assert names(find_images(str(photos), "out")) == ["a.PNG", "b.jpg", "b.png", "c.HEIC"]
    assert names(find_images(f"{photos}/*.PNG", "out")) == ["a.PNG"]


@pytest.mark.parametrize(
    ("images", "stems"),
    [
        (["a.jpg", "b.png"], ["a", "b"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg", "a.jpg.png", "a.png"]),
        (["A.JPG", "a.jpg", "b.jpg"], ["A.JPG", "a.jpg-2", "b"]),
        (["caf\u00e9.jpg", "cafe\u0301.jpg"], ["caf\u00e9.jpg", "cafe\u0301.jpg-2"]),
        (["A.jpg", "a.jpg", "a.jpg-2.png", "a.jpg-3.png"], ["A.jpg", "a.jpg-2", "a.jpg-2.png", "a.jpg-3"]),
    ],
)
def test_result_stems_differ_where_names_do_not(images: list[str], stems: list[str]) -> None:
    assert result_stems(images) == stems


def test_result_stems_of_long_names_fit_a_file_system_and_stay_distinct() -> None:
    images = ["\u5199\u771f" * 40 + f"{number}.jpg" for number in range(3)] + [
        "x" * 251 + ".jpg",
        "\udce9" * 240 + ".jpg",
    ]
    stems = result_stems(images)
    assert len(set(stems)) == 5
    assert all(len(os.fsencode(stem + OVERLAY)) <= 240 for stem in stems)


@pytest.mark.usefixtures("no_drawing")
def test_predict_images_writes_results_of_long_and_foreign_names(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("\u5199\u771f" * 37 + ".png", "x" * 251 + ".png", os.fsdecode(b"caf\xe9.png"), "line\nbreak.png"):
        photo(1).save(folder / name)
    prediction = predict_images(find_images(str(folder), "out"), str(tmp_path / "out"))
    assert not prediction.failed
    assert len(list((tmp_path / "out").glob("*.*"))) == 4 * 3 + 3  # and a table, a sheet and the state
    assert {row["image"] for row in table(tmp_path / "out")} >= {"caf\\udce9.png", "line\nbreak.png"}


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("shape\nmismatch"), "RuntimeError: shape"),
        (MemoryError(), r"not enough memory \(out of memory\); set a smaller --tile"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory .*--tile"),
        (OSError(28, "No space left on device"), "OSError: .*No space left"),
    ],
)
def test_predict_images_lists_a_photo_that_fails_in_any_way(
    error: Exception, reason: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overlay(image: object, density: object, path: str) -> None:
        if path.endswith("b.jpg.overlay.png"):
            raise error

    output = tmp_path / "out"
    predict_images([str(photos / "b.jpg")], str(output))  # an earlier run
    monkeypatch.setattr("crowdray.pipeline.predict.draw_overlay", overlay)
    prediction = predict_images(find_images(str(photos), str(output)), str(output))
    assert [photo.image for photo in prediction.first] == ["a.PNG", "b.png"]
    with pytest.raises(PredictionError, match=f"b.jpg: {reason}"):
        prediction.check()
    assert [bool(row["count"]) for row in table(output)] == [True, False, True]
    assert [bool(row["error"]) for row in table(output)] == [False, True, False]
    assert not list(output.glob("b.jpg.*"))


@pytest.mark.usefixtures("no_drawing")
def test_counts_table_has_no_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    given = ["=1+1.png", "+a.png", "-2.png", "@sum.png", "\tx.png", "\uff1d1.png", "plain.png", "'quoted.png"]
    for name in given:
        photo(1).save(folder / name)
    (folder / "=damaged.png").write_bytes(b"=damaged")
    predict_images([str(folder / name) for name in [*given, "=damaged.png"]], str(tmp_path / "out"))
    rows = table(tmp_path / "out")
    assert [row["image"].removeprefix("'") for row in rows[:-1]] == [name.removeprefix("'") for name in given]
    cells = [cell for row in rows for cell in row.values()]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\uff1d"))]
    assert all(float(row["count"]) > 0 for row in rows[:-1])


@pytest.mark.usefixtures("no_drawing")
def test_prediction_error_keeps_each_photo_on_one_line(tmp_path: Path) -> None:
    name = "bad\x1b[31m\n  error: fake.png"
    (tmp_path / name).write_bytes(b"not an image")
    prediction = predict_images([str(tmp_path / name)], str(tmp_path / "out"))
    with pytest.raises(PredictionError) as error:
        prediction.check()
    assert (
        str(error.value).count("\n") == 1
        and "\x1b" not in str(error.value)
        and r"bad\x1b[31m\n  error" in str(error.value)
    )


def test_choose_device_without_a_gpu_is_the_cpu_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("gpu")


def test_prediction_error_lists_a_limited_number_of_photos() -> None:
    failures = {f"photo{number}.jpg": "damaged" for number in range(20)}
    with pytest.raises(PredictionError) as error:
        Prediction("out/counts.csv", photos=1, failed=2000, failures=failures).check()
    lines = str(error.value).splitlines()
    assert lines[0] == "2000 of 2001 images could not be counted:" and len(lines) == 22
    assert lines[-1] == "  and 1,980 more, see out/counts.csv"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": -1}, "--tile is -1"),
        ({"save": ("overlay",)}, "--save has 'overlay'; choose from counts, densities, overlays, points"),
        ({"output": "counts.parquet"}, "--output counts.parquet is a folder; .*--format"),
    ],
)
def test_predict_options_that_cannot_be_used_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PredictOptions(**{"output": "out", "model": "model", **options})  # type: ignore[arg-type]
