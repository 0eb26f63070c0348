"""Tiny copies of public datasets in their official layouts, with every known quirk."""

import io
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from .builders import HEIGHT, WIDTH, encode, jpeg, make_mall, make_shanghaitech

HDF5_START = b"\x89HDF\r\n\x1a\n"
Files = dict[str, bytes]
"""Contents by path below the dataset's root."""

HEADS = [[3.0, 4.0], [10.25, 20.5], [31.0, 23.75]]
OUTSIDE = [[-2.0, 5.0], [WIDTH + 4.5, 6.0]]

SCENE_A, SCENE_DASH = "100156_A02-03-S2010_1", "104242-D05-02_3"
BAD_TRAIN = "500674_E05-03-S20100717083000000E20100717233000000_5_clip1_2"
BAD_TEST = "104207_1-04-S20100821071000000E20100821120000000_034550"
S1, S2 = "104207_1-04_000001", "200608_C08-02_7"


def in_bucket(files: Mapping[str, bytes]) -> str:
    """Write files to a bucket in memory, and return its URI."""
    root = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe({f"{root}/{path}": content for path, content in files.items()})
    return root


def files_below(folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def below(uri: str) -> str:
    """Path of a file relative to its bucket."""
    return uri.removeprefix("memory://").split("/", 1)[1]


def mat(**variables: Any) -> bytes:
    """Content of a MATLAB file of version 5."""
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def hdf5(**variables: Any) -> bytes:
    """Content of a MATLAB file of version 7.3.

    A dict becomes a struct and a list a cell; arrays are stored transposed, and empty ones as their shape.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", userblock_size=512) as file:
        for name, value in variables.items():
            _put(file, name, value)
    content = buffer.getvalue()
    return b"MATLAB 7.3 MAT-file".ljust(512, b" ") + content[512:]


def _put(group: Any, name: str, value: Any) -> None:
    if isinstance(value, dict):
        struct = group.create_group(name)
        struct.attrs["MATLAB_class"] = np.bytes_("struct")
        for field, inner in value.items():
            _put(struct, field, inner)
    elif isinstance(value, list):
        names = [f"#refs#/{uuid.uuid4().hex}" for _ in value]
        for path, inner in zip(names, value, strict=True):
            _put(group.file, path, inner)
        references = np.array([group.file[path].ref for path in names], dtype=h5py.ref_dtype)
        group.create_dataset(name, data=references[:, None]).attrs["MATLAB_class"] = np.bytes_("cell")
    else:
        values = np.atleast_2d(np.asarray(value, dtype=np.float64))
        stored = values.T if values.size else np.array(values.shape, dtype=np.uint64)
        dataset = group.create_dataset(name, data=stored)
        dataset.attrs["MATLAB_class"] = np.bytes_("double")
        if not values.size:
            dataset.attrs["MATLAB_empty"] = np.uint8(1)


def grey_image(seed: int, form: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    return encode(Image.fromarray(pixels), form)


def pixels_per_metre() -> np.ndarray[Any, Any]:
    """(HEIGHT, WIDTH) map that grows from 2 at the top to 6 at the bottom."""
    return np.linspace(2, 6, HEIGHT)[:, None] * np.ones((1, WIDTH))


def worldexpo() -> Files:
    """Two training scenes, one with a dash, two test scenes, both MATLAB formats, two bad labels."""
    corners = {
        "maskVerticesXCoordinates": np.array([[5.0], [21.0], [21.0], [5.0]]),
        "maskVerticesYCoordinates": np.array([[3.0], [3.0], [15.0], [15.0]]),
    }
    files: Files = {}
    labels: list[tuple[str, str, Callable[..., bytes], Any]] = [
        ("train", SCENE_A, mat, HEADS),
        ("train", BAD_TRAIN, mat, HEADS),
        ("train", SCENE_DASH, hdf5, HEADS[:2]),
        ("test", S1, hdf5, np.zeros((0, 0))),
        ("test", BAD_TEST, mat, HEADS),
        ("test", S2, mat, HEADS[1:]),
    ]
    for number, (split, name, write, heads) in enumerate(labels):
        scene = name[:6]
        folder = f"{split}_frame/{scene}" if split == "test" else f"{split}_frame"
        files[f"{folder}/{name}.jpg"] = jpeg(number)
        label = write(point_position=np.array(heads), point_num=np.array([[len(heads)]]))
        files[f"{split}_label/{scene}/{name}.mat"] = label
        files[f"{split}_label/{scene}/roi.mat"] = write(**corners)
        files[f"{split}_perspective/{scene}.mat"] = write(pMap=pixels_per_metre())
    return files


def ucsd(frames: int = 2) -> Files:
    """Ten clips of a few frames with 0 to 3 heads each; `frame` in even clips, `fgt.frame` in odd."""
    files = {}
    for clip in range(10):
        cell = np.empty((1, frames), dtype=object)
        for frame in range(frames):
            heads = np.array(HEADS)[: (clip + frame) % 4]
            located = np.hstack([heads, np.full((len(heads), 1), 7.0)])
            cell[0, frame] = {"loc": located if len(heads) else np.zeros((0, 0))}
            files[f"ucsdpeds/vidf/vidf1_33_{clip:03d}.y/vidf1_33_{clip:03d}_f{frame + 1:03d}.png"] = grey_image(
                clip, "PNG"
            )
        content = mat(fgt={"frame": cell}) if clip % 2 else mat(frame=cell)
        files[f"vidf-cvpr/vidf1_33_{clip:03d}_frame_full.mat"] = content
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[:, :20] = 1
    corners = {"xi": np.array([[1.0], [20.0]]), "yi": np.array([[1.0], [24.0]])}
    files["vidf-cvpr/vidf1_33_roi_mainwalkway.mat"] = mat(roi={"mask": mask, **corners})
    area = pixels_per_metre() ** 2
    files["vidf-cvpr/vidf1_33_dmap3.mat"] = mat(dmap={"pmapx": area**0.5, "pmapy": area**0.5, "pmapxy": area})
    files["ucsdpeds/vidf/vidf1_33_010.y/vidf1_33_010_f001.png"] = grey_image(99, "PNG")  # a clip without annotation
    return files


def ucf_cc_50() -> Files:
    """Fifty grey images; image n has n % 3 heads, except that number 7 has two outside its bounds."""
    files = {}
    for number in range(1, 51):
        files[f"{number}.jpg"] = grey_image(number, "JPEG")
        files[f"{number}_ann.mat"] = mat(annPoints=np.array(OUTSIDE if number == 7 else HEADS[: number % 3]))
    return files


def ucf_qnrf() -> Files:
    """Two training images, the second 200 pixels wide and 90 high, and one test image."""
    return {
        "Train/img_0001.jpg": jpeg(1),
        "Train/img_0001_ann.mat": mat(annPoints=np.array(HEADS)),
        "Train/img_0002.jpg": jpeg(2, 90, 200),
        "Train/img_0002_ann.mat": mat(annPoints=np.array([[100.5, 45.5], [200.5, 90.5]])),
        "Test/img_0001.jpg": jpeg(3),
        "Test/img_0001_ann.mat": mat(annPoints=np.array(HEADS[:1])),
    }


def jhu() -> Files:
    """Three splits, with an image without heads, whose gt file is empty, and a scene with commas."""
    return {
        "train/images/0001.jpg": jpeg(1),
        "train/gt/0001.txt": b"",
        "train/images/0002.jpg": jpeg(2),
        "train/gt/0002.txt": b"3 4 5 6 1 0\n10 20 7 8 2 0 \n",
        "train/image_labels.txt": b"0001,0,street, market, night,0,0\n0002,2,stadium,2,0\n",
        "val/images/0003.jpg": jpeg(3),
        "val/gt/0003.txt": b"31 23 5 6 3 1\r\n",
        "val/image_labels.txt": b"0003,1,stadium,0,1\n",
        "test/images/0004.jpg": jpeg(4),
        "test/gt/0004.txt": b"0 0 1 1 1 0\n",
        "test/image_labels.txt": b"0004,1,protest,0,0\n",
    }


def nwpu() -> Files:
    """Lists in their own order; JSON, MATLAB or both; an empty image; an unlabelled test split."""
    boxes = [[x - 1, y - 1, x + 1, y + 1] for x, y in HEADS]
    both = {"img_id": "0003.jpg", "human_num": 3, "points": HEADS, "boxes": boxes}
    empty = {"img_id": "0002.jpg", "human_num": 0, "points": [], "boxes": []}
    return {
        "train.txt": b"0003 1 2\n0002 0 0\n",
        "val.txt": b"0001 2 1\n",
        "test.txt": b"0004 0 1\n0005 1 1\n",
        **{f"images/{number:04d}.jpg": jpeg(number) for number in range(1, 6)},
        "jsons/0003.json": json.dumps(both).encode(),
        "mats/0003.mat": mat(annPoints=np.array(HEADS)),
        "jsons/0002.json": json.dumps(empty).encode(),
        "mats/0001.mat": mat(annPoints=np.array(HEADS[:2])),
    }


LAYOUTS: dict[str, Callable[[Path], Files]] = {
    "mall": lambda folder: files_below(make_mall(folder)),
    "shanghaitech": lambda folder: files_below(make_shanghaitech(folder, count=4)),
    "worldexpo": lambda _: worldexpo(),
    "ucsd": lambda _: ucsd(),
    "ucf-cc-50": lambda _: ucf_cc_50(),
    "ucf-qnrf": lambda _: ucf_qnrf(),
    "jhu": lambda _: jhu(),
    "nwpu": lambda _: nwpu(),
}
"""Builders of tiny copies by source; some use the given folder, which does not exist yet."""
