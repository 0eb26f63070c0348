"""Fuzzing of every source: a damaged file is one clear error, or the heads are exactly those that it still holds.

`pytest tests/data/test_source_fuzz.py --fuzz-seconds 60` goes on for longer. A case is a function of its number,
which a failure tells.
"""

import base64
import io
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image
from scipy.io import loadmat

from crowdray.data.shards import write_index, write_shard
from crowdray.datasets.sources import SOURCES, Item, open_source
from crowdray.datasets.sources import mall as mall_module
from crowdray.datasets.sources import ucsd as ucsd_module
from crowdray.datasets.sources import worldexpo as worldexpo_module
from crowdray.errors import UserError

from ...support import annotation_readings as own_readings
from ...support import published
from ...support.annotation_builders import HEADS, WRITERS, labelme, write_csv, write_json, write_labelme
from ...support.builders import HEIGHT, WIDTH, jpeg, make_mall, make_shanghaitech, samples
from ...support.published import HDF5_START, Files, below, hdf5, in_bucket

Array = NDArray[Any]
Reference = Callable[[Mapping[str, bytes], Item], Array]
"""An independent reading: the (N, 2) heads of an item in continuous pixels, from contents by path."""

FEWEST = 12
"""Cases of each format, however little time there is."""


@dataclass(frozen=True)
class Format:
    """A layout to fuzz: one line in FORMATS for each source."""

    source: str
    """Its name on the command line."""
    files: Callable[[Path], Files]
    """A tiny sound dataset, given an empty folder that it may use."""
    heads: Reference
    """What its annotation says."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the source."""
    depths: tuple[str, ...] = ("auto", "points", "none")
    """Teachers of depth that it knows."""
    put: Callable[[Mapping[str, bytes]], str] = in_bucket
    """Puts files where the source reads them, and tells its URI."""
    in_parts: bool = True
    """Whether what a damage does not touch is still read."""


def folder(make: Callable[[Path], Path]) -> Callable[[Path], Files]:
    """The files that a builder writes."""

    def files(place: Path) -> Files:
        root = make(place / "it")
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    return files


def matrix(content: bytes, name: str) -> Array:
    """A numeric variable of either kind of MATLAB file, read in the plainest way; (N, 2) or more."""
    if content[512:520] != HDF5_START:
        return np.asarray(loadmat(io.BytesIO(content))[name])
    with h5py.File(io.BytesIO(content)) as file:
        stored = file[name]
        return np.zeros((0, 2)) if stored.attrs.get("MATLAB_empty") else np.asarray(stored[()]).T


def shifted(points: Array, base: float) -> Array:
    return np.zeros((0, 2)) if points.size == 0 else points[:, :2] - base + 0.5


def variable(name: str, base: float = 1.0) -> Reference:
    return lambda files, item: shifted(matrix(files[below(item.annotation)], name), base)


def mall_heads(files: Mapping[str, bytes], item: Item) -> Array:
    frame = loadmat(io.BytesIO(files["mall_gt.mat"]))["frame"]
    return shifted(frame[0, int(item.name[-6:]) - 1]["loc"][0, 0], 1.0)


def shanghaitech_heads(files: Mapping[str, bytes], item: Item) -> Array:
    content = loadmat(io.BytesIO(files[below(item.annotation)]))
    return shifted(content["image_info"][0, 0][0, 0]["location"], 0.5)


def ucsd_heads(files: Mapping[str, bytes], item: Item) -> Array:
    content = loadmat(io.BytesIO(files[below(item.annotation)]), squeeze_me=True, struct_as_record=False)
    frames = content["frame"] if "frame" in content else content["fgt"].frame
    return shifted(np.atleast_2d(frames[int(item.name[-3:]) - 1].loc), 1.0)


