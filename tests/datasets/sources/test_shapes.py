"""Shapes of every annotation tool: `--boxes` and regions of interest mean the same everywhere."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crowdray.data.sample import decode_roi
from crowdray.errors import DataError

from ...support.annotation_builders import (
    conversion_error,
    cvat_image,
    cvat_xml,
    heads,
    labelme,
    load,
    supervisely,
    task,
    voc_box,
    voc_xml,
    write_images,
)
from ...support.builders import HEIGHT, WIDTH

Corners = list[tuple[float, float]]
"""Corners of a polygon."""
Builder = Callable[[float, float, float, float, Corners], Any]
"""Writes the annotation of a.jpg: a box labelled head (left, top, right, bottom), and a polygon labelled roi."""


def label_studio(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    def percent(x: float, y: float) -> list[float]:
        return [x / WIDTH * 100, y / HEIGHT * 100]

    (x, y), (width, height) = percent(left, top), percent(right - left, bottom - top)
    box = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": ["head"]}
    polygon = {"points": [percent(*corner) for corner in roi], "polygonlabels": ["roi"]}
    size = {"original_width": WIDTH, "original_height": HEIGHT}
    shapes = [{"type": "rectanglelabels", "value": box}, {"type": "polygonlabels", "value": polygon}]
    choice = {"type": "choices", "value": {"choices": ["rainy"]}, "id": "c"}
    return [task("a.jpg", [], result=[*(shape | size for shape in shapes), choice])]


def coco(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    head = {"image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}
    region = {"image_id": 1, "category_id": 2, "segmentation": [[number for corner in roi for number in corner]]}
    categories = [{"id": 1, "name": "head"}, {"id": 2, "name": "ROI"}]
    return {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": categories,
        "annotations": [head, region],
    }


def cvat(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    box = f'<box label="head" occluded="0" xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"></box>'
    points = ";".join(f"{x},{y}" for x, y in roi)
    return cvat_xml(cvat_image("a.jpg", f'{box}<polygon label="roi" points="{points}"></polygon>'))


def label_me(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    corners = [(right, bottom), (left, top)]  # drawn from the lower right
    return labelme("a.jpg", [("rectangle", "head", corners), ("polygon", "roi", roi)])


def via(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    x, y = np.transpose(roi).tolist()
    shapes = {
        "head": {"name": "rect", "x": left, "y": top, "width": right - left, "height": bottom - top},
        "roi": {"name": "polygon", "all_points_x": x, "all_points_y": y},
    }
    regions = [{"shape_attributes": shape, "region_attributes": {"type": label}} for label, shape in shapes.items()]
    return {"a.jpg9": {"filename": "a.jpg", "size": 9, "regions": regions}}


def supervisely_indices(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    """In pixel indices, the last row and column belong to a rectangle."""
    box = [[left, top], [right - 1, bottom - 1]]
    polygon = [[x - 0.5, y - 0.5] for x, y in roi]
    return supervisely([("rectangle", "head", box), ("polygon", "roi", polygon)])


def csv_boxes(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    return f"image,label,xmin,ymin,xmax,ymax\na.jpg,head,{left},{top},{right},{bottom}\n"


def voc(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    return voc_xml("a.jpg", voc_box(left, top, right, bottom))


def yolo(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    centre = (left + right) / 2 / WIDTH, (top + bottom) / 2 / HEIGHT
    return "0 {:.12f} {:.12f} {:.12f} {:.12f}\n".format(*centre, (right - left) / WIDTH, (bottom - top) / HEIGHT)


def cclabeler(left: float, top: float, right: float, bottom: float, roi: Corners) -> Any:
    box = {"sx": left, "sy": top, "ex": right, "ey": bottom}
    return {"img_id": "a.jpg", "human_num": 1, "boxes": [box], "points": []}


SHAPES: dict[str, tuple[str, Builder, str]] = {
    "label-studio": ("e.json", label_studio, "[0].annotations[0].result[0]"),
    "coco": ("e.json", coco, "annotations[0]"),
    "cvat": ("e.xml", cvat, "image 'a.jpg': box"),
    "labelme": ("a.json", label_me, "shapes[0]"),
    "via": ("e.json", via, "a.jpg9.regions[0]"),
    "supervisely": ("a.jpg.json", supervisely_indices, "objects[0]"),
    "csv": ("e.csv", csv_boxes, "line 2"),
    "voc": ("a.xml", voc, "element 3, object"),
    "yolo": ("a.txt", yolo, "line 1"),
    "cclabeler": ("a.json", cclabeler, "boxes[0]"),
}
"""File, builder and location of the box by source; the last four have no polygons."""


def write(folder: Path, name: str, content: Any) -> Path:
    write_images(folder, ["a.jpg"])
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", SHAPES)
def test_boxes_option_counts_centre_or_top_of_each_box(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    left, top, width, height = rng.integers(1, 12, 4).tolist()
    roi = [(0.0, 0.0), (WIDTH / 2, 0.0), (WIDTH / 2, HEIGHT), (0.0, HEIGHT)]
    name, build, where = SHAPES[kind]
    folder = write(tmp_path / "market", name, build(left, top, left + width, top + height, roi))
    with pytest.raises(DataError, match=f"{re.escape(where)}: a box labelled .* use --boxes centre or --boxes top"):
        load(kind, folder, boxes=None, depth="none")
    for boxes, y in (("centre", top + height / 2), ("top", top)):
        sample = load(kind, folder, boxes=boxes, depth="none")["a.jpg"]
        np.testing.assert_allclose(sample.points, [(left + width / 2, y)], rtol=1e-6)
    if kind in tuple(SHAPES)[:6]:
        assert sample.roi and decode_roi(sample.roi)[:, : WIDTH // 2].all() and decode_roi(sample.roi).mean() == 0.5


def test_boxes_option_counts_upright_box_around_rotated_and_round_shapes(tmp_path: Path) -> None:
    # Rotated by 90 degrees, 16x12 pixels about (16, 0) in Label Studio, 8x4 pixels about their centre in CVAT and VIA.
    box = {"x": 50, "y": 0, "width": 50, "height": 50, "rotation": 90, "rectanglelabels": ["head"]}
    shape = {"type": "rectanglelabels", "value": box, "original_width": WIDTH, "original_height": HEIGHT}
    in_cvat = cvat_xml(
        cvat_image("a.jpg", '<box label="head" rotation="90.00" xtl="6.0" ytl="8.0" xbr="14.0" ybr="12.0"></box>')
    )
    in_via = via(0, 0, 1, 1, [(0, 0)])
    in_via["a.jpg9"]["regions"] = [
        {"shape_attributes": {"name": "ellipse", "cx": 10, "cy": 10, "rx": 4, "ry": 2, "theta": np.pi / 2}},
        {"shape_attributes": {"name": "circle", "cx": 10, "cy": 10, "r": 4}},
    ]
    round_shape = labelme("a.jpg", [("circle", "head", [(10, 10), (10, 14)])])
    for kind, name, content, centre, top in (
        ("label-studio", "e.json", [task("a.jpg", [], result=[shape])], (10, 8), (10, 0)),
        ("cvat", "e.xml", in_cvat, (10, 10), (10, 6)),
        ("via", "v.json", in_via, (10, 10), (10, 6)),
        ("labelme", "a.json", round_shape, (10, 10), (10, 6)),
    ):
        folder = write(tmp_path / kind, name, content)
        for boxes, expected in (("centre", centre), ("top", top)):
            for found in heads(kind, folder, boxes=boxes, depth="none")["a.jpg"]:
                np.testing.assert_allclose(found, expected, atol=1e-6)


def test_boxes_option_counts_no_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "market", "a.json", labelme("a.jpg", [("line", "head", [(4, 2), (8, 8)])]))
    assert "a line labelled 'head' is not a point; select the labels" in conversion_error(
        "labelme", folder, boxes="top"
    )
