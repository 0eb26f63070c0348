"""Fuzz tests of every source: a damaged file raises one UserError or loads exactly the heads that it still contains.

`pytest tests/datasets/sources/test_fuzz.py --fuzz-seconds 60` runs more cases. A case depends on its number alone,
which a failure prints.
"""

import base64
import csv
import io
import json
import re
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import fsspec
import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image
from scipy.io import loadmat

from crowdray.datasets.sources import SOURCES, Item, open_source
from crowdray.errors import UserError

from ...support import annotation_builders, published
from ...support.annotation_builders import HEADS, labelme, write_csv, write_json, write_labelme
from ...support.builders import jpeg
from ...support.mutations import mutated
from ...support.published import HDF5_START, LAYOUTS, Files, below, files_below, in_bucket

pytestmark = pytest.mark.slow

Array = NDArray[Any]
Contents = Mapping[str, bytes]
"""Contents of files by path."""
Reference = Callable[[Contents, Item], Array]
"""A reference reader: heads (N, 2) of an item in continuous pixels, from file contents by path."""

DEPTHS = ("auto", "points", "none")
MIN_CASES = 12
"""Cases per format, whatever the time limit."""


@dataclass(frozen=True)
class Format:
    """A dataset layout to fuzz."""

    make: Callable[[Path], Files]
    """Builds a tiny valid dataset; it may use the given folder."""
    heads: Reference
    """Reads the expected heads."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the source."""
    source: str = ""
    """Source that reads it, if it is not its name."""


def matrix(content: bytes, name: str) -> Array:
    """Read a numeric variable (N, 2 or more) of either MATLAB format directly."""
    if content[512:520] != HDF5_START:
        return np.asarray(loadmat(io.BytesIO(content))[name])
    with h5py.File(io.BytesIO(content)) as file:
        stored = file[name]
        return np.zeros((0, 2)) if stored.attrs.get("MATLAB_empty") else np.asarray(stored[()]).T


def shifted(points: Array, base: float) -> Array:
    return np.zeros((0, 2)) if points.size == 0 else points[:, :2] - base + 0.5


def variable(name: str, base: float = 1.0) -> Reference:
    return lambda files, item: shifted(matrix(files[below(item.annotation)], name), base)


def mall_heads(files: Contents, item: Item) -> Array:
    frame = loadmat(io.BytesIO(files["mall_gt.mat"]))["frame"]
    return shifted(frame[0, int(item.name[-6:]) - 1]["loc"][0, 0], 1.0)


def shanghaitech_heads(files: Contents, item: Item) -> Array:
    content = loadmat(io.BytesIO(files[below(item.annotation)]))
    return shifted(content["image_info"][0, 0][0, 0]["location"], 0.5)


def ucsd_heads(files: Contents, item: Item) -> Array:
    content = loadmat(io.BytesIO(files[below(item.annotation)]), squeeze_me=True, struct_as_record=False)
    frames = content["frame"] if "frame" in content else content["fgt"].frame
    return shifted(np.atleast_2d(frames[int(item.name[-3:]) - 1].loc), 1.0)


def qnrf_heads(files: Contents, item: Item) -> Array:
    width, height = Image.open(io.BytesIO(files[below(item.image)])).size
    factor = min(1.0, 100 / max(width, height))
    scale = [max(1, round(width * factor)) / width, max(1, round(height * factor)) / height]
    return variable("annPoints")(files, item) * scale


def jhu_heads(files: Contents, item: Item) -> Array:
    rows = files[below(item.annotation)].decode().split()
    return np.array(rows, dtype=float).reshape(-1, 6)[:, :2] + 0.5


def nwpu_heads(files: Contents, item: Item) -> Array:
    path = below(item.annotation)
    if path.endswith(".json"):
        return np.array(json.loads(files[path])["points"], dtype=float).reshape(-1, 2)
    return variable("annPoints", 0.5)(files, item)


def csv_heads(files: Contents, item: Item) -> Array:
    text = files[below(item.annotation)].decode("utf-8-sig")
    header, *rows = ([cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline="")))
    image, x, y = (list(map(str.lower, header)).index(name) for name in ("image", "x", "y"))
    rows = [row for row in rows if any(row)]
    name = list(dict.fromkeys(row[image] for row in rows))[item.number]
    return named_heads(item, name, [(row[x], row[y]) for row in rows if row[image] == name and row[x]])


def coco_heads(files: Contents, item: Item) -> Array:
    content = json.loads(files[below(item.annotation)])
    image = content["images"][item.number]
    triples = [one["keypoints"][:3] for one in content["annotations"] if one["image_id"] == image["id"]]
    return named_heads(item, image["file_name"], [(x + 0.5, y + 0.5) for x, y, visible in triples if visible > 0])


def label_studio_heads(files: Contents, item: Item) -> Array:
    task = json.loads(files[below(item.annotation)])[item.number]
    (annotation,) = task["annotations"]
    shapes = [(one["value"], one["original_width"], one["original_height"]) for one in annotation["result"]]
    points = [(value["x"] * width / 100, value["y"] * height / 100) for value, width, height in shapes]
    (name,) = task["data"].values()
    return named_heads(item, name, points)