def qnrf_heads(files: Mapping[str, bytes], item: Item) -> Array:
    width, height = Image.open(io.BytesIO(files[below(item.image)])).size
    factor = min(1.0, 100 / max(width, height))
    scale = [max(1, round(width * factor)) / width, max(1, round(height * factor)) / height]
    return variable("annPoints")(files, item) * scale


def jhu_heads(files: Mapping[str, bytes], item: Item) -> Array:
    rows = files[below(item.annotation)].decode().split()
    return np.array(rows, dtype=float).reshape(-1, 6)[:, :2] + 0.5


def nwpu_heads(files: Mapping[str, bytes], item: Item) -> Array:
    place = below(item.annotation)
    if place.endswith(".json"):
        return np.array(json.loads(files[place])["points"], dtype=float).reshape(-1, 2)
    return variable("annPoints", 0.5)(files, item)


def worldexpo_in_hdf5(place: Path) -> Files:
    """WorldExpo'10 with every file of the newer kind."""
    files = published.worldexpo()
    for path in [path for path in files if path.endswith(".mat")]:
        names = ("point_position", "point_num", "pMap", "maskVerticesXCoordinates", "maskVerticesYCoordinates")
        if files[path][512:520] != HDF5_START:
            content = loadmat(io.BytesIO(files[path]))
            files[path] = hdf5(**{name: content[name] for name in names if name in content})
    return files


def few_of_ucf_cc_50(place: Path) -> Files:
    return {path: data for path, data in published.ucf_cc_50().items() if path.split(".")[0].split("_")[0] in "7 8 12"}


def csv_of_any_photos(place: Path) -> Path:
    """A table of photos that their cameras did not turn, of other kinds than JPEG too."""
    write_csv(place)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, kind in zip(HEADS, ("JPEG", "TIFF", "WEBP"), strict=True):
        photo = Image.open(place / name).copy()
        photo.save(place / name, kind, exif=exif)
    return place


def labelme_with_a_photo_inside(place: Path) -> Path:
    inside = base64.b64encode(jpeg(3)).decode()
    write_json(write_labelme(place) / "d.json", labelme("d.jpg", [("point", "head", [(5, 6)])], imageData=inside))
    return place


def converted(place: Path) -> Path:
    """A dataset of ours in two shards."""
    shards = [write_shard(samples(3, split), str(place), number) for number, split in enumerate(("train", "test"))]
    write_index(str(place), shards, source="photos", depth_teacher="test", notes=["a note"])
    return place


def in_folder(files: Mapping[str, bytes]) -> str:
    """The path of a folder that holds these files."""
    root = tempfile.mkdtemp()
    for path, content in files.items():
        (Path(root) / path).write_bytes(content)
    return root


FORMATS = {
    "mall": Format("mall", folder(make_mall), mall_heads),
    "shanghaitech": Format("shanghaitech", folder(lambda place: make_shanghaitech(place, count=4)), shanghaitech_heads),
    "worldexpo": Format("worldexpo", lambda place: published.worldexpo(), variable("point_position")),
    "worldexpo-hdf5": Format("worldexpo", worldexpo_in_hdf5, variable("point_position")),
    "ucsd": Format("ucsd", lambda place: published.ucsd(), ucsd_heads),
    "ucf-cc-50": Format("ucf-cc-50", few_of_ucf_cc_50, variable("annPoints")),
    "ucf-qnrf": Format("ucf-qnrf", lambda place: published.ucf_qnrf(), qnrf_heads, {"longest": 100}),
    "jhu": Format("jhu", lambda place: published.jhu(), jhu_heads),
    "nwpu": Format("nwpu", lambda place: published.nwpu(), nwpu_heads),
    "csv": Format("csv", folder(csv_of_any_photos), own_readings.csv_heads),
    "coco": Format("coco", folder(WRITERS["coco"]), own_readings.coco_heads),
    "label-studio": Format("label-studio", folder(WRITERS["label-studio"]), own_readings.label_studio_heads),
    "cvat": Format("cvat", folder(WRITERS["cvat"]), own_readings.cvat_heads),
    "labelme": Format("labelme", folder(labelme_with_a_photo_inside), own_readings.labelme_heads),
    "crowdray": Format(
        # Not in a bucket, from which a sound copy of a damaged shard may be in the cache.
        "crowdray",
        folder(converted),
        own_readings.converted_heads,
        depths=("auto", "none"),
        put=in_folder,
        in_parts=False,
    ),
}
"""Every source that reads files."""

