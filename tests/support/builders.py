"""Builders of small datasets in official layouts, for tests of sources, conversion and faults."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from crowdray.data.sample import Sample, encode_depth, encode_roi, make_sample
from crowdray.data.shards import ROWS_PER_BATCH, Dataset, write_index, write_shard
from crowdray.datasets.depth.teacher import DepthInput

HEIGHT, WIDTH = 24, 32


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Encode an image in a format of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(seed: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content: bytes = simplejpeg.encode_jpeg(pixels, quality=80)
    return content


def heads(seed: int, count: int) -> NDArray[np.float64]:
    """(count, 2) MATLAB coordinates inside the image."""
    return np.random.default_rng(seed + 1000).uniform(1, [WIDTH, HEIGHT], (count, 2))


def samples(count: int, split: str = "train", *, seed: int = 0) -> list[Sample]:
    """Samples of different sizes and head counts, including 0; every third without ROI and depth."""
    result = []
    for number in range(count):
        size, masks = (HEIGHT + number % 3, WIDTH + number % 5), number % 3 > 0
        depth = size if masks else None
        result.append(noise_sample(number, split, size, number % 7, roi=masks, depth=depth, seed=seed))
    return result


def noise_sample(
    number: int, split: str, size: tuple[int, int], heads: int, *, roi: bool, depth: Any, seed: int = 0
) -> Sample:
    """Noise of a size (H, W) with random heads, a random region of interest, and random depth (h, w) or None."""
    rng = np.random.default_rng([seed, number])
    return make_sample(
        name=f"{number:03d}",
        split=split,
        scene=f"scene-{number % 2}",
        image=jpeg(seed * 10_000 + number, *size),
        points=rng.uniform(0, size[::-1], (heads, 2)),
        roi=encode_roi(rng.random(size) < 0.5) if roi else None,
        depth=encode_depth(rng.uniform(1, 9, depth)) if depth else None,
    )


def mixed_samples() -> list[Sample]:
    """More samples than one record batch has rows, with two splits."""
    return samples(ROWS_PER_BATCH + 9) + samples(5, "test", seed=1)


def write_dataset(uri: str, listed: Sequence[Sample], rows_per_shard: int = 40) -> Dataset:
    """Write samples as a dataset."""
    starts = range(0, len(listed), rows_per_shard)
    shards = [write_shard(listed[k : k + rows_per_shard], uri, n) for n, k in enumerate(starts)]
    write_index(uri, shards, source="listed", depth_teacher="test")
    return Dataset.open(uri)


def sample_fields(sample: Sample) -> tuple[object, ...]:
    """All fields of a sample in a form that can be compared with ==."""
    copy = pickle.loads(pickle.dumps(sample))
    fields = (getattr(copy, name) for name in Sample.__slots__ if name != "points")
    return (*fields, copy.points.tobytes(), copy.points.shape, copy.points.dtype)


def make_depth_input(image: NDArray[np.uint8], name: str = "a", split: str = "train") -> DepthInput:
    """Input of a depth teacher: an image (H, W, 3) without heads."""
    content, points = encode(Image.fromarray(image)), np.zeros((0, 2))
    return DepthInput(sample=make_sample(name=name, split=split, scene="", image=content, points=points))


def make_mall(root: Path, frames: Sequence[int] = range(1, 7), annotated: int = 6) -> Path:
    """Write a Mall dataset of a few frames, numbered from 1; frame n has n - 1 heads."""
    (root / "frames").mkdir(parents=True)
    for number in frames:
        (root / "frames" / f"seq_{number:06d}.jpg").write_bytes(jpeg(number))
    frames_cell = np.empty((1, annotated), dtype=object)
    for number in range(annotated):
        frames_cell[0, number] = {"loc": heads(number, number)}
    savemat(root / "mall_gt.mat", {"frame": frames_cell, "count": np.arange(annotated)[:, None]})
    rows = np.arange(HEIGHT)[:, None] * np.ones((1, WIDTH))
    mask = np.ones((HEIGHT, WIDTH), dtype=np.uint8)
    savemat(root / "perspective_roi.mat", {"roi": {"mask": mask}, "pMapN": (0.5 + rows / HEIGHT) ** -2})
    return root


def make_shanghaitech(part: Path, split: str = "train", count: int = 12, annotations: str = "ground_truth") -> Path:
    """Write a part of ShanghaiTech with IMG_1 to IMG_count; image n has n - 1 heads."""
    folder = part / f"{split}_data"
    for name in ("images", annotations):
        (folder / name).mkdir(parents=True)
    for number in range(1, count + 1):
        (folder / "images" / f"IMG_{number}.jpg").write_bytes(jpeg(number))
        write_annotation(folder / annotations / f"GT_IMG_{number}.mat", heads(number, number - 1))
    return part


def write_annotation(path: Path, points: NDArray[np.float64]) -> None:
    """Write an annotation with ShanghaiTech's nesting: a cell with a struct of `location` and `number`."""
    cell = np.empty((1, 1), dtype=object)
    cell[0, 0] = {"location": points, "number": len(points)}
    savemat(path, {"image_info": cell})
