"""Builders of the same three annotated photos in the export format of every annotation tool."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crowdray.data.sample import Sample
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source
from crowdray.errors import UserError

from .builders import HEIGHT, WIDTH, jpeg

HEADS: dict[str, list[tuple[float, float]]] = {"a.jpg": [(3.5, 4.5), (16.0, 12.0)], "b.jpg": [(8.0, 6.0)], "c.jpg": []}
"""Heads in continuous pixels; every coordinate is also an exact percentage of 32x24."""


def write_images(folder: Path, names: Any = tuple(HEADS)) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))
    return folder


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def csv_folder(folder: Path, text: str, images: Any = tuple(HEADS)) -> Path:
    write_images(folder, images)
    (folder / "heads.csv").write_text(text)
    return folder


def write_csv(folder: Path) -> Path:
    """Write a CSV table; the empty photo is a row without coordinates."""
    lines = [f"{name},{x},{y}" for name, heads in HEADS.items() for x, y in heads]
    return csv_folder(folder, "\n".join(["image,x,y", *lines, "c.jpg,,"]) + "\n")


def coco(keypoints: Any = ("nose", "left_eye"), shift: float = 0.5) -> dict[str, Any]:
    """COCO keypoints: x, y and visibility of each, as pixel indices."""
    size = {"width": WIDTH, "height": HEIGHT}
    people = [(n, x - shift, y - shift) for n, name in enumerate(HEADS, 397133) for x, y in HEADS[name]]
    person = {"category_id": 1, "num_keypoints": 1, "area": 24, "iscrowd": 0, "segmentation": []}
    unmarked = [0, 0, 0] * (len(keypoints) - 1)
    annotations = [
        {**person, "id": n, "image_id": image, "keypoints": [x, y, 2, *unmarked], "bbox": [x - 1, y - 1, 4, 6]}
        for n, (image, x, y) in enumerate(people, 1)
    ]
    return {
        "info": {"year": 2026},
        "images": [{"id": n, "file_name": name, "license": 1, **size} for n, name in enumerate(HEADS, 397133)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "supercategory": "person", "keypoints": keypoints}],
    }


def write_coco(folder: Path) -> Path:
    """Write person keypoints in COCO's layout."""
    write_images(folder)
    write_json(folder / "annotations" / "person_keypoints.json", coco())
    return folder


def task(image: str, heads: Any, *, result: Any = (), **annotation: Any) -> dict[str, Any]:
    """A Label Studio task with one annotation of keypoints in percent of the image size."""
    shape = {"type": "keypointlabels", "origin": "manual", "image_rotation": 0}
    size = {"original_width": WIDTH, "original_height": HEIGHT}
    points = [
        {"x": x / WIDTH * 100, "y": y / HEIGHT * 100, "width": 0.75, "keypointlabels": ["Head"]} for x, y in heads
    ]
    shapes = [{"id": f"kp{number}", "value": value, **shape, **size} for number, value in enumerate(points)]
    state = {"was_cancelled": False, "ground_truth": False, "updated_at": "2026-03-09T22:16:08.728378Z"}
    data = {"image": f"/data/upload/1/0a1b2c3d-{image}"}
    annotations = [{"id": 1001, "result": [*shapes, *result], **state, **annotation}]
    return {"id": 1, "annotations": annotations, "drafts": [], "predictions": [], "data": data}


def write_label_studio(folder: Path) -> Path:
    """Write the JSON export of a project with uploaded photos."""
    write_images(folder)
    write_json(folder / "project-1-at-2026-03-09.json", [task(name, heads) for name, heads in HEADS.items()])
    return folder


def cvat_xml(images: str) -> str:
    return f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><name>market</name><labels><label><name>head</name><type>points</type></label></labels></task></meta>
{images}
</annotations>
"""


def cvat_image(name: str, shapes: str, more: str = "") -> str:
    return f'  <image id="0" name="{name}" {more} width="{WIDTH}" height="{HEIGHT}">\n{shapes}\n  </image>\n'


def cvat_points(heads: Any, label: str = "head") -> str:
    corners = ";".join(f"{x:.2f},{y:.2f}" for x, y in heads)
    return f'    <points label="{label}" source="manual" occluded="0" points="{corners}" z_order="0">\n    </points>'


def write_cvat(folder: Path) -> Path:
    """Write a task exported as "CVAT for images 1.1"; the points of a photo are one shape."""
    write_images(folder / "images")
    images = [cvat_image(name, cvat_points(heads) if heads else "") for name, heads in HEADS.items()]
    (folder / "annotations.xml").write_text(cvat_xml("".join(images)))
    return folder


def labelme(image: str, shapes: Any, **more: Any) -> dict[str, Any]:
    """A LabelMe file with shapes of (type, label, corners)."""
    listed = [{"label": label, "points": points, "shape_type": kind, "flags": {}} for kind, label, points in shapes]
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {"version": "5.5.0", "shapes": listed, "imagePath": image, "imageData": None, **size, **more}


def write_labelme(folder: Path) -> Path:
    """Write a file next to each photo."""
    write_images(folder)
    for name, heads in HEADS.items():
        shapes = [("point", "head", [head]) for head in heads]
        write_json((folder / name).with_suffix(".json"), labelme(name, shapes))
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "csv": write_csv,
    "coco": write_coco,
    "label-studio": write_label_studio,
    "cvat": write_cvat,
    "labelme": write_labelme,
}
"""Writers of a small valid folder, by format."""


def load(kind: str, folder: Path, **options: Any) -> dict[str, Sample]:
    source = open_source(kind, str(folder), **options)
    return {item.name: source.load(item) for item in source.items()}


def heads(kind: str, folder: Path, **options: Any) -> dict[str, list[tuple[float, ...]]]:
    return {name: [tuple(p) for p in sample.points.tolist()] for name, sample in load(kind, folder, **options).items()}


def conversion_error(kind: str, folder: Path, **options: Any) -> str:
    """Return the error of a folder that cannot be converted; nothing may be published."""
    made = folder.parent / f"made-{uuid.uuid4().hex}"
    with pytest.raises(UserError) as caught:
        conversion.convert(open_source(kind, str(folder), **options), str(made), strict=True)
    assert not (made / "index.json").exists()
    return str(caught.value)
