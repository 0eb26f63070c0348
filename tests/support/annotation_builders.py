"""Builders of the same three annotated photos in the export format of every annotation tool."""

import csv
import io
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from crowdray.data.sample import Sample
from crowdray.datasets import conversion
from crowdray.datasets.sources import Source, open_source
from crowdray.errors import UserError

from .builders import HEIGHT, WIDTH, jpeg

Heads = Mapping[str, list[tuple[float, float]]]
"""Heads by name of the photo."""

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


def write_csv(folder: Path, heads: Heads = HEADS) -> Path:
    """Write a CSV table; an empty photo is a row without coordinates."""
    lines = [f"{name},{x},{y}" for name, points in heads.items() for x, y in points]
    lines += [f"{name},," for name, points in heads.items() if not points]
    return csv_folder(folder, "\n".join(["image,x,y", *lines]) + "\n")


def coco(keypoints: Any = ("nose", "left_eye"), shift: float = 0.5, heads: Heads = HEADS) -> dict[str, Any]:
    """COCO keypoints: x, y and visibility of each, as pixel indices."""
    size = {"width": WIDTH, "height": HEIGHT}
    people = [(n, x - shift, y - shift) for n, name in enumerate(heads, 397133) for x, y in heads[name]]
    person = {"category_id": 1, "num_keypoints": 1, "area": 24, "iscrowd": 0, "segmentation": []}
    unmarked = [0, 0, 0] * (len(keypoints) - 1)
    annotations = [
        {**person, "id": n, "image_id": image, "keypoints": [x, y, 2, *unmarked], "bbox": [x - 1, y - 1, 4, 6]}
        for n, (image, x, y) in enumerate(people, 1)
    ]
    return {
        "info": {"year": 2026},
        "images": [{"id": n, "file_name": name, "license": 1, **size} for n, name in enumerate(heads, 397133)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "supercategory": "person", "keypoints": keypoints}],
    }


def write_coco(folder: Path, heads: Heads = HEADS) -> Path:
    """Write person keypoints in COCO's layout."""
    write_images(folder)
    write_json(folder / "annotations" / "person_keypoints.json", coco(heads=heads))
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


def write_label_studio(folder: Path, heads: Heads = HEADS) -> Path:
    """Write the JSON export of a project with uploaded photos."""
    write_images(folder)
    write_json(folder / "project-1-at-2026-03-09.json", [task(name, points) for name, points in heads.items()])
    return folder


def label_studio_records(heads: Heads = HEADS) -> list[dict[str, Any]]:
    """The records of JSON-MIN: a photo without heads has no field of the control."""
    records = []
    for number, (name, points) in enumerate(heads.items(), 1):
        record = {"image": f"/data/upload/1/0a1b2c3d-{name}", "id": number, "annotator": 1, "annotation_id": number}
        results = task(name, points)["annotations"][0]["result"]
        sizes = ("original_width", "original_height")
        shapes = [{**result["value"], **{size: result[size] for size in sizes}} for result in results]
        records.append(record | ({"kp": shapes} if shapes else {}) | {"updated_at": "2026-03-09T22:16:08.7Z"})
    return records


def write_label_studio_min(folder: Path, heads: Heads = HEADS) -> Path:
    write_json(write_images(folder) / "project.json", label_studio_records(heads))
    return folder


