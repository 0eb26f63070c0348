"""Training samples/s from JPEGs to batches: the loader against the usual recipe and against other readers.

All on the same images, the same cores, with the same windows per decoded image. The others hand over pixels and points;
so ours is compared without depth, as in the stage that learns nothing from it, and shown with it too. The other readers
need packages that pull another torch, so they run in an environment of their own, whose Python is given; without it
they are left out:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install webdataset mosaicml-streaming litdata 'ray[data]' pydantic torch simplejpeg h5py \\
        opencv-python-headless pillow
    python benchmarks/reading.py --peers /tmp/peers/bin/python
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.data.image_cache import ImageCache
from crowdray.data.loader import Loader
from crowdray.data.sampling import WindowConfig
from crowdray.data.shards import Dataset
from crowdray.data.targets import density_map

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("webdataset", "streaming", "litdata", "raydata")
CROP, BATCH = 224, 32


def render(place: Path, images: int) -> None:
    """A dataset of synthetic scenes, photos of 1024x768."""
    convert = [sys.executable, str(ROOT / "jobs" / "convert.py"), "synthetic", "--dest", str(place)]
    convert += ["--train", str(images), "--test", "1", "--width", "1024", "--height", "768"]
    subprocess.run(convert, check=True, capture_output=True)


def lay_out(dataset: Dataset, folder: Path, most: int | None = None) -> None:
    """The training images, so many at most, as files, with their points and the density maps of the usual recipe."""
    for name in ("images", "points", "maps"):
        (folder / name).mkdir()
    for row in dataset.rows("train")[:most].tolist():
        sample = dataset.sample(row)
        points = np.array(sample.points)
        (folder / "images" / f"{row:05d}.jpg").write_bytes(sample.image)
        np.save(folder / "points" / f"{row:05d}.npy", points)
        heads = torch.from_numpy(points)[None]
        density = density_map(heads, torch.ones(heads.shape[:2]), (sample.height, sample.width), sigma=4.0)
        with h5py.File(folder / "maps" / f"{row:05d}.h5", "w") as file:
            file["density"] = density[0, 0].numpy()


def ours(dataset: Dataset, crops: int, epochs: int, cache_bytes: float = 0, depth: bool = False) -> float:
    """Windows/s of the loader, the median of the epochs after the first."""
    rule = WindowConfig(crop=CROP, context=0, margin=0, stride=8, flip=0.5)
    store = ImageCache(dataset, 1, False, cache_bytes)
    loader = Loader(store, dataset.rows("train"), rule, batch=BATCH, repeats=crops, ahead=4)
    rates = []
    for epoch in range(1 + epochs):
        started = time.perf_counter()
        windows = sum(len(batch.rows) for batch in loader.epoch(epoch, depth))
        rates.append(windows / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def theirs(python: str, reader: str, folder: Path, crops: int, epochs: int, workers: int) -> float:
    """Windows/s of another reader, the median of the epochs after the first."""
    command = [python, str(ROOT / "benchmarks" / "peers" / "reading.py"), reader, str(folder), "--crop", str(CROP)]
    command += ["--crops", str(crops), "--batch", str(BATCH), "--epochs", str(epochs), "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{reader}: {done.stderr[-2000:]}")
    return float(statistics.median(json.loads(done.stdout.strip().splitlines()[-1])["rates"]))


def decoding(dataset: Dataset) -> dict[str, float]:
    """Milliseconds to decode one image, by library."""
    encoded = [bytes(dataset.sample(row).image) for row in dataset.rows("train")[:40].tolist()]
    decoders: dict[str, Callable[[bytes], NDArray[np.uint8]]] = {
        "simplejpeg": lambda content: simplejpeg.decode_jpeg(content, colorspace="RGB"),
        "Pillow": lambda content: np.asarray(Image.open(io.BytesIO(content)).convert("RGB")),
    }
    taken: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(3):
        for name, decode in decoders.items():
            started = time.perf_counter()
            for content in encoded:
                decode(content)
            taken[name].append(1e3 * (time.perf_counter() - started) / len(encoded))
    return {name: min(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a converted dataset of 1024x768 photos; without it, scenes are rendered")
    parser.add_argument("--images", type=int, default=160, help="how many are rendered")
    parser.add_argument("--epochs", type=int, default=3, help="epochs that count, after a first one")
    parser.add_argument("--peers", help="a Python that has the other readers; without it they are left out")
    parser.add_argument("--readers", nargs="*", default=["usual", *PEERS])
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.data is None:
            render(Path(scratch) / "data", arguments.images)
        dataset = Dataset.open(arguments.data or str(Path(scratch) / "data"))
        folder = Path(scratch) / "files"
        folder.mkdir()
        lay_out(dataset, folder)
        decode = decoding(dataset)
        print(f"{len(dataset.rows('train'))} images, {cores} cores, batches of {BATCH} windows of {CROP}x{CROP}")
        print("  a decoding: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in decode.items()))
        for crops in (1, 4):
            rates = {"ours": ours(dataset, crops, arguments.epochs)}
            for reader in arguments.readers if arguments.peers else ():
                if reader == "usual" and crops > 1:
                    continue  # it cuts one window a decoding
                rates[reader] = theirs(arguments.peers, reader, folder, crops, arguments.epochs, cores)
            rates["ours, with depth"] = ours(dataset, crops, arguments.epochs, depth=True)
            rates["ours, decoded pictures cached"] = ours(dataset, crops, arguments.epochs, 2**34)
            print(f"  windows/s, {crops} of each decoded image")
            for name, rate in rates.items():
                print(f"    {name:30} {rate:8.0f}   ours is {rates['ours'] / rate:.2f} times this")
    print("  goals: 10 times the usual recipe, 1.2 times the best of the others")


if __name__ == "__main__":
    main()