NUMBERS = [np.float64(value).tobytes() for value in (np.nan, np.inf, -1.0, 1e300, 1e9, 0.0)]
WORDS = [b"nan", b"-inf", b"1e999", b"1e30", b"-3", b"", b"[]", b"null", b'"a"', b"9" * 5000, b"\xff", b"1 1"]


def mutated(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """The content with a few bits flipped, cut off, overwritten, with another number or word, or another file's."""
    data = bytearray(content)
    if not data:
        return bytes(rng.choice(np.array(WORDS, dtype=object)))
    place = int(rng.integers(len(data)))
    match rng.integers(7):
        case 0:
            for position in rng.integers(len(data), size=rng.integers(1, 9)):
                data[position] ^= 1 << int(rng.integers(8))
        case 1:
            del data[place:]
        case 2:
            data[place : place + 8] = NUMBERS[rng.integers(len(NUMBERS))]
        case 3:  # the same on the eight bytes that a number of a MATLAB file takes
            place -= place % 8
            data[place : place + 8] = NUMBERS[rng.integers(len(NUMBERS))]
        case 4:
            words = content.split()
            word = words[rng.integers(len(words))] if words else b""
            data = bytearray(content.replace(word, WORDS[rng.integers(len(WORDS))], int(rng.integers(1, 3))))
        case 5:
            del data[place : place + int(rng.integers(1, 17))]
        case 6:
            return others[rng.integers(len(others))]
    return bytes(data)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mall_module, "TRAIN_FRAMES", 4)
    monkeypatch.setattr(worldexpo_module, "SIZE", (HEIGHT, WIDTH))
    monkeypatch.setattr(ucsd_module, "CLIP_FRAMES", 2)
    monkeypatch.setattr(ucsd_module, "TRAIN_FRAMES", range(7, 15))


def check(form: Format, files: Mapping[str, bytes], depth: str) -> int:
    """How many items a dataset gives; fails unless each is refused, or has the heads of the independent reading."""
    root = form.put(files)
    good = 0
    try:
        source = open_source(form.source, root, depth=depth, **form.options)
        for item in source.items():
            try:
                sample = source.load(item)
            except UserError as error:
                assert str(error)
                continue
            np.testing.assert_allclose(sample.points, form.heads(files, item), rtol=1e-6, atol=1e-4, err_msg=str(item))
            good += 1
        source.notes()
    except UserError:
        pass
    finally:
        fsspec.url_to_fs(root)[0].rm(root, recursive=True)
    return good


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused_or_read_as_it_is(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMATS[name]
    files = form.files(tmp_path)
    sound = check(form, files, "auto")
    assert sound > 0
    until = time.monotonic() + request.config.getoption("--fuzz-seconds")
    case = kept = 0
    while case < FEWEST or time.monotonic() < until:
        rng = np.random.default_rng([zlib.crc32(name.encode()), case])
        path = list(files)[rng.integers(len(files))]
        damaged = {**files, path: mutated(files[path], list(files.values()), rng)}
        try:
            kept += check(form, damaged, form.depths[case % len(form.depths)])
        except Exception as error:
            pytest.fail(f"{name}, case {case}, {path}: {type(error).__name__}: {error}")
        case += 1
    assert kept < sound * case  # some damage was refused
    assert kept > 0 or not form.in_parts
    print(f"{name}: {case} cases")


def test_every_source_that_reads_files_is_fuzzed() -> None:
    assert {form.source for form in FORMATS.values()} == set(SOURCES) - {"synthetic"}