def csv_text(rows: list[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_label_studio_csv(folder: Path, heads: Heads = HEADS) -> Path:
    """Write the CSV export, in which lists are JSON."""
    rows = [
        {key: json.dumps(value) if isinstance(value, list) else value for key, value in record.items()}
        for record in label_studio_records(heads)
    ]
    columns = ["annotation_id", "annotator", "id", "image", "kp", "updated_at"]
    (write_images(folder) / "project.csv").write_text(csv_text(rows, columns))
    return folder


def via(heads: Heads = HEADS, attributes: Any = None) -> dict[str, Any]:
    """The JSON export of VIA 2."""
    regions = {
        name: [
            {"shape_attributes": {"name": "point", "cx": x, "cy": y}, "region_attributes": attributes or {}}
            for x, y in points
        ]
        for name, points in heads.items()
    }
    return {
        f"{name}9001": {"filename": name, "size": 9001, "regions": found, "file_attributes": {}}
        for name, found in regions.items()
    }


def write_via(folder: Path, heads: Heads = HEADS) -> Path:
    write_json(write_images(folder) / "via_export_json.json", via(heads))
    return folder


def write_via_project(folder: Path, heads: Heads = HEADS) -> Path:
    """Write a project of VIA 2; the regions of its photos are objects, as in VIA 1."""
    photos = via(heads)
    for photo in photos.values():
        photo["regions"] = {str(number): region for number, region in enumerate(photo["regions"])}
    project = {
        "_via_settings": {"project": {"name": "p"}},
        "_via_img_metadata": photos,
        "_via_image_id_list": [*photos],
    }
    write_json(write_images(folder) / "via_project.json", project)
    return folder


def write_via_csv(folder: Path, heads: Heads = HEADS) -> Path:
    """Write the CSV export of VIA 2; a photo without regions is a row of region_count 0."""
    columns = ["filename", "file_size", "file_attributes", "region_count", "region_id"]
    columns += ["region_shape_attributes", "region_attributes"]
    rows = []
    for photo in via(heads).values():
        regions = photo["regions"] or [{"shape_attributes": {}, "region_attributes": {}}]
        for number, region in enumerate(regions):
            cells = [json.dumps(region[f"{part}_attributes"]) for part in ("shape", "region")]
            values = [photo["filename"], 9001, "{}", len(photo["regions"]), number, *cells]
            rows.append(dict(zip(columns, values, strict=True)))
    (write_images(folder) / "via_export_csv.csv").write_text(csv_text(rows, columns))
    return folder


def write_text(folder: Path, heads: Heads = HEADS) -> Path:
    """Write x and y per line next to each photo."""
    write_images(folder)
    for name, points in heads.items():
        (folder / name).with_suffix(".txt").write_text("".join(f"{x} {y}\n" for x, y in points))
    return folder


def write_yolo(folder: Path, heads: Heads = HEADS) -> Path:
    """Write boxes of 4x3 pixels around the heads, in the folders of Ultralytics."""
    write_images(folder / "images")
    (folder / "labels").mkdir()
    for name, points in heads.items():
        lines = [f"0 {x / WIDTH:.9f} {y / HEIGHT:.9f} 0.125 0.125\n" for x, y in points]
        (folder / "labels" / name).with_suffix(".txt").write_text("".join(lines))
    (folder / "labels" / "classes.txt").write_text("head\n")
    (folder / "data.yaml").write_text("names: [head]\n")
    return folder


def voc_xml(image: str, shapes: str) -> str:
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><folder>p</folder><filename>{image}</filename>{size}{shapes}</annotation>"


def voc_box(left: float, top: float, right: float, bottom: float) -> str:
    sides = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    return f"<object><name>head</name><difficult>0</difficult><bndbox>{sides}</bndbox></object>"


def write_voc(folder: Path, heads: Heads = HEADS) -> Path:
    """Write boxes of 4x3 pixels around the heads, in VOC's folders."""
    write_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name, points in heads.items():
        shapes = "".join(voc_box(x - 2, y - 1.5, x + 2, y + 1.5) for x, y in points)
        (folder / "Annotations" / name).with_suffix(".xml").write_text(voc_xml(name, shapes))
    return folder


def write_cclabeler(folder: Path, heads: Heads = HEADS) -> Path:
    """Write cclabeler's files, and for the first photo NWPU's lists, with a box for each point."""
    write_images(folder / "images")
    for name, points in heads.items():
        if name == "a.jpg":
            boxes = [[x - 1, y - 1, x + 1, y + 1] for x, y in points]
            content = {"img_id": name, "human_num": len(points), "points": points, "boxes": boxes}
        else:
            objects = [{"x": x, "y": y} for x, y in points]
            content = {"img_id": name, "human_num": len(points), "boxes": [], "points": objects}
        write_json((folder / "jsons" / name).with_suffix(".json"), content)
    return folder


def supervisely(figures: Any) -> dict[str, Any]:
    """A Supervisely annotation with figures of (type, label, corners)."""
    objects = [
        {"geometryType": kind, "classTitle": label, "points": {"exterior": points, "interior": []}, "tags": []}
        for kind, label, points in figures
    ]
    return {"description": "", "tags": [], "size": {"height": HEIGHT, "width": WIDTH}, "objects": objects}


def write_supervisely(folder: Path, heads: Heads = HEADS) -> Path:
    """Write a project with one dataset; its points are pixel indices."""
    write_images(folder / "ds0" / "img")
    write_json(folder / "meta.json", {"classes": []})
    for name, points in heads.items():
        figures = [("point", "head", [[x - 0.5, y - 0.5]]) for x, y in points]
        write_json(folder / "ds0" / "ann" / f"{name}.json", supervisely(figures))
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


def write_cvat(folder: Path, heads: Heads = HEADS) -> Path:
    """Write a task exported as "CVAT for images 1.1"; the points of a photo are one shape."""
    write_images(folder / "images")
    images = [cvat_image(name, cvat_points(points) if points else "") for name, points in heads.items()]
    (folder / "annotations.xml").write_text(cvat_xml("".join(images)))
    return folder


def labelme(image: str, shapes: Any, **more: Any) -> dict[str, Any]:
    """A LabelMe file with shapes of (type, label, corners)."""
    listed = [{"label": label, "points": points, "shape_type": kind, "flags": {}} for kind, label, points in shapes]
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {"version": "5.5.0", "shapes": listed, "imagePath": image, "imageData": None, **size, **more}


def write_labelme(folder: Path, heads: Heads = HEADS) -> Path:
    """Write a file next to each photo."""
    write_images(folder)
    for name, points in heads.items():
        shapes = [("point", "head", [head]) for head in points]
        write_json((folder / name).with_suffix(".json"), labelme(name, shapes))
    return folder


@dataclass(frozen=True)
class Format:
    """A format of annotations."""

    source: str
    """Source that reads it."""
    write: Callable[..., Path]
    """Writes three photos and the given heads into a folder, as the tool does; returns the folder."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the source."""


FORMATS = {
    "csv": Format("csv", write_csv),
    "coco": Format("coco", write_coco),
    "label-studio": Format("label-studio", write_label_studio),
    "cvat": Format("cvat", write_cvat),
    "labelme": Format("labelme", write_labelme),
    "label-studio JSON-MIN": Format("label-studio", write_label_studio_min),
    "label-studio CSV": Format("label-studio", write_label_studio_csv),
    "text": Format("text", write_text),
    "via": Format("via", write_via),
    "via project": Format("via", write_via_project),
    "via CSV": Format("via", write_via_csv),
    "yolo": Format("yolo", write_yolo, {"boxes": "centre"}),
    "voc": Format("voc", write_voc, {"boxes": "centre"}),
    "cclabeler": Format("cclabeler", write_cclabeler),
    "supervisely": Format("supervisely", write_supervisely),
}
"""Formats by name."""


def open_format(name: str, folder: Path | str, **options: Any) -> Source:
    """Open a folder in a format, or with a source of that name."""
    form = FORMATS[name]
    return open_source(form.source, str(folder), **{**form.options, **options})


def load(name: str, folder: Path, **options: Any) -> dict[str, Sample]:
    source = open_format(name, folder, **options)
    return {item.name: source.load(item) for item in source.items()}


def heads(name: str, folder: Path, **options: Any) -> dict[str, list[tuple[float, ...]]]:
    return {key: [tuple(p) for p in sample.points.tolist()] for key, sample in load(name, folder, **options).items()}


def conversion_error(name: str, folder: Path, **options: Any) -> str:
    """Return the error of a folder that cannot be converted; nothing may be published."""
    made = folder.parent / f"made-{uuid.uuid4().hex}"
    with pytest.raises(UserError) as caught:
        conversion.convert(open_format(name, folder, **options), str(made), strict=True)
    assert not (made / "index.json").exists()
    return str(caught.value)
