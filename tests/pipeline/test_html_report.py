"""The HTML report: what it contains, what it must not contain, and the photos that it shows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch.nn.functional as F
from torch import Tensor

from crowdray.data.sample import Sample, make_sample
from crowdray.data.shards import Dataset
from crowdray.evaluation.images import FailedImage
from crowdray.evaluation.report import EvaluationReport, Outcome, make_report
from crowdray.evaluation.summary import summarise_images
from crowdray.models.export import Geometry
from crowdray.pipeline.evaluate import LoadedModel, describe_dataset
from crowdray.pipeline.html_report import make_html_report
from crowdray.pipeline.report_photos import choose_rows

from ..support.builders import write_dataset
from ..support.evaluations import evaluated_image, evaluated_model

HOSTILE = "<script>alert(1)</script>\"'&.jpg"
VOID = {"meta", "input", "image", "use", "path", "br"}


class Page(HTMLParser):
    """A parsed page: its text, elements and identifiers."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.text, self.open = "", list[str]()
        self.tags, self.ids = Counter[str](), Counter[str]()
        self.links: set[str] = set()
        self.feed(content.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        named = dict(attrs)
        assert not any(name.startswith("on") for name in named)
        self.ids[named.get("id") or ""] += 1
        self.links |= {named[name] or "" for name in ("href", "src", "xlink:href") if name in named}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def make_page(report: EvaluationReport, datasets: Sequence[Dataset]) -> Page:
    """Return the report of counters that count the mean red of each 2x2 pixels, after checks that hold for any."""

    def red(image: Tensor) -> Tensor:
        return F.avg_pool2d(image[:, :1] / 1e5, 2, ceil_mode=True, count_include_pad=False)

    counter: Any = red
    counter.geometry = Geometry(downsample=1, cell=2, grid=2, reach=0)
    content = make_html_report(report, [LoadedModel(model, counter, model.uri) for model in report.models], datasets)
    page = Page(content)
    assert page.open == [] and page.tags["script"] == 0
    assert all(link.startswith(("#", "data:image/webp;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert all(count == 1 for name, count in page.ids.items() if name)
    assert b"http" not in content.replace(b"http-equiv", b"").replace(b"http://www.w3.org/", b"")
    return page


def named_sample(number: int, name: str) -> Sample:
    rng = np.random.default_rng(number)
    image: bytes = simplejpeg.encode_jpeg(rng.integers(0, 256, (30, 45, 3), dtype=np.uint8))
    points = rng.uniform(0, (45, 30), (number, 2))
    return make_sample(name=name, split="test", scene=f"<b>{number % 2}", image=image, points=points)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Five images with 0 to 4 heads; the second has a hostile name, which ends up in the report of each test."""
    names = ["a.jpg", HOSTILE, "c.jpg", "d.jpg", "e.jpg"]
    samples = [named_sample(number, name) for number, name in enumerate(names)]
    return write_dataset(str(tmp_path_factory.mktemp("<i>&") / "data"), samples)


def report_of(dataset: Dataset, counters: Mapping[str, Sequence[Outcome]], datasets: int = 1) -> EvaluationReport:
    described = [describe_dataset(dataset, "test") for _ in range(datasets)]
    models = [evaluated_model(uri) for uri in counters]
    outcomes = {(d, n): images for d in range(datasets) for n, images in enumerate(counters.values())}
    return replace(make_report(models, described, outcomes), created="2026-01-02T03:04:05+00:00")


def outcomes(dataset: Dataset, error: float) -> list[Outcome]:
    """Images whose errors grow with their row, with the names and scenes of the dataset."""
    samples = [dataset.sample(row) for row in range(len(dataset))]
    return [
        replace(evaluated_image(row, row, row + error * (row + 1), scene=s.scene, name=s.name), downsample=2)
        for row, s in enumerate(samples)
    ]


def test_report_escapes_hostile_names(dataset: Dataset) -> None:
    failed = FailedImage(1, HOSTILE, f"{HOSTILE} cannot be decoded")
    counted = outcomes(dataset, 1.0)
    counters = {"models:/<img>/1": counted, "models:/$x$/2": [*counted[:1], failed, *counted[2:]]}
    page = make_page(report_of(dataset, counters), [dataset])
    assert page.text.count(HOSTILE) >= 2 and "1 image could not be evaluated" in page.text
    assert "<img>/1" in page.text and "$x$/2" in page.text and "<b>0" in page.text
    assert page.tags["b"] == page.tags["img"] == page.tags["i"] == 0
    assert "2026-01-02 03:04:05 UTC" in page.text


def test_report_shows_photos_with_counts(dataset: Dataset) -> None:
    page = make_page(report_of(dataset, {"models:/a/1": outcomes(dataset, 1.0)}), [dataset])
    assert page.tags["h5"] == 5  # each photo once
    assert "Largest error" in page.text and "9.0 by a/1 (+5.0)" in page.text and "a/1 miscounts by 3.00" in page.text
    assert HOSTILE in page.text


def test_report_compares_counters_in_a_sentence(dataset: Dataset) -> None:
    counters = {"models:/a/1": outcomes(dataset, 2.0), "models:/a/2": outcomes(dataset, -1.0)}
    page = make_page(report_of(dataset, counters), [dataset])
    assert "a/2 is better than a/1: on the same images its error is 3.00 heads per image lower" in page.text
    counters = {"models:/a/1": outcomes(dataset, 1.0), "models:/a/2": outcomes(dataset, -1.0)}
    assert "No difference is shown between a/2 and a/1" in make_page(report_of(dataset, counters), [dataset]).text


@pytest.mark.parametrize("images", [0, 1, 2])
def test_report_of_few_images_is_complete(images: int, dataset: Dataset) -> None:
    page = make_page(report_of(dataset, {"models:/a/1": outcomes(dataset, 1.0)[:images]}), [dataset])
    assert ("No image was evaluated" in page.text) == (images == 0)
    assert page.tags["h5"] == images and (page.tags["svg"] > 0) == (images > 0)


def test_report_without_a_decoded_image_lists_all(dataset: Dataset) -> None:
    failed: list[Outcome] = [FailedImage(row, f"{row}.jpg", "damaged") for row in range(60)]
    page = make_page(report_of(dataset, {"models:/a/1": failed}), [dataset])
    assert "60 images could not be evaluated" in page.text and "49.jpg: damaged" in page.text
    assert "and 10 more" in page.text and "No image was evaluated" in page.text


def test_report_of_several_datasets_has_a_matrix(dataset: Dataset, tmp_path: Path) -> None:
    counters = {"models:/a/1": outcomes(dataset, 1.0), "models:/a/2": outcomes(dataset, -2.0)}
    page = make_page(report_of(dataset, counters, datasets=2), [dataset, dataset])
    assert page.text.count("All counters on all datasets") >= 2 and page.ids["data-2"] == 1


def test_chosen_photos_are_those_of_their_group() -> None:
    errors = np.random.default_rng(0).permutation(np.arange(100.0))
    images = [evaluated_image(row, 1000 - row, 1000 - row + error) for row, error in enumerate(errors)]
    chosen = choose_rows([summarise_images(images)])
    by_error = np.argsort(errors)
    assert chosen["Largest error"] == by_error[:-4:-1].tolist()
    assert chosen["Smallest error"] == by_error[:3].tolist()
    assert max(abs(errors[chosen["Typical error, close to the median"]] - 49.5)) <= 1.5
    rows = [row for group in chosen.values() for row in group]
    assert len(rows) == len(set(rows)) == 12
    assert set(range(3)) - set(rows) == set()  # the densest