def cvat_heads(files: Contents, item: Item) -> Array:
    image = ElementTree.fromstring(files[below(item.annotation)]).findall("image")[item.number]
    points = [pair.split(",") for shape in image for pair in shape.attrib["points"].split(";")]
    return named_heads(item, image.attrib["name"], points)


def labelme_heads(files: Contents, item: Item) -> Array:
    shapes = json.loads(files[below(item.annotation)])["shapes"]
    return named_heads(item, item.name, [point for shape in shapes for point in shape["points"]])


def label_studio_record_heads(files: Contents, item: Item) -> Array:
    """Read JSON-MIN or the CSV export, whose records are one for each image."""
    text = files[below(item.annotation)].decode("utf-8-sig")
    is_csv = item.annotation.endswith(".csv")
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline=""))) if is_csv else json.loads(text)
    fields = [json.loads(v) if is_csv and v.startswith("[{") else v for v in rows[item.number].values()]
    shapes = [one for value in fields if isinstance(value, list) for one in value]
    points = [(one["x"] * one["original_width"] / 100, one["y"] * one["original_height"] / 100) for one in shapes]
    (name,) = [value for value in fields if isinstance(value, str) and value.endswith(".jpg")]
    return named_heads(item, name, points)


def via_heads(files: Contents, item: Item) -> Array:
    text = files[below(item.annotation)].decode("utf-8-sig")
    if item.annotation.endswith(".csv"):
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        keys = [row["filename"] + row.get("file_size", "") for row in rows]
        key = list(dict.fromkeys(keys))[item.number]
        shapes = [json.loads(row["region_shape_attributes"]) for row, of in zip(rows, keys, strict=True) if of == key]
        name = rows[keys.index(key)]["filename"]
    else:
        content = json.loads(text)
        photo = list(content.get("_via_img_metadata", content).values())[item.number]
        regions = photo.get("regions", [])
        shapes = [one["shape_attributes"] for one in (regions.values() if isinstance(regions, dict) else regions)]
        name = photo["filename"]
    return named_heads(item, name, [(shape["cx"], shape["cy"]) for shape in shapes if shape])


def text_heads(files: Contents, item: Item) -> Array:
    rows = files[below(item.annotation)].decode("utf-8-sig").replace(",", " ").replace(";", " ").split()
    return named_heads(item, item.name, np.array(rows, dtype=float))


def yolo_heads(files: Contents, item: Item) -> Array:
    rows = np.array(files[below(item.annotation)].decode("utf-8-sig").split(), dtype=float).reshape(-1, 5)
    return named_heads(item, item.name, rows[:, 1:3] * Image.open(io.BytesIO(files[below(item.image)])).size)


def voc_heads(files: Contents, item: Item) -> Array:
    boxes = ElementTree.fromstring(files[below(item.annotation)]).findall("object/bndbox")
    sides = [[float(box.findtext(side) or "") for side in ("xmin", "xmax", "ymin", "ymax")] for box in boxes]
    centres: Array = np.array(sides).reshape(-1, 2, 2).mean(axis=2)
    return centres


def cclabeler_heads(files: Contents, item: Item) -> Array:
    points = json.loads(files[below(item.annotation)])["points"]
    return np.reshape([[p["x"], p["y"]] if isinstance(p, dict) else p for p in points], (-1, 2)).astype(float)


def supervisely_heads(files: Contents, item: Item) -> Array:
    objects = json.loads(files[below(item.annotation)])["objects"]
    return np.reshape([one["points"]["exterior"] for one in objects], (-1, 2)).astype(float) + 0.5


def cvat_video(path: Path) -> Files:
    """The frames of a video, with a track for each head of the first."""
    path.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (path / f"frame_{number:06d}.jpg").write_bytes(jpeg(number))
    tracks = "".join(
        f'<track id="{n}" label="head">'
        f'<points frame="0" keyframe="1" outside="0" points="{x},{y}"></points>'
        f'<points frame="1" keyframe="0" outside="0" points="{x},{y + 1}"></points>'
        f'<points frame="2" keyframe="1" outside="1" points="{x},{y}"></points></track>'
        for n, (x, y) in enumerate(HEADS["a.jpg"])
    )
    meta = "<meta><task><start_frame>0</start_frame><stop_frame>2</stop_frame></task></meta>"
    (path / "annotations.xml").write_text(f"<annotations>{meta}{tracks}</annotations>")
    return files_below(path)


def cvat_video_heads(files: Contents, item: Item) -> Array:
    shapes = ElementTree.fromstring(files[below(item.annotation)]).findall("track/points")
    frame = int(re.findall(r"\d+", item.name)[-1])
    found = [shape for shape in shapes if int(shape.attrib["frame"]) == frame and shape.get("outside", "0") == "0"]
    return np.array(
        [pair.split(",") for shape in found for pair in shape.attrib["points"].split(";")], dtype=float
    ).reshape(-1, 2)


