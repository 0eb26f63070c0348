"""Fixtures: small datasets, storage locations and a planned run."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
import simplejpeg
import torch

from crowdray.data.sample import Sample, encode_depth, encode_roi, make_sample
from crowdray.data.shards import Dataset
from crowdray.presets import preset

from .support.builders import noise_sample, write_dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from crowdray.pipeline.run import Run

HEIGHT, WIDTH = 64, 96

ODD_FOLDER = 'my C# 100%25 Müller\'s "[x]"?'
"""A folder name with characters that mean something in URIs, patterns, shells and SQL."""

torch.set_num_threads(1)  # test processes share the cores, and waiting threads would spin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", default=1.6, type=float, help="how long each data format is fuzzed")
    parser.addoption("--kills", default="2", help="processes that the test of interrupted studies kills")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long files first, so that no worker process ends alone with one of them."""
    items.sort(key=lambda item: item.get_closest_marker("end_to_end") is None)


@pytest.fixture(params=["local", "memory"])
def root_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URI at which nothing exists yet: an oddly named folder, or fsspec's memory in place of an object store."""
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / ODD_FOLDER / "cache"))
    if request.param == "local":
        yield str(tmp_path / ODD_FOLDER / "root")
        return
    root = f"memory://{uuid.uuid4().hex}"
    yield root
    fs = fsspec.filesystem("memory")
    if fs.exists(root):
        fs.rm(root, recursive=True)


def disc_sample(number: int, split: str) -> Sample:
    """Noise with 0 to 8 bright discs as heads; every other image has a region of interest and depth."""
    rng = np.random.default_rng((number, len(split)))
    image = rng.integers(60, 120, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    points = rng.uniform([2, 10], [WIDTH - 2, HEIGHT - 2], (number % 9, 2))
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    for x, y in points:
        image[(columns - x) ** 2 + (rows - y) ** 2 < 9] = (230, 200, 40)
    roi = np.ones((HEIGHT, WIDTH), dtype=bool)
    roi[:8] = False
    masks = number % 2 == 0
    return make_sample(
        name=f"{number:03d}",
        split=split,
        scene="disc",
        image=simplejpeg.encode_jpeg(image, quality=95),
        points=points,
        roi=encode_roi(roi) if masks else None,
        depth=encode_depth(np.linspace(4, 1, HEIGHT)[:, None] * np.ones((1, WIDTH))) if masks else None,
    )


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 training and 7 test images of 96x64."""
    samples = [disc_sample(n, "train") for n in range(24)] + [disc_sample(n, "test") for n in range(7)]
    return write_dataset(str(tmp_path_factory.mktemp("discs") / "data"), samples)


@pytest.fixture
def run(discs: Dataset, tmp_path: Path) -> "Run":
    """A planned run of the debug preset with two workers; its folder does not exist yet."""
    from crowdray.pipeline.run import plan_run

    return plan_run(preset("debug"), discs.uri, 2, str(tmp_path / "runs"), "run", "debug")


_NOISE_SIZES = [(64, 96), (33, 41), (97, 30), (20, 20), (64, 96), (50, 51)]


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """25 training images of many sizes, some smaller than a window; with and without region of interest and depth."""
    samples = []
    for number in range(25):
        size = _NOISE_SIZES[number % len(_NOISE_SIZES)]
        depth = [None, size, (7, 9), (1, 1)][number % 4]
        samples.append(noise_sample(number, "train", size, number % 5, roi=number % 3 == 0, depth=depth))
    return write_dataset(str(tmp_path_factory.mktemp("noise") / "data"), samples)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> "list[Figure]":
    """Figures saved during the test."""
    from crowdray.plots import style

    figures: list[Figure] = []
    save_figure: Callable[..., None] = style.save_figure

    def save(figure: "Figure", path: Any) -> None:
        figures.append(figure)
        save_figure(figure, path)

    monkeypatch.setattr(style, "save_figure", save)
    return figures
