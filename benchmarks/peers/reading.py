"""Other data loading libraries on the same images, used as their documentation shows.

benchmarks/reading.py runs this in a separate environment, because they require another version of torch. Each decodes
with simplejpeg, cuts the same number of random windows from each decoded image, flips half of them with their points,
and returns batches: uint8 images (B, 3, H, W) and padded points (B, N, 2). Only `usual` is the common recipe of crowd
counting repositories: Pillow, an h5 density map of the whole image, cv2 to the output stride, one window per decoding.
"""

import argparse
import io
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader, Dataset

STRIDE = 8
PREFETCH = 4
MAX_HEADS = 1024


class WindowCutter:
    """Cuts windows from an encoded image with its points, and collates windows into batches."""

    def __init__(self, crop: int, crops: int) -> None:
        self.crop = crop
        self.crops = crops

    def __call__(self, jpeg: bytes, points: Any) -> list[tuple[Any, Any]]:
        image, found = simplejpeg.decode_jpeg(jpeg, colorspace="RGB"), []
        for _ in range(self.crops):
            top, left = (random.randint(0, side - self.crop) for side in image.shape[:2])
            window = image[top : top + self.crop, left : left + self.crop]
            moved = points - np.array([left, top], np.float32)
            moved = moved[((moved >= 0) & (moved < self.crop)).all(axis=1)]
            if random.random() < 0.5:
                window = window[:, ::-1]
                moved[:, 0] = self.crop - moved[:, 0]
            found.append((np.ascontiguousarray(window), moved))
        return found

    def collate(self, samples: Sequence[Sequence[tuple[Any, Any]]]) -> tuple[torch.Tensor, torch.Tensor]:
        windows = [window for sample in samples for window in sample]
        heads = np.zeros((len(windows), max(1, max(len(points) for _, points in windows)), 2), np.float32)
        for row, (_, points) in zip(heads, windows, strict=True):
            row[: len(points)] = points
        images = np.stack([image for image, _ in windows])
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(heads)


