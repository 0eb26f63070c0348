"""Users' own data: every export format loads the marked heads; anything ambiguous is an error or a note."""

import base64
import io
import pickle
import re
import sys
import unicodedata
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from crowdray.data.decoding import content_size, decode_image
from crowdray.data.sample import decode_roi
from crowdray.data.shards import Dataset
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source
from crowdray.datasets.sources.annotations.images import upright
from crowdray.errors import DataError, UserError

from ...support.annotation_builders import (
    FORMATS,
    HEADS,
    coco,
    conversion_error,
    csv_folder,
    cvat_image,
    cvat_points,
    cvat_xml,
    heads,
    label_studio_records,
    labelme,
    load,
    open_format,
    task,
    write_images,
    write_json,
)
from ...support.builders import HEIGHT, WIDTH, encode, jpeg

CONVERTED = ("csv", "coco", "label-studio", "cvat", "labelme", "via CSV", "yolo")
"""Formats that are also converted, local and remote; all others share their code."""


@pytest.mark.parametrize("kind", FORMATS)
def test_load_random_points_returns_them_exactly(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    written = {
        name: [tuple(p) for p in np.round(rng.uniform(0, (WIDTH, HEIGHT), (n, 2)), 2).tolist()]
        for n, name in enumerate(HEADS)
    }
    folder = FORMATS[kind].write(tmp_path / "market", written)
    for (name, found), expected in zip(heads(kind, folder, depth="none").items(), written.values(), strict=True):
        np.testing.assert_allclose(np.reshape(found, (-1, 2)), np.reshape(expected, (-1, 2)), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", CONVERTED)
def test_open_source_any_format_loads_marked_heads(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    folder = FORMATS[kind].write(tmp_path / "market")
    source = open_format(kind, folder)
    assert source.name == "market" and source.teacher.name == "points-1"
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
    index = conversion.convert(open_format(kind, remote), f"{remote}-made")
    assert index == conversion.convert(source, str(tmp_path / "made"))
    assert index.splits == {"train": {"rows": 3, "heads": 3}} and "1 image without heads" in str(index.notes)


@pytest.mark.parametrize("kind", CONVERTED)
def test_convert_missing_and_broken_images_reports_both(tmp_path: Path, kind: str) -> None:
    folder = FORMATS[kind].write(tmp_path / "market")
    next(folder.rglob("a.jpg")).unlink()
    next(folder.rglob("b.jpg")).write_bytes(b"junk")
    message = conversion_error(kind, folder, depth="none")
    assert "2 items cannot be used" in message
    assert (
        "there is no image" in message
        and "a.jpg" in message.replace("/a'", "/a.jpg")
        and "add it, or remove" in message
    )
    assert "b.jpg: not an image: it begins with" in message


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00junk", b"[1", b"[]", b"{}", b"<a/>", b"[" * 9999, b'"a"', b"null"]
)
def test_convert_corrupt_annotation_file_names_it(tmp_path: Path, kind: str, content: bytes) -> None:
    folder = FORMATS[kind].write(tmp_path / "market")
    source = open_format(kind, folder, depth="none")
    file = Path(source.items()[0].annotation)
    file.write_bytes(content)
    if kind in ("text", "yolo") and not content:  # no head
        assert heads(kind, folder)[source.items()[0].name] == []
        return
    assert str(file) in conversion_error(kind, folder, depth="none")


def test_find_annotations_several_files_requires_option(tmp_path: Path) -> None:
    folder = FORMATS["coco"].write(tmp_path / "market")
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
    expected = ["x/1.jpg", "y/1.jpg", "1.jpg", "deep/er/3.jpg", "y/2.b.jpg"]
    assert heads("csv", folder) == {name: [(n, n)] for n, name in enumerate(expected, 1)}
    (folder / "1.jpg").unlink()
    assert "line 4: './1.jpg' matches both x/1.jpg and y/1.jpg" in conversion_error("csv", folder)


def spelled(*names: str) -> list[str]:
    """Names of which the first vowel with an umlaut is decomposed, as macOS writes it."""
    return [unicodedata.normalize("NFD", name) for name in names]


@pytest.mark.parametrize(
    ("written", "images", "found"),
    [
        ("Zürich.jpg", spelled("Zürich.jpg"), spelled("Zürich.jpg")),
        (*spelled("Zürich.jpg"), ["Zürich.jpg"], ["Zürich.jpg"]),
        ("photo.jpg", ["Photo.JPG"], ["Photo.JPG"]),
        ("photo", ["Photo.JPG"], ["Photo.JPG"]),
        ("ZÜRICH/a.jpg", spelled("zürich/A.JPG", "b/a.jpg"), spelled("zürich/A.JPG")),
        ("train/a.jpg", ["Train/a.jpg", "test/a.jpg"], ["Train/a.jpg"]),
        ("Train/a.jpg", ["Train/A.JPG", "Test/a.jpg"], ["Train/A.JPG"]),
        ("a.jpg", ["A.jpg", "a.jpg"], ["a.jpg"]),
        ("Zürich.jpg", ["Zürich.jpg", *spelled("Zürich.jpg")], ["Zürich.jpg"]),
        ("Zürich.jpg", ["ZÜRICH.jpg", *spelled("Zürich.jpg")], spelled("Zürich.jpg")),
    ],
)
def test_image_index_finds_another_form_or_case_where_one_fits(
    tmp_path: Path, written: str, images: list[str], found: list[str]
) -> None:
    folder = csv_folder(tmp_path / "market", f"image,x,y\n{written},1,1\n", images)
    assert [*heads("csv", folder)] == found


def test_image_index_shows_the_difference_of_names_that_look_alike(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "market", "image,x,y\nZÜRICH.jpg,1,1\nat 9 AM.jpg,1,1\n", ["at 9\u202fAM.jpg"])
    error = conversion_error("csv", write_images(folder, ["Zürich.jpg", *spelled("Zürich.jpg")]))
    assert r"'Z\xdcRICH.jpg' matches both Zu\u0308rich.jpg and Z\xfcrich.jpg" in error.replace("\\\\", "\\")
    assert r"no image 'at 9 AM.jpg' below" in error and r", but at 9\u202fAM.jpg" in error


def test_cvat_subsets_name_the_folders_of_a_project(tmp_path: Path) -> None:
    write_images(tmp_path / "market", [f"images/{subset}/a.jpg" for subset in ("Train", "Test", "default")])
    subsets = {"Train": [(1, 1), (2, 2)], "Test": [(3, 3)], "default": []}
    images = [
        cvat_image("a.jpg", cvat_points(points) if points else "", f'subset="{s}"') for s, points in subsets.items()
    ]
    (tmp_path / "market" / "annotations.xml").write_text(cvat_xml("".join(images)))
    found = load("cvat", tmp_path / "market")
    assert {name: (s.split, len(s.points)) for name, s in found.items()} == {
        "images/Train/a.jpg": ("train", 2),
        "images/default/a.jpg": ("train", 0),
        "images/Test/a.jpg": ("test", 1),
    }
    (tmp_path / "market/images/Train/a.jpg").unlink()
    (tmp_path / "market/images/default/a.jpg").unlink()
    assert conversion_error("cvat", tmp_path / "market").count("images/Test/a.jpg is annotated twice") == 3


def test_load_both_annotations_of_one_image_are_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    for name in ("a.json", "other.json"):
        write_json(folder / name, labelme("a.jpg", []))
    source = pickle.loads(pickle.dumps(open_source("labelme", str(folder))))
    assert [item.image for item in source.items()] == ["", ""]
    for item in source.items():
        with pytest.raises(DataError, match=r"a\.jpg is annotated twice: .*a\.json and .*other\.json"):
            source.load(item)


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
    assert {name: s.split for name, s in samples.items()} == {"a.jpg": "train", "b.jpg": "val"}
    # The name of a single file is ignored.
    assert [s.split for s in load("csv", folder, annotations=["heads_val2017.csv"]).values()] == ["train"]
    images = [cvat_image("a.jpg", "", 'subset="Test"'), cvat_image("b.jpg", "", 'subset="default"')]
    (folder / "a.xml").write_text(cvat_xml("".join(images)))
    assert {name: s.split for name, s in load("cvat", folder).items()} == {"a.jpg": "test", "b.jpg": "train"}


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


@pytest.mark.parametrize(
    ("size", "head", "outcome"),
    [
        ((48, 64), None, "stored"),
        ((48, 64), (60, 40), "stored"),
        ((48, 64), (40, 60), "upright"),
        ((48, 64), (48, 48), "lie inside it in both ways"),
        ((48, 64), (60, 60), "lie inside it in neither way"),
        ((64, 48), (48, 48), "upright"),
        ((64, 48), (60, 40), "upright"),
        (None, None, "upright"),
        (None, (48, 48), "upright"),
        (None, (60, 60), "upright"),
        (None, (60, 40), "lie inside it only as stored"),
        ((48, 48), (1, 1), "it is 48x64, but was annotated at 48x48"),
    ],
)
def test_upright_lets_heads_decide_between_orientation_and_size(
    size: tuple[int, int] | None, head: tuple[int, int] | None, outcome: str
) -> None:
    """A photo stored at 48x64 (HxW) whose tag turns it to 64x48."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = encode(Image.new("RGB", (64, 48)), "JPEG", exif=exif)
    try:
        turned = upright(content, size, np.array([head] if head else [], dtype=np.float64).reshape(-1, 2), "a.json")
    except DataError as error:
        assert outcome in str(error) and "a.json" in str(error)
    else:
        assert outcome == ("stored" if turned == content else "upright")
        assert content_size(turned) == ((48, 64) if outcome == "stored" else (64, 48))


def test_load_of_stored_size_and_upright_heads_turns_the_photo(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "market").mkdir()
    (tmp_path / "market" / "a.jpg").write_bytes(encode(Image.new("RGB", (64, 48)), "JPEG", exif=exif))
    content = {"images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}], "categories": []}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [39, 59, 2, 2]}]
    content["categories"] = [{"id": 1, "name": "head"}]
    write_json(tmp_path / "market" / "a.json", content)
    sample = load("coco", tmp_path / "market", boxes="centre")["a.jpg"]
    assert (sample.height, sample.width) == (64, 48) and sample.points.tolist() == [[40, 60]]


def test_convert_csv_keeps_scenes_and_counts(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "my: market", "image,x,y,scene\na.jpg,-1,2,hall\na.jpg,3,4,\nb.jpg,,,\n")
    index = conversion.convert(open_source("csv", str(folder), depth="none"), str(tmp_path / "made"))
    dataset = Dataset.open(str(tmp_path / "made"))
    assert (index.name, index.depth_teacher) == ("my-market", "none")
    assert dataset.strings("scene", "train") == ["hall", "train/b.jpg"] and dataset.counts("train").tolist() == [2, 0]
    assert "1 head outside the image, in 1 image: train/a.jpg (1)" in index.notes


def test_documentation_examples_load(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "own-data.md").read_text()
    blocks = re.findall(r"^`([^`]+)` \(`([\w-]+)`\):\n\n```\w*\n([^`]*)```", text, re.M)
    assert {source for _, source, _ in blocks} == {form.source for form in FORMATS.values()}
    for number, (file, source, block) in enumerate(blocks):
        folder = tmp_path / str(number)
        for name in ("1.jpg", "2.jpg", "frame_000000.jpg"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(jpeg(0, 768, 1024))
        (folder / file).write_text(block)
        boxes = "centre" if source in ("yolo", "voc") else None
        found = heads(source, folder, depth="none", boxes=boxes)
        assert found.pop("2.jpg", []) == [] and len(found) == 1, block
        (points,) = found.values()
        np.testing.assert_allclose(points, [(412.5, 96.5), (387.5, 101.5)], atol=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffImage;X;Y\na.jpg;1,5;2\n", [(1.5, 2)]),
        ("name\tfilename\tx\ty\nz\ta.jpg\t1.5\t2\n\n", [(1.5, 2)]),
        ('"image","y","x"\r\n"a.jpg","2","1.5"\r\n"a.jpg","2","1.5"\r\n', [(1.5, 2)] * 2),
        ('sep=;\r\nimage;x;y;;\r\na.jpg;"1,5";2;;\r\n;;;;\r\n', [(1.5, 2)]),
        ("image,x,y,label,\ra.jpg,1.5,2\r,,,,\r", [(1.5, 2)]),
        ('image,x,y\na.jpg,"1,5","2,25"\n', [(1.5, 2.25)]),
        ("image;x;y\na.jpg;1,125;2\n", [(1.125, 2)]),
        ("image_name,label_name,x1,y1,x2,y2\na.jpg,head,0,1,3,3\n", [(1.5, 2)]),
        ("label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name\nhead,0,1,3,2,a.jpg\n", [(1.5, 2)]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_csv_spreadsheet_dialects_load(
    tmp_path: Path, text: str, expected: list[tuple[float, float]], encoding: str
) -> None:
    folder = write_images(tmp_path / "market")
    (folder / "heads.csv").write_bytes(text.removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding))
    assert heads("csv", folder, boxes="centre", depth="none") == {"a.jpg": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,1,2\n", r"the header ['a.jpg', '1', '2'] has 0 columns 'image'; write image,x,y"),
        ("image,x,y,X\na.jpg,1,2,3\n", "2 columns 'x'"),
        ("image,x,y\na.jpg,1\n", "line 2 has 2 cells, the header has 3"),
        ("image,x,y\na.jpg,1,2,3\n", "line 2 has 4 cells, the header has 3"),
        ("sep=;\nimage;x;y\na.jpg;1,234;2.5\n", "line 3: x: '1,234 2.5' mixes decimal points and commas"),
        ('image,x,y\na.jpg,"1,234",2\n', "line 2: '1,234' may be a thousand or a decimal comma"),
        ("image,x1,y1,x2\na.jpg,1,2,3\n", "has 0 columns 'x'; write image,x,y"),
        ("image,x,y\na.jpg,one,2\n", "line 2: x: 'one' is not a number"),
        ("image,x,y\na.jpg,nan,2\n", "'nan' is not a number"),
        ("image,x,y\na.jpg,1e99,2\n", "(1e+99, 2) is far outside any image"),
        ("image,x,y\n,1,1\n", "line 2: the image is missing"),
        ('image,x,y\n"a.jpg,1,1\n', "unexpected end of data"),
        ("image,x,y,split\na.jpg,1,1,trian\n", "unknown split 'trian'; write train, val or test"),
        ("image,x,y,split\na.jpg,1,1,val\na.jpg,1,1,test\n", "has the split 'test', but 'val' in an earlier row"),
    ],
)
def test_csv_invalid_row_reports_location(tmp_path: Path, text: str, message: str) -> None:
    folder = csv_folder(tmp_path / "market", text)
    assert message in (error := conversion_error("csv", folder)) and "heads.csv" in error


def test_base_shifts_coordinates(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "market", "image,x,y\na.jpg,1,1\n")
    assert [heads("csv", folder, base=base)["a.jpg"] for base in (0, 0.5, 1)] == [[(1.5, 1.5)], [(1, 1)], [(0.5, 0.5)]]
    write_json(folder / "points.json", coco(shift=0.0))
    assert heads("coco", folder, base=0.5) == HEADS


def test_coco_keypoint_selects_the_head(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    content = coco(keypoints=["left_foot", "Head", "nose"])
    for annotation in content["annotations"]:
        annotation["keypoints"] = [1, 1, 2, *annotation["keypoints"][:3], 2, 2, 2]
    content["annotations"][0]["keypoints"][5] = 1  # occluded, but marked
    content["annotations"][1]["keypoints"][3:6] = [0, 0, 0]
    write_json(folder / "people.json", content)
    assert heads("coco", folder) == HEADS | {"a.jpg": HEADS["a.jpg"][:1]}
    assert "1 'person' whose 'Head' is not marked are left out" in open_source("coco", str(folder)).notes()
    assert heads("coco", folder, keypoint="left_foot")["b.jpg"] == [(1.5, 1.5)]
    error = conversion_error("coco", folder, keypoint="hat")
    assert "categories[0]: 'person' has the keypoints left_foot, Head, nose" in error and "--keypoint" in error
    # Boxes are continuous: (x - 1, y - 1, 4, 6) in pixel indices has its centre at (x + 1, y + 2).
    assert heads("coco", folder, boxes="centre")["b.jpg"] == [(8.5, 7.5)]
    for annotation in content["annotations"]:
        del annotation["keypoints"]
    write_json(folder / "people.json", content)
    assert "annotations[0]: a box labelled 'person' is not a point" in conversion_error("coco", folder)


def test_coco_unnamed_keypoint_loads_and_crowd_region_skips_image(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    content = coco(keypoints=["centre of hat"])
    del content["categories"][0]["keypoints"]
    content["categories"].append({"id": 2, "name": "ROI"})
    square = [0, 0, 8, 0, 8, 24, 0, 24]
    content["annotations"] += [
        {"id": 8, "image_id": 397134, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 9, 9], "segmentation": {}},
        {"id": 9, "image_id": 397133, "category_id": 2, "iscrowd": 0, "segmentation": [square]},
    ]
    write_json(folder / "points.json", content)
    source = open_source("coco", str(folder))
    samples = [source.load(item) for item in source.items()]
    assert [(s.name, len(s.points)) for s in samples] == [("a.jpg", 2), ("c.jpg", 0)]
    assert samples[0].roi and decode_roi(samples[0].roi).sum() == 8 * 24 and samples[1].roi is None
    assert any(note.startswith("1 images with a crowd region (iscrowd)") for note in source.notes())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["annotations", 1, "keypoints"], [1, 2, 2], "annotations[1].keypoints has 3 numbers, expected 6"),
        (["annotations", 1, "keypoints", 0], None, "keypoints[0] is None: Input should be a valid number"),
        (["annotations", 2, "image_id"], 5, "annotations[2].image_id is 5, an id that is missing from images"),
        (["annotations", 2, "category_id"], [1], "category_id is [1]: Input should be an integer or a string"),
        (["images", 1, "id"], 397133, "images[1] has the same id 397133 as"),
        (["images", 1, "file_name"], "a.jpg", "a.jpg is annotated twice"),
        (["images", 1, "file_name"], 3, "images[1].file_name is 3: Input should be a valid string"),
        (["images", 0, "width"], 64, "a.jpg: it is 32x24, but was annotated at 64x24"),
        (["images"], {}, "images is {}: Input should be a valid list"),
        (["categories"], None, "categories is None: Input should be a valid list"),
    ],
)
def test_coco_invalid_value_reports_json_path(tmp_path: Path, path: list[Any], value: Any, message: str) -> None:
    folder = write_images(tmp_path / "market")
    content = inner = coco()
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    write_json(folder / "people.json", content)
    assert message in conversion_error("coco", folder)


@pytest.mark.parametrize("kind", ["coco", "label-studio"])
def test_broken_annotation_costs_only_its_image(tmp_path: Path, kind: str) -> None:
    folder = write_images(tmp_path / "market")
    people, tasks = coco(), [task(name, points) for name, points in HEADS.items()]
    people["annotations"][2]["keypoints"][0] = tasks[1]["annotations"][0]["result"][0]["value"]["x"] = "8"
    write_json(folder / "export.json", people if kind == "coco" else tasks)
    source = open_source(kind, str(folder))
    first, broken, empty = source.items()
    assert len(source.load(first).points) == 2 and len(source.load(empty).points) == 0
    with pytest.raises(DataError, match="is '8': Input should be a valid number"):
        source.load(broken)


def test_label_studio_urls_resolve_to_images(tmp_path: Path) -> None:
    names = ["deep/one two.jpg", "3.jpg", "4.jpg", "ab12cd34-5.jpg"]
    folder = write_images(tmp_path / "market", names)
    tasks = [task("", [(n, n)]) for n in range(1, 5)]
    tasks[0]["data"] = {"image": "/data/local-files/?d=photos/deep/one%20two.jpg"}
    tasks[1]["data"] = {"image": "https://host/a/3.jpg?X-Amz-Date=1", "name": "three"}
    tasks[2]["data"] = {"photo": "s3://bucket/any/4.jpg", "text": "a street"}
    tasks[3]["data"] = {"image": "/data/upload/7/ab12cd34-5.jpg"}  # copied from Label Studio's storage, hash included
    write_json(folder / "export.json", tasks)
    assert heads("label-studio", folder) == {name: [(n, n)] for n, name in enumerate(names, 1)}


def test_label_studio_uses_ground_truth_or_latest_annotation(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    tasks = [task(name, [(1, 1)]) for name in HEADS]
    later = task("", [(2, 2)], updated_at="2026-03-10T00:00:00.000000Z")["annotations"][0]
    skipped = later | {"was_cancelled": True, "updated_at": "2026-03-11T00:00:00.000000Z"}
    truth = task("", [(3, 3)], ground_truth=True)["annotations"][0]
    tasks[0]["annotations"] = [later, *tasks[0]["annotations"], skipped]
    tasks[1]["annotations"] += [later, truth]
    tasks[2] |= {"annotations": [skipped], "predictions": later["result"]}
    write_json(folder / "export.json", tasks)
    assert heads("label-studio", folder) == {"a.jpg": [(2, 2)], "b.jpg": [(3, 3)]}
    assert open_source("label-studio", str(folder)).notes(["train"]) == [
        "3 annotations of tasks with a later one or a ground truth are left out",
        "1 tasks that were skipped or not annotated are left out",
    ]


def test_label_studio_label_may_be_a_separate_result(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    size = {"original_width": WIDTH, "original_height": HEIGHT, "id": "s"}
    value = {"x": 50, "y": 50, "width": 1}
    apart = [
        {"type": kind, "value": value | {"labels": ["Head"]} if kind == "labels" else value} | size
        for kind in ("keypoint", "labels")
    ]
    write_json(folder / "export.json", [task("a.jpg", [], result=apart)])
    assert heads("label-studio", folder, label=["Head"]) == {"a.jpg": [(16, 12)]}


def test_label_studio_unsupported_export_raises(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    write_json(folder / "export.json", [{"image": "/data/upload/1/a.jpg", "id": 1, "annotation_id": None}])
    assert "only tasks that were skipped or not annotated" in conversion_error("label-studio", folder)
    records = label_studio_records()
    records[0]["kp"][0]["labels"] = ["Head"]
    write_json(folder / "export.json", records)
    assert "shapes and their labels are apart" in conversion_error("label-studio", folder)
    rotated = task("a.jpg", [(1, 1)])
    rotated["annotations"][0]["result"][0]["image_rotation"] = 90
    write_json(folder / "export.json", [rotated])
    assert "rotated by 90 degrees" in conversion_error("label-studio", folder)
    del rotated["annotations"][0]["result"][0]["type"]  # an unknown shape may be a head
    write_json(folder / "export.json", [rotated])
    assert "result[0] has no 'type'" in conversion_error("label-studio", folder)


def cvat(folder: Path, shapes: str, **options: Any) -> list[tuple[float, ...]]:
    write_images(folder)
    (folder / "annotations.xml").write_text(cvat_xml(cvat_image("a.jpg", shapes)))
    return heads("cvat", folder, **options)["a.jpg"]


def test_cvat_without_its_xml_parser_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "defusedxml.ElementTree", None)
    with pytest.raises(UserError, match=r"XML cannot be used: it needs .*pip install defusedxml$") as caught:
        cvat(tmp_path / "market", "")
    assert not isinstance(caught.value, DataError)


def test_cvat_shapes_load(tmp_path: Path) -> None:
    folder = tmp_path / "market"
    points = cvat_points([(1, 1)]) + cvat_points([(2, 2), (2, 2)]) + '<tag label="rainy" source="manual"></tag>'
    assert cvat(folder, points) == [(1, 1), (2, 2), (2, 2)]
    hat, foot = (f'<points label="{name}" outside="{n}" points="5,3"/>' for n, name in enumerate(("hat", "foot")))
    person = f'<skeleton label="person" z_order="0">{hat}{foot}</skeleton>'
    assert cvat(folder, person, keypoint="hat") == [(5, 3)]
    assert cvat(folder, person, keypoint="foot") == []
    assert "name the point that is the head with --keypoint" in conversion_error("cvat", folder)
    assert "no point 'nose'; it has foot, hat" in conversion_error("cvat", folder, keypoint="nose")
    assert cvat(folder, person + points, label=["head"]) == [(1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('points="3.50,4.50;', 'points="3.50;', "'a.jpg': points: points are '3.50;16.00,12.00', expected x,y;x,y"),
        ('points="3.50,', 'points="three,', "'three' is not a number"),
        ('name="a.jpg"', 'label="a.jpg"', "image 1 has no name"),
        ('width="32"', 'width="wide"', "image 'a.jpg': width: 'wide' is not a number"),
        ("</annotations>", "", "not readable XML (no element found: line"),
        ("<annotations>", '<!DOCTYPE a [<!ENTITY b "c">]><annotations>', "not readable XML (EntitiesForbidden"),
    ],
)
def test_cvat_invalid_xml_reports_location(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = FORMATS["cvat"].write(tmp_path / "market")
    text = (folder / "annotations.xml").read_text()
    assert old in text
    (folder / "annotations.xml").write_text(text.replace(old, new))
    assert message in (error := conversion_error("cvat", folder)) and "annotations.xml" in error


def test_labelme_finds_adjacent_distant_and_embedded_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market", ["photos/1.jpg", "2.jpg"])
    points = [("point", "head", [(5, 6)])]
    write_json(folder / "marks" / "1.json", labelme("..\\photos\\1.jpg", points))
    write_json(folder / "2.json", labelme("renamed.jpg", points))
    inside = base64.b64encode(jpeg(7)).decode()
    write_json(folder / "test_3.json", labelme("3.jpg", points, imageData=inside))
    samples = load("labelme", folder)
    assert {name: sample.image for name, sample in samples.items()} == {
        "photos/1.jpg": jpeg(0),
        "2.jpg": jpeg(1),
        "test_3.json": jpeg(7),
    }
    assert all(sample.points.tolist() == [[5, 6]] and sample.split == "train" for sample in samples.values())
    write_json(folder / "test_3.json", labelme("3.jpg", points, imageData="?"))
    assert "test_3.json: imageData is not valid base64" in conversion_error("labelme", folder)
    write_json(folder / "settings.json", {"a": 1})
    assert "settings.json has no 'shapes', so LabelMe did not write it" in conversion_error("labelme", folder)
