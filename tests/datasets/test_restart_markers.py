"""Conversion with restart markers: which JPEGs are rewritten, and what stays of the original."""

import dataclasses
import hashlib
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from crowdray import storage
from crowdray.data.decoding import decode_image, orientation
from crowdray.data.jpeg_strips import has_restart_rows
from crowdray.data.sample import SCHEMA, Sample, make_sample
from crowdray.data.shards import Dataset
from crowdray.datasets import conversion
from crowdray.datasets.restart_markers import add_restart_markers, with_restart_markers
from crowdray.datasets.sources import open_source
from crowdray.errors import UserError

from ..support.builders import encode, make_shanghaitech, sample_fields, write_dataset

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 41, 3), np.uint8))
EXIF = Image.Exif()
EXIF[ExifTags.Base.Orientation] = 6

STAND_IN = """#!{python} -SE
import hashlib, os, pathlib, sys
if sys.argv[1:] == ["-version"]:
    sys.exit("stand-in")
assert sys.argv[1:] == ["-copy", "all", "-restart", "1"]
folder = pathlib.Path(__file__).parent
sys.stdout.buffer.write((folder / hashlib.sha256(sys.stdin.buffer.read()).hexdigest()).read_bytes())
"""


@pytest.fixture
def jpegtran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in PATH with a stand-in for jpegtran that returns the files named after the hashes of its inputs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "jpegtran").write_text(STAND_IN.format(python=sys.executable))
    (folder / "jpegtran").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def answer(jpegtran: Path, content: bytes, result: bytes) -> None:
    (jpegtran / hashlib.sha256(content).hexdigest()).write_bytes(result)


def photo(**options: Any) -> bytes:
    return encode(PIXELS, "JPEG", **options)


def sample_of(content: bytes, name: str = "a") -> Sample:
    return make_sample(name=name, split="train", scene="", image=content, points=np.zeros((0, 2)))


def test_rewritten_sample_keeps_the_hash_of_its_source(jpegtran: Path) -> None:
    content, marked = photo(exif=EXIF), photo(exif=EXIF, restart_marker_rows=1)
    answer(jpegtran, content, marked)
    original = sample_of(content)
    rewritten = with_restart_markers(original)
    assert (rewritten.image, rewritten.source_sha256) == (marked, original.sha256)
    assert rewritten.sha256 == hashlib.sha256(marked).hexdigest()
    assert sample_fields(with_restart_markers(rewritten)) == sample_fields(rewritten)


@pytest.mark.parametrize(
    ("content", "result"),
    [
        (photo(), photo(restart_marker_rows=1, quality=60)),
        (photo(exif=EXIF), photo(restart_marker_rows=1)),
        (photo(), photo()),
        (photo(), photo(restart_marker_rows=1)[:-400]),
        (photo(), b""),
    ],
    ids=["other-pixels", "other-orientation", "without-markers", "truncated", "empty"],
)
def test_result_that_is_not_equivalent_is_discarded(jpegtran: Path, content: bytes, result: bytes) -> None:
    answer(jpegtran, content, result)
    assert add_restart_markers(content) is None


@pytest.mark.parametrize(
    "content",
    [
        photo(progressive=True),
        encode(PIXELS.convert("CMYK"), "JPEG"),
        photo(restart_marker_rows=1),
        photo() + photo(),
        photo() + b"video",
        encode(PIXELS),
        encode(PIXELS, "TIFF"),
    ],
    ids=["progressive", "cmyk", "with-markers", "two-images", "other-data", "png", "tiff"],
)
def test_other_images_stay_as_they_are(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # the program must not even be started
    kept = with_restart_markers(original := sample_of(content))
    assert (kept.image, kept.sha256, kept.source_sha256) == (content, original.sha256, original.sha256)


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"exif": EXIF, "icc_profile": b"profile", "comment": b"c"}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegtran_changes_neither_pixels_nor_metadata(mode: str, options: dict[str, Any]) -> None:
    content = encode(PIXELS.convert(mode), "JPEG", **options)
    marked = add_restart_markers(content)
    assert marked and has_restart_rows(marked)
    np.testing.assert_array_equal(decode_image(marked), decode_image(content))
    assert orientation(marked) == orientation(content)
    for name in ("exif", "icc_profile", "comment"):
        assert Image.open(io.BytesIO(marked)).info.get(name) == Image.open(io.BytesIO(content)).info.get(name)


def test_shards_have_the_column_of_source_hashes_only_if_needed(root_uri: str) -> None:
    plain = sample_of(photo())
    written = write_dataset(root_uri, [plain])
    assert written.sample(0).source_sha256 is None
    assert "source_sha256" not in SCHEMA.names
    listed = [dataclasses.replace(plain, source_sha256=digest) for digest in ("1" * 64, "2" * 64)]
    dataset = write_dataset(f"{root_uri}-rewritten", listed)
    assert [sample_fields(dataset.sample(row)) for row in range(2)] == [sample_fields(sample) for sample in listed]


def test_conversion_reports_rewritten_images_and_keeps_source_hashes(
    jpegtran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated images are found by their hashes in the source."""
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 2)
    images = make_shanghaitech(part := tmp_path / "part_B", count=5) / "train_data" / "images"
    content, progressive = photo(), photo(progressive=True)
    for number in range(1, 6):
        (images / f"IMG_{number}.jpg").write_bytes(progressive if number == 3 else content)
    answer(jpegtran, content, marked := photo(restart_marker_rows=1))
    source = open_source("shanghaitech", str(part))
    index = conversion.convert(source, str(tmp_path / "marked"), restart_markers=True)
    assert "restart markers added to 4 of 5 images" in index.notes
    assert any("repeated within a split" in note for note in index.notes)
    conversion.convert(source, str(tmp_path / "plain"))
    dataset, plain = (Dataset.open(str(tmp_path / name)) for name in ("marked", "plain"))
    assert dataset.digest != plain.digest
    assert [dataset.sample(row).image == marked for row in range(5)] == [True, True, False, True, True]
    assert [dataset.sample(row).source_sha256 for row in range(5)] == [plain.sample(row).sha256 for row in range(5)]
    copied = conversion.convert(open_source("crowdray", dataset.uri), str(tmp_path / "copy"))
    assert copied.digest == dataset.digest


def test_conversion_with_restart_markers_resumes_only_its_own_slices(
    jpegtran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 2)
    source = open_source("shanghaitech", str(make_shanghaitech(tmp_path / "part_B", count=5)))
    for path in (tmp_path / "part_B" / "train_data" / "images").iterdir():
        path.write_bytes(encode(PIXELS))
    dest = str(tmp_path / "data")
    for pending, converts in ([0, 1, 2], True), ([1, 2], False):
        with conversion.open_conversion(source, dest, restart_markers=True) as work:
            assert work.pending == pending
            if converts:
                work.add(work.convert(0))
    with conversion.open_conversion(source, dest) as work:
        assert work.pending == [0, 1, 2]
    (jpegtran / "jpegtran").write_text(STAND_IN.format(python=sys.executable).replace("stand-in", "newer"))
    with conversion.open_conversion(source, dest, restart_markers=True) as work:
        assert work.pending == [0, 1, 2]


def test_conversion_without_jpegtran_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("shanghaitech", str(make_shanghaitech(tmp_path / "part_B", count=2)))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt-get install libjpeg-turbo-progs"):
        conversion.convert(source, str(tmp_path / "data"), restart_markers=True)
    assert not storage.exists(storage.join(str(tmp_path / "data"), "index.json"))
