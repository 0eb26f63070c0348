"""Prediction: files found, counts and files written, failures listed."""

import csv
import io
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crowdray import storage
from crowdray.data.sample import decode_image
from crowdray.errors import UserError
from crowdray.pipeline.predict import PredictionError, choose_device, find_images, predict_images


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


def test_choose_device_without_a_gpu_is_the_cpu_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        choose_device("gpu")
