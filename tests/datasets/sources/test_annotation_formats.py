"""Each format of people's own data: its quirks as the tools write them, and what is wrong in it told with its place."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crowdray.data.sample import decode_roi
from crowdray.datasets.sources import open_source

from ...support.annotation_builders import (
    HEADS,
    WRITERS,
    coco,
    csv_folder,
    cvat_image,
    cvat_points,
    cvat_xml,
    heads,
    labelme,
    load,
    problem,
    task,
    write_images,
    write_json,
)
from ...support.builders import HEIGHT, WIDTH, jpeg


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffImage;X;Y\na.jpg;1,5;2\n", [(1.5, 2)]),
        ("name\tfilename\tx\ty\nz\ta.jpg\t1.5\t2\n\n", [(1.5, 2)]),
        ('"image","y","x"\r\n"a.jpg","2","1.5"\r\n"a.jpg","2","1.5"\r\n', [(1.5, 2)] * 2),
    ],
)
def test_tables_as_spreadsheets_save_them(tmp_path: Path, text: str, expected: list[tuple[float, float]]) -> None:
    assert heads("csv", csv_folder(tmp_path / "market", text)) == {"a.jpg": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,1,2\n", r"first line ['a.jpg', '1', '2'] has 0 columns 'image'; write image,x,y"),
        ("image,x,y,X\na.jpg,1,2,3\n", "2 columns 'x'"),
        ("image,x,y\na.jpg,1\n", "line 2 has 2 cells, the first line has 3"),
        ("image,x,y\na.jpg,one,2\n", "line 2: x: 'one' is no number"),
        ("image,x,y\na.jpg,1,\n", "line 2: y: '' is no number"),
        ("image,x,y\na.jpg,nan,2\n", "'nan' is no number"),
        ("image,x,y\na.jpg,1e99,2\n", "(1e+99, 2) is no place in an image"),
        ("image,x,y\na.jpg,,\na.jpg,1,1\n", "line 2 says that 'a.jpg' holds no head, but other lines give some"),
        ("image,x,y\n,1,1\n", "line 2: the line names no image"),
        ('image,x,y\n"a.jpg,1,1\n', "unexpected end of data"),
        ("image,x,y,split\na.jpg,1,1,trian\n", "no split 'trian'; write train, val or test"),
        ("image,x,y,split\na.jpg,1,1,val\na.jpg,1,1,test\n", "'a.jpg' has the split 'test', but an earlier line"),
    ],
)
def test_tables_that_say_what_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    folder = csv_folder(tmp_path / "market", text)
    assert message in (said := problem("csv", folder)) and "heads.csv" in said


def test_the_coordinate_base_is_a_choice(tmp_path: Path) -> None:
    folder = csv_folder(tmp_path / "market", "image,x,y\na.jpg,1,1\n")
    assert [heads("csv", folder, base=base)["a.jpg"] for base in (0, 0.5, 1)] == [[(1.5, 1.5)], [(1, 1)], [(0.5, 0.5)]]
    write_json(folder / "points.json", coco(shift=0.0))
    assert heads("coco", folder, base=0.5) == HEADS


def test_coco_takes_the_head_of_each_person(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    content = coco(keypoints=["left_foot", "Head", "nose"])
    for annotation in content["annotations"]:
        annotation["keypoints"] = [1, 1, 2, *annotation["keypoints"][:3], 2, 2, 2]
    content["annotations"][0]["keypoints"][5] = 1  # hidden, but marked
    content["annotations"][1]["keypoints"][3:6] = [0, 0, 0]
    write_json(folder / "people.json", content)
    assert heads("coco", folder) == HEADS | {"a.jpg": HEADS["a.jpg"][:1]}
    assert "1 'person' whose 'Head' is not marked are left out" in open_source("coco", str(folder)).notes()
    assert heads("coco", folder, keypoint="left_foot")["b.jpg"] == [(1.5, 1.5)]
    said = problem("coco", folder, keypoint="hat")
    assert "categories[0]: 'person' has the keypoints left_foot, Head, nose" in said and "--keypoint" in said
    # Boxes are continuous and need no shift: (x - 1, y - 1, 4, 6) of indices, in the middle (x + 1, y + 2).
    assert heads("coco", folder, boxes="centre")["b.jpg"] == [(8.5, 7.5)]
    for annotation in content["annotations"]:
        del annotation["keypoints"]
    write_json(folder / "people.json", content)
    assert "annotations[0]: a box labelled 'person' is no point" in problem("coco", folder)


def test_coco_of_single_points_needs_no_names_and_a_crowd_region_no_guess(tmp_path: Path) -> None:
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
    assert "1 images with a region of people who were not marked one by one are left out" in source.notes()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["annotations", 1, "keypoints"], [1, 2, 2], "annotations[1].keypoints is [1, 2, 2], expected 6 numbers"),
        (["annotations", 1, "keypoints", 0], None, "annotations[1].keypoints[0] is None, expected a finite number"),
        (["annotations", 2, "image_id"], 5, "annotations[2].image_id is 5, but no such id is among the images"),
        (["annotations", 2, "category_id"], [1], "annotations[2].category_id is [1], expected a whole number"),
        (["images", 1, "id"], 397133, "images[1] has the id 397133 of"),
        (["images", 1, "file_name"], "a.jpg", "a.jpg is annotated twice"),
        (["images", 1, "file_name"], 3, "images[1].file_name is 3, expected a text"),
        (["images", 0, "width"], 64, "a.jpg is 32x24, but it was annotated at 64x24"),
        (["images"], {}, "images is {}, expected a list"),
        (["categories"], None, "has no 'categories'"),
    ],
)
def test_wrong_json_is_told_with_its_place(tmp_path: Path, place: list[Any], value: Any, message: str) -> None:
    folder = write_images(tmp_path / "market")
    content = inner = coco()
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write_json(folder / "people.json", content)
    assert message in problem("coco", folder)


def test_label_studio_s_addresses_lead_to_images(tmp_path: Path) -> None:
    names = ["deep/one two.jpg", "3.jpg", "4.jpg", "ab12cd34-5.jpg"]
    folder = write_images(tmp_path / "market", names)
    tasks = [task("", [(n, n)]) for n in range(1, 5)]
    tasks[0]["data"] = {"image": "/data/local-files/?d=photos/deep/one%20two.jpg"}
    tasks[1]["data"] = {"image": "https://host/a/3.jpg?X-Amz-Date=1", "name": "three"}
    tasks[2]["data"] = {"photo": "s3://bucket/any/4.jpg", "text": "a street"}
    tasks[3]["data"] = {"image": "/data/upload/7/ab12cd34-5.jpg"}  # taken from Label Studio's own folder
    write_json(folder / "export.json", tasks)
    assert heads("label-studio", folder) == dict(
        zip(sorted(names), [[(2, 2)], [(3, 3)], [(4, 4)], [(1, 1)]], strict=True)
    )


def test_label_studio_s_latest_finished_annotation_counts(tmp_path: Path) -> None:
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
        "3 annotations of a task that has a later one, or a ground truth, are left out",
        "1 tasks that were skipped or not annotated are left out",
    ]


def test_label_studio_s_shapes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    size = {"original_width": WIDTH, "original_height": HEIGHT, "id": "s"}
    # 16x12 pixels, turned by 90 degrees about (16, 0): it spans x from 4 to 16, y from 0 to 16.
    box = {"x": 50, "y": 0, "width": 50, "height": 50, "rotation": 90, "rectanglelabels": ["Head"]}
    half = {"points": [[0, 0], [50, 0], [50, 100], [0, 100]], "polygonlabels": ["roi"]}
    shapes = [
        {"type": "rectanglelabels", "value": box} | size,
        {"type": "polygonlabels", "value": half} | size,
        {"type": "choices", "value": {"choices": ["rainy"]}, "id": "c"},
    ]
    write_json(folder / "export.json", [task("a.jpg", [(1, 1)], result=shapes)])
    assert "result[1]: a box labelled 'Head' is no point" in problem("label-studio", folder)
    sample = load("label-studio", folder, boxes="centre")["a.jpg"]
    np.testing.assert_allclose(sample.points, [(1, 1), (10, 8)], rtol=1e-6)
    assert sample.roi and decode_roi(sample.roi)[:, : WIDTH // 2].all() and decode_roi(sample.roi).mean() == 0.5
    # A shape and its label may be apart.
    value = {"x": 50, "y": 50, "width": 1}
    apart = [
        {"type": kind, "value": value | {"labels": ["Head"]} if kind == "labels" else value} | size
        for kind in ("keypoint", "labels")
    ]
    write_json(folder / "export.json", [task("a.jpg", [], result=apart)])
    assert heads("label-studio", folder, label=["Head"]) == {"a.jpg": [(16, 12)]}


def test_label_studio_s_other_exports_are_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    write_json(folder / "export.json", [{"image": "/data/upload/1/a.jpg", "id": 1, "annotator": 1}])
    assert "not as JSON-MIN" in problem("label-studio", folder)
    turned = task("a.jpg", [(1, 1)])
    turned["annotations"][0]["result"][0]["image_rotation"] = 90
    write_json(folder / "export.json", [turned])
    assert "turned by 90 degrees" in problem("label-studio", folder)
    del turned["annotations"][0]["result"][0]["type"]  # what it is nobody knows, perhaps a head
    write_json(folder / "export.json", [turned])
    assert "result[0] has no 'type'" in problem("label-studio", folder)


def cvat(folder: Path, shapes: str, **options: Any) -> list[tuple[float, ...]]:
    write_images(folder)
    (folder / "annotations.xml").write_text(cvat_xml(cvat_image("a.jpg", shapes)))
    return heads("cvat", folder, **options)["a.jpg"]


def test_cvat_s_shapes(tmp_path: Path) -> None:
    folder = tmp_path / "market"
    points = cvat_points([(1, 1)]) + cvat_points([(2, 2), (2, 2)]) + '<tag label="rainy" source="manual"></tag>'
    assert cvat(folder, points) == [(1, 1), (2, 2), (2, 2)]
    box = points + '<box label="head" occluded="0" xtl="4.0" ytl="2.0" xbr="8.0" ybr="8.0" z_order="0"></box>'
    assert cvat(folder, box, boxes="centre")[-1] == (6, 5)
    assert "image 'a.jpg': box: a box labelled 'head' is no point" in problem("cvat", folder)
    person = '<skeleton label="person" z_order="0">{}</skeleton>'.format(
        "".join(
            f'<points label="{name}" outside="{out}" points="{x},3"/>'
            for name, out, x in (("hat", 0, 5), ("foot", 1, 6))
        )
    )
    assert cvat(folder, person, keypoint="hat") == [(5, 3)]
    assert cvat(folder, person, keypoint="foot") == []
    assert "which of its points is the head with --keypoint" in problem("cvat", folder)
    assert "no point 'nose'; it has foot, hat" in problem("cvat", folder, keypoint="nose")
    assert cvat(folder, person + points, label=["head"]) == [(1, 1), (2, 2), (2, 2)]
    half = '<polygon label="roi" points="0.0,0.0;16.0,0.0;16.0,24.0;0.0,24.0"></polygon>'
    cvat(folder, points + half)
    roi = load("cvat", folder)["a.jpg"].roi
    assert roi and decode_roi(roi).mean() == 0.5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'points="3.50,4.50;',
            'points="3.50;',
            "image 'a.jpg': points: points are '3.50;16.00,12.00', expected x,y;x,y",
        ),
        ('points="3.50,', 'points="three,', "'three' is no number"),
        ('name="a.jpg"', 'label="a.jpg"', "image 1 has no name"),
        ('width="32"', 'width="wide"', "image 'a.jpg': width: 'wide' is no number"),
        ("<image", "<track", "tracks of a video; export the task as 'CVAT for images 1.1'"),
        ("</annotations>", "", "no XML that can be read (no element found: line"),
        ("<annotations>", '<!DOCTYPE a [<!ENTITY b "c">]><annotations>', "no XML that can be read (EntitiesForbidden"),
    ],
)
def test_wrong_xml_is_told_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = WRITERS["cvat"](tmp_path / "market")
    text = (folder / "annotations.xml").read_text()
    assert old in text
    (folder / "annotations.xml").write_text(text.replace(old, new))
    assert message in (said := problem("cvat", folder)) and "annotations.xml" in said


def test_labelme_s_images_lie_beside_elsewhere_or_inside(tmp_path: Path) -> None:
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
    assert "test_3.json: imageData is no base64" in problem("labelme", folder)
    write_json(folder / "settings.json", {"a": 1})
    assert "settings.json has no 'shapes', so LabelMe did not write it" in problem("labelme", folder)


def test_labelme_s_shapes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market", ["1.jpg"])
    half = ("polygon", "ROI", [(0, 0), (16, 0), (16, 24), (0, 24)])
    box = ("rectangle", "head", [(4, 2), (8, 8)])
    write_json(folder / "1.json", labelme("1.jpg", [("point", "head", [(1, 1)]), half, box]))
    assert "shapes[2]: a box labelled 'head' is no point" in problem("labelme", folder)
    sample = load("labelme", folder, boxes="centre")["1.jpg"]
    assert sample.points.tolist() == [[1, 1], [6, 5]]
    assert sample.roi and decode_roi(sample.roi).mean() == 0.5
    write_json(folder / "1.json", labelme("1.jpg", [("circle", "head", [(4, 2), (8, 8)])]))
    assert "a circle labelled 'head' is no point; name the labels of heads" in problem("labelme", folder)