def named_heads(item: Item, name: str, points: Any) -> Array:
    """Return the points as an array; `name` in the file must match the item, in any case."""
    assert PurePosixPath(name.lower()).stem.endswith(PurePosixPath(item.name.lower()).stem), (name, item)
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def small_ucf_cc_50(path: Path) -> Files:
    return {path: data for path, data in published.ucf_cc_50().items() if path.split(".")[0].split("_")[0] in "7 8 12"}


def csv_of_rotated_photos(path: Path) -> Files:
    """A table of photos with an EXIF orientation, in several image formats."""
    write_csv(path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, kind in zip(HEADS, ("JPEG", "TIFF", "WEBP"), strict=True):
        photo = Image.open(path / name).copy()
        photo.save(path / name, kind, exif=exif)
    return files_below(path)


def labelme_with_embedded_photo(path: Path) -> Files:
    embedded = base64.b64encode(jpeg(3)).decode()
    write_json(write_labelme(path) / "d.json", labelme("d.jpg", [("point", "head", [(5, 6)])], imageData=embedded))
    return files_below(path)


def written(kind: str) -> Callable[[Path], Files]:
    return lambda path: files_below(annotation_builders.FORMATS[kind].write(path))


FORMATS = {
    "mall": Format(LAYOUTS["mall"], mall_heads),
    "shanghaitech": Format(LAYOUTS["shanghaitech"], shanghaitech_heads),
    "worldexpo": Format(LAYOUTS["worldexpo"], variable("point_position")),
    "ucsd": Format(LAYOUTS["ucsd"], ucsd_heads),
    "ucf-cc-50": Format(small_ucf_cc_50, variable("annPoints")),
    "ucf-qnrf": Format(LAYOUTS["ucf-qnrf"], qnrf_heads, {"longest": 100}),
    "jhu": Format(LAYOUTS["jhu"], jhu_heads),
    "nwpu": Format(LAYOUTS["nwpu"], nwpu_heads),
    "csv": Format(csv_of_rotated_photos, csv_heads),
    "coco": Format(written("coco"), coco_heads),
    "label-studio": Format(written("label-studio"), label_studio_heads),
    "cvat": Format(written("cvat"), cvat_heads),
    "labelme": Format(labelme_with_embedded_photo, labelme_heads),
    "label-studio JSON-MIN": Format(written("label-studio JSON-MIN"), label_studio_record_heads, source="label-studio"),
    "label-studio CSV": Format(written("label-studio CSV"), label_studio_record_heads, source="label-studio"),
    "cvat video": Format(cvat_video, cvat_video_heads, source="cvat"),
    "text": Format(written("text"), text_heads),
    "via": Format(written("via"), via_heads),
    "via project": Format(written("via project"), via_heads, source="via"),
    "via CSV": Format(written("via CSV"), via_heads, source="via"),
    "yolo": Format(written("yolo"), yolo_heads, {"boxes": "centre"}),
    "voc": Format(written("voc"), voc_heads, {"boxes": "centre"}),
    "cclabeler": Format(written("cclabeler"), cclabeler_heads),
    "supervisely": Format(written("supervisely"), supervisely_heads),
}
"""Sources of annotated image files, by name."""


def check(name: str, files: Contents, depth: str) -> int:
    """Return how many items load; each must raise a UserError or equal the reference reader."""
    form, root, loaded = FORMATS[name], in_bucket(files), 0
    try:
        source = open_source(form.source or name, root, depth=depth, **form.options)
        for item in source.items():
            try:
                sample = source.load(item)
            except UserError as error:
                assert str(error)
                continue
            np.testing.assert_allclose(sample.points, form.heads(files, item), rtol=1e-6, atol=1e-4, err_msg=str(item))
            loaded += 1
        source.notes()
    except UserError:
        pass
    finally:
        fsspec.url_to_fs(root)[0].rm(root, recursive=True)
    return loaded


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", FORMATS)
def test_load_damaged_file_raises_or_equals_reference(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    files = FORMATS[name].make(tmp_path / "dataset")
    valid = check(name, files, "auto")
    assert valid > 0
    until = time.monotonic() + request.config.getoption("--fuzz-seconds")
    case = kept = 0
    while case < MIN_CASES or time.monotonic() < until:
        rng = np.random.default_rng([zlib.crc32(name.encode()), case])
        path = list(files)[rng.integers(len(files))]
        damaged = {**files, path: mutated(files[path], list(files.values()), rng)}
        try:
            kept += check(name, damaged, DEPTHS[case % len(DEPTHS)])
        except Exception as error:
            pytest.fail(f"{name}, case {case}, {path}: {type(error).__name__}: {error}")
        case += 1
    assert kept < valid * case  # some damage was rejected
    assert kept > 0
    print(f"{name}: {case} cases")


def test_formats_cover_every_source_of_annotated_images() -> None:
    assert {form.source or name for name, form in FORMATS.items()} == SOURCES.keys() - {"synthetic", "crowdray"}
