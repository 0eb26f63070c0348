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
from torch import Tensor

from crowdray import storage
from crowdray.data.decoding import decode_image
from crowdray.errors import UserError
from crowdray.pipeline.predict import (
    COUNTS,
    OVERLAY,
    PredictionError,
    choose_device,
    find_images,
    predict_images,
    result_stems,
)


def brightness(image: Tensor) -> Tensor:
    """A density proportional to brightness, with a cell for each pixel."""
    if min(image.shape[2:]) < 5:
        raise UserError("too small")
    return image.float().mean(dim=1, keepdim=True) / 255 / 100


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
def plain_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlays without drawing, which takes most of the time."""
    monkeypatch.setattr(
        "crowdray.pipeline.predict.draw_overlay", lambda image, density, path: storage.write_bytes(path, b"overlay")
    )


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
    done: list[int] = []
    prediction = predict_images(brightness, find_images(source, output), output, done.append)
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(f"{output}/counts.csv").decode())))
    assert [row["image"] for row in rows] == ["a.PNG", "b.jpg", "b.png"]
    assert sum(done) == 3
    for row, counted, stem in zip(rows, prediction.counted, ("a", "b.jpg", "b.png"), strict=True):
        density = np.load(io.BytesIO(storage.read_bytes(f"{output}/{stem}.density.npy")))
        pixels = decode_image((photos / row["image"]).read_bytes())
        np.testing.assert_allclose(density, pixels.mean(axis=2) / 25500, rtol=1e-5)
        assert density.dtype == np.float32
        assert float(row["count"]) == pytest.approx(density.sum(dtype=np.float64), abs=1e-6)
        assert counted.count == density.sum(dtype=np.float64)
        with Image.open(io.BytesIO(storage.read_bytes(f"{output}/{stem}.overlay.png"))) as overlay:
            assert overlay.size == (640, round(640 * 40 / 56))
    prediction.check()


@pytest.mark.usefixtures("plain_overlay")
def test_predict_images_with_unreadable_photos_lists_them_and_counts_the_others(photos: Path, tmp_path: Path) -> None:
    (photos / "cut.jpg").write_bytes((photos / "b.jpg").read_bytes()[:400])
    photo(4, (3, 8)).save(photos / "tiny.png")
    output = str(tmp_path / "out")
    images = [*find_images(str(photos), output), str(photos / "gone.jpg")]
    prediction = predict_images(brightness, images, output)
    assert [photo.image for photo in prediction.counted] == ["a.PNG", "b.jpg", "b.png"]
    with pytest.raises(PredictionError) as error:
        prediction.check()
    first, *reasons = str(error.value).splitlines()
    assert first == "3 of 6 images could not be counted:"
    for reason, words in zip(
        reasons,
        (("cut.jpg", "cannot be decoded"), ("tiny.png", "too small"), ("gone.jpg", "does not exist")),
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


@pytest.mark.usefixtures("plain_overlay")
def test_predict_images_writes_results_of_long_and_foreign_names(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("\u5199\u771f" * 37 + ".png", "x" * 251 + ".png", os.fsdecode(b"caf\xe9.png"), "line\nbreak.png"):
        photo(1).save(folder / name)
    prediction = predict_images(brightness, find_images(str(folder), "out"), str(tmp_path / "out"))
    assert not prediction.failed
    assert len(list((tmp_path / "out").iterdir())) == 4 * 2 + 1
    assert len(list(csv.reader(io.StringIO((tmp_path / "out" / COUNTS).read_text())))) == 4 + 1


@pytest.mark.usefixtures("plain_overlay")
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
    predict_images(brightness, [str(photos / "b.jpg")], str(output))  # an earlier run
    monkeypatch.setattr("crowdray.pipeline.predict.draw_overlay", overlay)
    prediction = predict_images(brightness, find_images(str(photos), str(output)), str(output))
    assert [photo.image for photo in prediction.counted] == ["a.PNG", "b.png"]
    with pytest.raises(PredictionError, match=f"b.jpg: {reason}"):
        prediction.check()
    rows = list(csv.reader(io.StringIO((output / COUNTS).read_text())))
    assert [name for name, _ in rows] == ["image", "a.PNG", "b.png"]
    assert not (output / "b.jpg.density.npy").exists()


@pytest.mark.usefixtures("plain_overlay")
def test_counts_table_has_no_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    given = ["=1+1.png", "+a.png", "-2.png", "@sum.png", "\tx.png", "\uff1d1.png", "plain.png", "'quoted.png"]
    for name in given:
        photo(1).save(folder / name)
    predict_images(brightness, [str(folder / name) for name in given], str(tmp_path / "out"))
    header, *rows = csv.reader(io.StringIO((tmp_path / "out" / COUNTS).read_text()))
    assert [name.removeprefix("'") for name, _ in rows] == [name.removeprefix("'") for name in given]
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\uff1d"))]
    assert all(float(count) > 0 for _, count in rows) and header == ["image", "count"]


@pytest.mark.usefixtures("plain_overlay")
def test_prediction_error_keeps_each_photo_on_one_line(tmp_path: Path) -> None:
    name = "bad\x1b[31m\n  error: fake.png"
    (tmp_path / name).write_bytes(b"not an image")
    prediction = predict_images(brightness, [str(tmp_path / name)], str(tmp_path / "out"))
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