class Usual(Dataset[Any]):
    """One file per image and an h5 density map next to it; whole images with crop 0."""

    def __init__(self, folder: Path, cut: WindowCutter) -> None:
        self.images = sorted((folder / "images").glob("*.jpg"))
        self.crop = cut.crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        import cv2
        import h5py
        from PIL import Image

        path = self.images[index]
        image = np.asarray(Image.open(path).convert("RGB"))
        with h5py.File(path.parents[1] / "maps" / f"{path.stem}.h5", "r") as file:
            density = np.asarray(file["density"])
        height, width = (self.crop or side for side in image.shape[:2])
        top, left = random.randint(0, image.shape[0] - height), random.randint(0, image.shape[1] - width)
        window = (slice(top, top + height), slice(left, left + width))
        shown, target = image[window], density[window]
        if random.random() < 0.5:
            shown, target = shown[:, ::-1], target[:, ::-1]
        target = cv2.resize(target, (width // STRIDE, height // STRIDE), interpolation=cv2.INTER_CUBIC) * STRIDE**2
        pixels = torch.from_numpy(np.ascontiguousarray(shown)).permute(2, 0, 1).float() / 255
        return pixels, torch.from_numpy(target)


def usual(folder: Path, cut: WindowCutter, batch: int, workers: int) -> Callable[[], Iterable[Any]]:
    loader = DataLoader(
        Usual(folder, cut), batch, shuffle=True, num_workers=workers, persistent_workers=True, prefetch_factor=PREFETCH
    )
    return lambda: loader


def encoded(folder: Path) -> Iterator[tuple[str, bytes, Any]]:
    """Name, content and points of every image."""
    for path in sorted((folder / "images").glob("*.jpg")):
        yield path.stem, path.read_bytes(), np.load(folder / "points" / f"{path.stem}.npy")


def webdataset(folder: Path, cut: WindowCutter, batch: int, workers: int) -> Callable[[], Iterable[Any]]:
    import webdataset as wds

    shards = folder / "webdataset"
    shards.mkdir(exist_ok=True)
    rows = list(encoded(folder))
    for number in range(workers):
        with wds.TarWriter(str(shards / f"{number:04d}.tar")) as writer:
            for name, jpeg, points in rows[number::workers]:
                buffer = io.BytesIO()
                np.save(buffer, points)
                writer.write({"__key__": name, "jpg": jpeg, "npy": buffer.getvalue()})
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = (
        wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node, empty_check=False)
        .shuffle(64)
        .map(lambda row: cut(row["jpg"], np.load(io.BytesIO(row["npy"]))))
        .batched(batch // cut.crops, collation_fn=cut.collate)
    )
    loader = DataLoader(dataset, None, num_workers=workers, persistent_workers=True, prefetch_factor=PREFETCH)
    return lambda: loader


def streaming(folder: Path, cut: WindowCutter, batch: int, workers: int) -> Callable[[], Iterable[Any]]:
    from streaming import MDSWriter, StreamingDataset

    output = str(folder / "streaming")
    with MDSWriter(out=output, columns={"jpeg": "bytes", "points": "bytes"}, exist_ok=True) as writer:
        for _, jpeg, points in encoded(folder):
            writer.write({"jpeg": jpeg, "points": points.tobytes()})

    class Windows(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            row = super().__getitem__(at)
            return cut(row["jpeg"], np.frombuffer(row["points"], np.float32).reshape(-1, 2))

    images = batch // cut.crops
    dataset = Windows(local=output, shuffle=True, batch_size=images)
    loader: DataLoader[Any] = DataLoader(
        dataset, images, num_workers=workers, persistent_workers=True, prefetch_factor=PREFETCH, collate_fn=cut.collate
    )
    return lambda: loader


def litdata_row(row: tuple[str, bytes, Any]) -> dict[str, bytes]:
    return {"jpeg": row[1], "points": row[2].tobytes()}


def litdata_windows(cut: WindowCutter, row: dict[str, bytes]) -> list[tuple[Any, Any]]:
    return cut(row["jpeg"], np.frombuffer(row["points"], np.float32).reshape(-1, 2))


def litdata(folder: Path, cut: WindowCutter, batch: int, workers: int) -> Callable[[], Iterable[Any]]:
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    output = str(folder / "litdata")
    optimize(litdata_row, list(encoded(folder)), output_dir=output, chunk_bytes="32MB", num_workers=1, mode="overwrite")
    loader = StreamingDataLoader(
        StreamingDataset(output, shuffle=True, transform=partial(litdata_windows, cut)),
        batch_size=batch // cut.crops,
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=PREFETCH,
        collate_fn=cut.collate,
    )
    return lambda: loader


def raydata(folder: Path, cut: WindowCutter, batch: int, workers: int) -> Callable[[], Iterable[Any]]:
    import pyarrow as pa
    import pyarrow.parquet
    import ray

    rows = list(encoded(folder))
    shards = folder / "parquet"
    shards.mkdir(exist_ok=True)
    for number in range(workers):
        part = rows[number::workers]
        table = pa.table({"jpeg": [jpeg for _, jpeg, _ in part], "points": [points.tobytes() for _, _, points in part]})
        pyarrow.parquet.write_table(table, shards / f"{number}.parquet", row_group_size=16)
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def windows(rows: dict[str, Any]) -> dict[str, Any]:
        points = (np.frombuffer(content, np.float32).reshape(-1, 2) for content in rows["points"])
        found = [window for pair in zip(rows["jpeg"], points, strict=True) for window in cut(*pair)]
        heads = np.zeros((len(found), MAX_HEADS, 2), np.float32)  # blocks are concatenated, which requires equal shapes
        for row, (_, moved) in zip(heads, found, strict=True):
            row[: len(moved)] = moved
        return {"image": np.stack([image for image, _ in found]), "points": heads}

    dataset = ray.data.read_parquet(str(shards)).map_batches(windows, batch_size=batch // cut.crops)
    return lambda: dataset.iter_torch_batches(batch_size=batch, prefetch_batches=PREFETCH, drop_last=True)


READERS = {reader.__name__: reader for reader in (usual, webdataset, streaming, litdata, raydata)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--crops", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cut = WindowCutter(arguments.crop, arguments.crops)
    epoch = READERS[arguments.reader](arguments.folder, cut, arguments.batch, arguments.workers)
    rates = []
    for _ in range(1 + arguments.epochs):  # the first starts workers and fills the page cache
        windows, started = 0, time.perf_counter()
        for found in epoch():
            image = found["image"] if isinstance(found, dict) else found[0]
            windows += len(image)
        rates.append(windows / (time.perf_counter() - started))
    print(json.dumps({"rates": rates[1:]}), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
