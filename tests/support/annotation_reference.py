"""Reference readers of annotation formats and converted datasets: heads (N, 2) of an item in continuous pixels.

They assume that every shape is a head.
"""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crowdray.datasets.sources import Item

from .published import below

Files = Mapping[str, bytes]
Array = NDArray[Any]


def csv_heads(files: Files, item: Item) -> Array:
    text = files[below(item.annotation)].decode("utf-8-sig")
    header, *rows = ([cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline="")))
    image, x, y = (list(map(str.lower, header)).index(name) for name in ("image", "x", "y"))
    rows = [row for row in rows if any(row)]
    name = list(dict.fromkeys(row[image] for row in rows))[item.number]
    return heads(item, name, [(row[x], row[y]) for row in rows if row[image] == name and row[x]])


def coco_heads(files: Files, item: Item) -> Array:
    content = json.loads(files[below(item.annotation)])
    image = content["images"][item.number]
    triples = [one["keypoints"][:3] for one in content["annotations"] if one["image_id"] == image["id"]]
    return heads(item, image["file_name"], [(x + 0.5, y + 0.5) for x, y, visible in triples if visible > 0])


def label_studio_heads(files: Files, item: Item) -> Array:
    task = json.loads(files[below(item.annotation)])[item.number]
    (annotation,) = task["annotations"]
    shapes = [(one["value"], one["original_width"], one["original_height"]) for one in annotation["result"]]
    points = [(value["x"] * width / 100, value["y"] * height / 100) for value, width, height in shapes]
    (name,) = task["data"].values()
    return heads(item, name, points)


def cvat_heads(files: Files, item: Item) -> Array:
    image = ElementTree.fromstring(files[below(item.annotation)]).findall("image")[item.number]
    points = [pair.split(",") for shape in image for pair in shape.attrib["points"].split(";")]
    return heads(item, image.attrib["name"], points)


def labelme_heads(files: Files, item: Item) -> Array:
    shapes = json.loads(files[below(item.annotation)])["shapes"]
    return heads(item, item.name, [point for shape in shapes for point in shape["points"]])


def converted_heads(files: Files, item: Item) -> Array:
    shards = [pa.ipc.open_file(content).read_all() for path, content in files.items() if path.endswith(".arrow")]
    rows = [row for shard in shards for row in shard.select(["split", "name", "points"]).to_pylist()]
    (points,) = (row["points"] for row in rows if (row["split"], row["name"]) == (item.split, item.name))
    return np.reshape(points, (-1, 2))


def heads(item: Item, name: str, points: Any) -> Array:
    """Return the points as an array; `name` in the file must match the item."""
    assert PurePosixPath(name).stem.endswith(PurePosixPath(item.name).stem), (name, item)
    return np.array(points, dtype=np.float64).reshape(-1, 2)
