"""Details of single annotation formats, and files of another tool than the source's."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crowdray.datasets.sources import open_source
from crowdray.errors import UserError

from ...support.annotation_builders import (
    FORMATS,
    HEADS,
    conversion_error,
    cvat_xml,
    heads,
    label_studio_records,
    load,
    supervisely,
    via,
    voc_box,
    voc_xml,
    write_images,
    write_json,
)
from ...support.builders import HEIGHT, WIDTH


@pytest.mark.parametrize("kind", FORMATS)
def test_open_source_of_another_tool_says_which_source_reads_it(tmp_path: Path, kind: str) -> None:
    written = FORMATS[kind]
    folder = written.write(tmp_path / "market")
    for source in {form.source for form in FORMATS.values()} - {written.source}:
        with pytest.raises(UserError) as caught:
            found = open_source(source, str(folder), depth="none", boxes="centre")
            found.load(found.items()[0])
        assert f"convert it with the source {written.source!r}" in str(caught.value), source


@pytest.mark.parametrize("kind", ["text", "yolo", "voc", "cclabeler", "supervisely"])
def test_annotation_of_each_image_is_found_in_a_parallel_folder(tmp_path: Path, kind: str) -> None:
    folder = FORMATS[kind].write(tmp_path / "market")
    for split in ("train", "valid"):
        for path in [path for path in folder.rglob("*") if path.is_file() and split not in path.parts]:
            is_image = path.suffix == ".jpg"
            copy = folder / split / ("images" if is_image else "labels") / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    for path in list(folder.iterdir()):
        if path.name not in ("train", "valid"):
            path.rename(tmp_path / path.name)
    expected = {f"{split}/images/{name}": points for split in ("train", "valid") for name, points in HEADS.items()}
    found = heads(kind, folder, depth="none")
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        np.testing.assert_allclose(np.reshape(found[name], (-1, 2)), np.reshape(points, (-1, 2)), atol=1e-5)


def video(frames: str, tracks: str) -> str:
    size = f"<original_size><width>{WIDTH}</width><height>{HEIGHT}</height></original_size>"
    xml = cvat_xml(tracks)
    return xml.replace("<meta>", f"<meta><task>{frames}{size}</task>")


def point(frame: int, x: float, outside: int = 0, keyframe: int = 1) -> str:
    where = f'frame="{frame}" keyframe="{keyframe}" outside="{outside}" occluded="0"'
    return f'<points {where} points="{x:.2f},3.50" z_order="0"></points>'


def test_cvat_video_tracks_load_by_frame(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market", [f"images/frame_{frame:06d}.jpg" for frame in (0, 1, 2, 4, 9)])
    first = point(0, 1) + point(1, 2, keyframe=0) + point(2, 3) + point(3, 3, outside=1)
    second = point(1, 20) + point(2, 20, outside=1)
    attribute = '<attribute name="child">false</attribute>'
    tracks = "".join(
        f'<track id="{n}" label="head" source="manual">{track}{attribute}</track>'
        for n, track in enumerate((first, second))
    )
    frames = "<start_frame>0</start_frame><stop_frame>4</stop_frame><frame_filter></frame_filter>"
    (folder / "annotations.xml").write_text(video(frames, tracks))
    source = open_source("cvat", str(folder), depth="none")
    found = {Path(item.name).stem[-1]: source.load(item).points.tolist() for item in source.items()}
    assert found == {"0": [[1, 3.5]], "1": [[2, 3.5], [20, 3.5]], "2": [[3, 3.5]], "4": []}
    assert "1 frames of the video without an image are left out" in source.notes()
    assert any("frame_000009.jpg" in note for note in source.notes())  # behind the end of the task

    # A file that lists keyframes only says nothing about the frames between them.
    sparse = '<track id="0" label="head">' + point(0, 1) + point(2, 3) + "</track>"
    (folder / "annotations.xml").write_text(video(frames, sparse))
    found = heads("cvat", folder, depth="none")
    assert [Path(name).stem[-1] for name in found] == ["0", "2", "4"]
    bad = [
        (tracks.replace('frame="1"', 'frame="one"'), "track 0, frame one is not a number"),
        (tracks.replace("2.00,3.50", "2.00"), "track 0, frame 1: points are '2.00'"),
        ('<track id="0" task_id="1"></track><track id="1" task_id="2"></track>', "videos of several tasks"),
        (tracks.replace("points", "box"), "track 0, frame 0: xtl: '' is not a number"),
    ]
    for text, message in bad:
        (folder / "annotations.xml").write_text(video(frames, text))
        assert message in conversion_error("cvat", folder, depth="none")


def test_cclabeler_number_decides_whether_boxes_are_further_heads(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market", ["a.jpg"])
    content = {"img_id": "a.jpg", "points": [[1, 2]], "boxes": [[3, 3, 5, 5]]}
    for number, expected in ((1, [(1, 2)]), (2, [(1, 2), (4, 4)])):
        write_json(folder / "a.json", content | {"human_num": number})
        assert heads("cclabeler", folder, boxes="centre", depth="none")["a.jpg"] == expected
    write_json(folder / "a.json", content | {"human_num": 3})
    error = conversion_error("cclabeler", folder)
    assert "human_num is 3, but there are 1 points and 1 boxes" in error
    write_json(folder / "a.json", content | {"human_num": 2, "boxes": [[3, 3]]})
    assert "boxes[0] has 2 numbers, expected 4" in conversion_error("cclabeler", folder)


def test_via_image_may_be_a_url(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market", ["a.jpg"])
    (folder / "v.csv").write_text(VIA_ROW.format(1))
    assert heads("via", folder, depth="none") == {"a.jpg": [(1, 2)]}


def test_via_attribute_is_the_label(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market", ["a.jpg"])
    attributes = {"type": {"head": True, "hat": False}, "note": "x"}
    write_json(folder / "v.json", via({"a.jpg": [(1, 2)]}, attributes))
    assert "has the attributes note, type; name the one that is the label with --attribute" in conversion_error(
        "via", folder
    )
    assert heads("via", folder, attribute="type", label=["head"], depth="none") == {"a.jpg": [(1, 2)]}
    assert "found shapes labelled 'x'" in conversion_error("via", folder, attribute="note", label=["head"])


def test_label_studio_records_use_the_latest_annotation_of_a_task(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market")
    records = label_studio_records()
    later = label_studio_records({"a.jpg": [(2, 2)]})[0] | {"annotation_id": 9, "updated_at": "2026-03-10T00:00:00Z"}
    records[1]["annotation_id"] = None
    del records[1]["kp"]
    write_json(folder / "project.json", [later, *records])
    assert heads("label-studio", folder, depth="none") == {"a.jpg": [(2, 2)], "c.jpg": []}
    assert open_source("label-studio", str(folder)).notes(["train"])[:2] == [
        "1 annotations of tasks with a later one or a ground truth are left out",
        "1 tasks that were skipped or not annotated are left out",
    ]


def test_supervisely_base_moves_subpixel_coordinates(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "market", ["a.jpg"])
    write_json(
        folder / "a.jpg.json", supervisely([("point", "head", [[1.5, 2.5]]), ("rectangle", "head", [[4, 2], [8, 8]])])
    )
    assert heads("supervisely", folder, base=0.5, boxes="top", depth="none")["a.jpg"] == [(1.5, 2.5), (6, 2)]
    assert heads("supervisely", folder, boxes="top", depth="none")["a.jpg"] == [(2, 3), (6.5, 2)]


@pytest.mark.parametrize(
    "text", ["1.5 2\n", "1.5,2\r\n", "1.5, 2", "1,5;2", "1,5\t2\r", "\ufeff1.5 2\n\n", " 1.5   2 \n"]
)
def test_text_separators_load(tmp_path: Path, text: str) -> None:
    folder = write_images(tmp_path / "market", ["a.jpg"])
    (folder / "a.txt").write_bytes(text.encode())
    (folder / "README.txt").write_text("from the market")
    assert heads("text", folder, depth="none") == {"a.jpg": [(1.5, 2)]}


VIA_ROW = """filename,file_size,region_count,region_shape_attributes,region_attributes
https://host/b/a.jpg?token=1,9,{},"{{""name"":""point"",""cx"":1,""cy"":2}}","{{}}"
"""


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("text", "a.txt", "1 2\n1 2 3\n", "a.txt, line 2 has 3 numbers, expected 2: x and y"),
        ("text", "a.txt", "1 two\n", "a.txt, line 1: 'two' is not a number"),
        ("yolo", "a.txt", "0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1\n", "a.txt, line 2 is not a box: class x y width height"),
        ("yolo", "a.txt", "0 16 12 4 4\n", "a.txt, line 1: 16 is not a fraction of the image size"),
        ("voc", "a.xml", voc_xml("a.jpg", voc_box(1, 2, 3, 4).replace(">3<", "><")), "object: xmax: '' is not a num"),
        (
            "voc",
            "a.xml",
            voc_xml("a.jpg", "<object><name>head</name></object>"),
            "shape without bndbox labelled 'head'",
        ),
        ("supervisely", "a.json", {"size": {"width": 9, "height": 9}, "objects": [{}]}, "objects[0] has no 'geom"),
        ("cclabeler", "a.json", {"human_num": 1, "points": [{"x": 1}]}, "points[0][1] is None"),
        ("via", "v.json", {"a": {"filename": "a.jpg", "regions": [{}]}}, "regions[0] has no 'shape_attributes'"),
        ("via", "v.json", {"view": {}, "metadata": {}, "project": {}}, "is a project of VIA 3"),
        ("via", "v.csv", "filename,file_size\na.jpg,1\n", "line 2: region_shape_attributes is not valid JSON"),
        ("via", "v.csv", VIA_ROW.format(2), "line 2: region_count is 2, but there are 1 regions"),
        ("csv", "e.csv", "image,x,y,width,height\na.jpg,1,2,3,4\n", "height, width, x, y may be points or boxes"),
        ("label-studio", "e.csv", 'id,image,kp\n1,a.jpg,"[{"\n', "e.csv, line 2: kp is not valid JSON"),
    ],
)
def test_invalid_value_reports_location(tmp_path: Path, kind: str, name: str, content: Any, message: str) -> None:
    folder = write_images(tmp_path / "market", ["a.jpg"])
    if isinstance(content, str):
        (folder / name).write_text(content)
    else:
        write_json(folder / name, content)
    with pytest.raises(UserError, match=re.escape(message)):
        load(kind, folder, boxes="centre", depth="none")
