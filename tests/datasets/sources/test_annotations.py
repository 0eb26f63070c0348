"""Users' own data: every export format loads the marked heads; anything ambiguous is an error or a note."""

import io
import json
import pickle
import re
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import ExifTags, Image, ImageOps

from crowdray.data.sample import decode_image
from crowdray.data.shards import Dataset
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source
from crowdray.datasets.sources.annotations.annotation import roi_mask

from ...support.annotation_builders import (
    HEADS,
    WRITERS,
    coco,
    conversion_error,
    csv_folder,
    cvat_image,
    cvat_xml,
    heads,
    load,
    write_images,
    write_json,
)
from ...support.builders import HEIGHT, WIDTH, jpeg


@pytest.mark.parametrize("kind", WRITERS)
def test_open_source_any_format_loads_marked_heads(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    folder = WRITERS[kind](tmp_path / "market")
    source = open_source(kind, str(folder))
    assert source.name == "market" and source.depth_teacher == "points-1"
    items = source.items()
    copy, last = pickle.loads(pickle.dumps((source, items[0])))
    assert len(pickle.dumps((source, last))) < 2000
    assert [Path(item.name).name for item in items] == ["a.jpg", "b.jpg", "c.jpg"]
    for number, (item, expected) in enumerate(zip(items, HEADS.values(), strict=True)):
        sample = copy.load(item)
        np.testing.assert_allclose(sample.points, np.reshape(expected, (-1, 2)), rtol=1e-6)
        assert sample.image == jpeg(number) and sample.split == "train" and sample.roi is None and sample.depth
    assert source.notes() == ["there is no test split; set --test-fraction, such as 0.2"]

    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    remote = f"memory://{uuid.uuid4().hex}/market"
    fsspec.filesystem("memory").put(str(folder), remote, recursive=True)
    index = conversion.convert(open_source(kind, remote), f"{remote}-made")
    assert index == conversion.convert(source, str(tmp_path / "made"))
    assert index.splits == {"train": {"rows": 3, "heads": 3}} and any(
        "1 image without heads" in note for note in index.notes
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_convert_missing_and_broken_images_reports_both(tmp_path: Path, kind: str) -> None:
    folder = WRITERS[kind](tmp_path / "market")
    next(folder.rglob("a.jpg")).unlink()
    next(folder.rglob("b.jpg")).write_bytes(b"junk")
    message = conversion_error(kind, folder, depth="none")
    assert "2 items cannot be used" in message
    assert "there is no image" in message and "a.jpg" in message and "add it, or remove" in message
    assert "b.jpg: the image cannot be decoded" in message


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00junk", b"[1", b"[]", b"{}", b"<a/>", b"[" * 9999, b'"a"', b"null"]
)
def test_convert_corrupt_annotation_file_names_it(tmp_path: Path, kind: str, content: bytes) -> None:
    folder = WRITERS[kind](tmp_path / "market")
    endings = {".csv", ".json", ".xml"}
    file = min(path for path in folder.rglob("*") if path.suffix in endings)
    file.write_bytes(content)
    assert str(file) in conversion_error(kind, folder)


def test_find_annotations_several_files_requires_option(tmp_path: Path) -> None:
    folder = WRITERS["coco"](tmp_path / "market")
    (folder / "notes").mkdir()
    write_json(folder / "notes" / "other.json", {})
    assert heads("coco", folder) == HEADS  # a file in annotations/ comes before others
    write_json(folder / "more.json", coco())
    error = conversion_error("coco", folder)
    assert "several .json files" in error and "--annotations" in error
    apart = write_json(tmp_path / "apart.json", coco())
    for given in ("more.json", str(apart)):
        assert heads("coco", folder, annotations=[given]) == HEADS
    assert "file not found" in conversion_error("coco", folder, annotations=["most.json"])
    assert "a.jpg is annotated twice" in conversion_error("coco", folder, annotations=["more.json", str(apart)])
    assert "contains no .xml file" in conversion_error("cvat", folder)
    (tmp_path / "empty").mkdir()
    assert "contains no image" in conversion_error("csv", tmp_path / "empty")


def test_image_index_prefers_full_path_then_longest_suffix(tmp_path: Path) -> None:
    images = ["x/1.jpg", "y/1.jpg", "y/2.b.jpg", "deep/er/3.jpg", ".hidden/3.jpg", "1.jpg"]
    rows = "image,x,y\nx/1.jpg,1,1\nother\\y\\1.jpg,2,2\n./1.jpg,3,3\n/data/er/3.jpg,4,4\n2.b,5,5\n"
    folder = csv_folder(tmp_path / "market", rows, images)
    assert heads("csv", folder) == {
        "1.jpg": [(3, 3)],
        "deep/er/3.jpg": [(4, 4)],
        "x/1.jpg": [(1, 1)],
        "y/1.jpg": [(2, 2)],
        "y/2.b.jpg": [(5, 5)],
    }
    (folder / "1.jpg").unlink()
    assert "line 4: './1.jpg' matches both x/1.jpg and y/1.jpg" in conversion_error("csv", folder)


def test_splits_and_scenes_columns_override_folders(tmp_path: Path) -> None:
    images = ["train/images/p/1.jpg", "Validation/1.png", "test2017/2.jpg", "p/3.jpg", "q/4.jpg"]
    rows = "file,X,Y,split,scene\n3.jpg,1,1,Testing,hall\n3.jpg,2,2,,\n4.jpg,,,,\n"
    rows += "p/1.jpg,,,,\n1.png,,,,\n2.jpg,,,,\n"
    samples = load("csv", csv_folder(tmp_path / "market", rows, images))
    assert {(name, s.split, s.scene) for name, s in samples.items()} == {
        ("q/4.jpg", "train", "q"),
        ("train/images/p/1.jpg", "train", "p"),
        ("Validation/1.png", "val", "val/Validation/1.png"),
        ("p/3.jpg", "test", "hall"),
        ("test2017/2.jpg", "test", "test/test2017/2.jpg"),
    }
    assert [s.split for s in samples.values()] == ["train", "train", "val", "test", "test"]


def test_splits_are_read_from_file_names_and_subsets(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    for split, name in (("train", "a.jpg"), ("val", "b.jpg")):
        (folder / f"heads_{split}2017.csv").write_text(f"image,x,y\n{name},1,1\n")
    samples = load("csv", folder, annotations=["heads_train2017.csv", "heads_val2017.csv"])
    assert [(name, sample.split) for name, sample in samples.items()] == [("a.jpg", "train"), ("b.jpg", "val")]
    # The name of a single file is ignored.
    assert [s.split for s in load("csv", folder, annotations=["heads_val2017.csv"]).values()] == ["train"]
    images = [cvat_image("a.jpg", "", 'subset="Test"'), cvat_image("b.jpg", "", 'subset="default"')]
    (folder / "a.xml").write_text(cvat_xml("".join(images)))
    assert [(name, sample.split) for name, sample in load("cvat", folder).items()] == [
        ("b.jpg", "train"),
        ("a.jpg", "test"),
    ]


def test_test_fraction_depends_on_names_only(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(400)]
    folder = csv_folder(tmp_path / "market", "image,x,y\n" + "".join(f"{name},,\n" for name in names), names[:1])
    for name in names[1:]:
        (folder / name).hardlink_to(folder / names[0])

    def test_names(fraction: float) -> set[str]:
        source = open_source("csv", str(folder), test_fraction=fraction, depth="none")
        assert len(source.items()) == len(names) and not any("test split" in note for note in source.notes())
        return {item.name for item in source.items(["test"])}

    fifth = test_names(0.2)
    assert 0.13 < len(fifth) / len(names) < 0.27 and fifth < test_names(0.4)
    names = names[:100]
    (folder / "heads.csv").write_text("image,x,y\n" + "".join(f"{name},,\n" for name in names))
    assert test_names(0.2) == fifth & set(names)
    assert "increase --test-fraction" in open_source("csv", str(folder), test_fraction=1e-9).notes()[-1]
    (folder / "heads.csv").write_text("image,x,y,split\n1.jpg,,,test\n2.jpg,,,\n")
    assert "already has a test split" in conversion_error("csv", folder, test_fraction=0.2)
    assert "--test-fraction is 1" in conversion_error("csv", folder, test_fraction=1.0)
    assert "--boxes top" in conversion_error("csv", folder, boxes="top")


def test_notes_count_ignored_shapes_and_images(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "market", "image,x,y,label\na.jpg,1,1,head\na.jpg,2,2,car\n")
    assert "heads with several labels: 'car' (1), 'head' (1)" in conversion_error("csv", folder)
    source = open_source("csv", str(folder), label=["head"])
    assert len(source.load(source.items()[0]).points) == 1
    assert source.notes(["train"]) == [
        "1 shapes labelled 'car' are left out",
        "2 images without annotation are left out: b.jpg, c.jpg",
    ]
    assert "--label haed" in conversion_error("csv", folder, label=["haed"])
    assert len(load("csv", folder, label=["head", "car"])["a.jpg"].points) == 2


def test_roi_mask_equals_matplotlib() -> None:
    rng = np.random.default_rng(0)
    regions = [rng.uniform(-5, 40, (corners, 2)) for corners in (3, 4)]
    centres = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), axis=-1).reshape(-1, 2)
    expected = np.any([Outline(region).contains_points(centres) for region in regions], axis=0)
    mask = roi_mask([[(x, y) for x, y in region] for region in regions], HEIGHT, WIDTH)
    np.testing.assert_array_equal(mask.ravel(), expected)
    assert 0.1 < mask.mean() < 0.9


@pytest.mark.parametrize("orientation", range(2, 9))
def test_upright_applies_exif_orientation(tmp_path: Path, orientation: int) -> None:
    (tmp_path / "market").mkdir()
    rows, columns = np.mgrid[:48, :64]
    photo = Image.fromarray(np.stack([rows * 5, columns * 3, rows + columns], axis=-1).astype(np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95, exif=exif)
    (tmp_path / "market" / "a.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "market" / "heads.csv").write_text("image,x,y\na.jpg,1,2\n")
    sample = load("csv", tmp_path / "market")["a.jpg"]
    expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)), dtype=int)
    assert sample.points.tolist() == [[1, 2]] and (sample.height, sample.width) == expected.shape[:2]
    assert np.abs(decode_image(sample.image).astype(int) - expected).mean() < 2
    if orientation > 4:  # an annotation with the stored size refers to the stored pixels
        content = {"images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}]}
        write_json(tmp_path / "market" / "a.json", content | {"annotations": [], "categories": []})
        assert load("coco", tmp_path / "market")["a.jpg"].image == buffer.getvalue()


def test_convert_csv_keeps_scenes_and_counts(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "my: market", "image,x,y,scene\na.jpg,-1,2,hall\na.jpg,3,4,\nb.jpg,,,\n")
    index = conversion.convert(open_source("csv", str(folder), depth="none"), str(tmp_path / "made"))
    dataset = Dataset.open(str(tmp_path / "made"))
    assert (index.name, index.depth_teacher) == ("my-market", "none")
    assert dataset.strings("scene", "train") == ["hall", "train/b.jpg"] and dataset.counts("train").tolist() == [2, 0]
    assert "1 head outside the image, in 1 image: train/a.jpg (1)" in index.notes
    assert json.loads((tmp_path / "made" / "index.json").read_text())["splits"]["train"] == {"rows": 2, "heads": 2}


def test_documentation_examples_load(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "own-data.md").read_text()
    blocks = re.findall(r"^```(?:json|xml)?\n((?:[\[{<]|image)[^`]*)```", text, re.M)
    for kind, block in zip(WRITERS, blocks, strict=True):
        folder = tmp_path / kind
        folder.mkdir()
        for name in ("1.jpg", "2.jpg"):
            (folder / name).write_bytes(jpeg(0, 768, 1024))
        (folder / f"marks.{dict(csv='csv', cvat='xml').get(kind, 'json')}").write_text(block)
        found = heads(kind, folder, depth="none")
        assert found.pop("2.jpg", []) == [] and list(found) == ["1.jpg"]
        np.testing.assert_allclose(found["1.jpg"], [(412.5, 96.5), (387.5, 101.5)], atol=1e-3)
