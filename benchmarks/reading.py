"""Windows per second from JPEGs to batches: this loader, the usual recipe, and other data loading libraries.

All use the same images, cores and number of windows per decoded image. The other libraries return pixels and points; so
this loader is compared without depth, and also measured with it. If jpegtran is installed, this loader also reads the
images with restart markers (--restart-markers of jobs/convert.py). The other libraries require another version of torch
and run in a separate environment, whose Python --peers names; without it they are skipped:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install webdataset mosaicml-streaming litdata 'ray[data]' pydantic torch simplejpeg h5py \\
        opencv-python-headless pillow
    .venv/bin/python benchmarks/reading.py --peers /tmp/peers/bin/python
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.config import SamplingConfig
from crowdray.data.image_cache import ImageCache
from crowdray.data.loader import Loader
from crowdray.data.sampling import WindowConfig
from crowdray.data.shards import Dataset
from crowdray.data.targets import density_map

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("webdataset", "streaming", "litdata", "raydata")
CROP, BATCH = 224, 32


def render(folder: Path, images: int) -> None:
    """Convert synthetic scenes of 1024x768 pixels."""
    convert = [sys.executable, str(ROOT / "jobs" / "convert.py"), "synthetic", "--dest", str(folder)]
    convert += ["--train", str(images), "--test", "1", "--width", "1024", "--height", "768"]
    subprocess.run(convert, check=True, capture_output=True)


def add_restart_markers(dataset: Dataset, folder: Path) -> Dataset:
    """Convert the training images of a dataset again, with restart markers."""
    convert = [sys.executable, str(ROOT / "jobs" / "convert.py"), "crowdray", "--source", dataset.uri]
    convert += ["--dest", str(folder), "--split", "train", "--restart-markers"]
    subprocess.run(convert, check=True, capture_output=True)
    return Dataset.open(str(folder))


def export_files(dataset: Dataset, folder: Path, limit: int | None = None) -> None:
    """Write up to `limit` training images, their points, and the density maps of the usual recipe as files."""
    for name in ("images", "points", "maps"):
        (folder / name).mkdir()
    for row in dataset.rows("train")[:limit].tolist():
        sample = dataset.sample(row)
        points = np.array(sample.points)
        (folder / "images" / f"{row:05d}.jpg").write_bytes(sample.image)
        np.save(folder / "points" / f"{row:05d}.npy", points)
        heads = torch.from_numpy(points)[None]
        density = density_map(heads, torch.ones(heads.shape[:2]), (sample.height, sample.width), sigma=4.0)
        with h5py.File(folder / "maps" / f"{row:05d}.h5", "w") as file:
            file["density"] = density[0, 0].numpy()


def measure_loader(dataset: Dataset, crops: int, epochs: int, cache_bytes: float = 0, depth: bool = False) -> float:
    """Windows per second of the loader: median of the epochs after the first."""
    windows = WindowConfig(SamplingConfig(crop=CROP, context=0, batch=BATCH, crops_per_image=crops), margin=0, stride=8)
    cache = ImageCache(dataset, 1, False, cache_bytes)
    loader = Loader(cache, dataset.rows("train"), windows, ahead=4)
    rates = []
    for epoch in range(1 + epochs):
        started = time.perf_counter()
        count = sum(len(batch.rows) for batch in loader.epoch(epoch, depth))
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def measure_peer(python: str, reader: str, folder: Path, crops: int, epochs: int, workers: int) -> float:
    """Windows per second of another library: median of the epochs after the first."""
    command = [python, str(ROOT / "benchmarks" / "peers" / "reading.py"), reader, str(folder), "--crop", str(CROP)]
    command += ["--crops", str(crops), "--batch", str(BATCH), "--epochs", str(epochs), "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{reader}: {done.stderr[-2000:]}")
    return float(statistics.median(json.loads(done.stdout.strip().splitlines()[-1])["rates"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="converted dataset of 1024x768 images; by default, synthetic scenes")
    parser.add_argument("--images", type=int, default=160, help="number of synthetic scenes")
    parser.add_argument("--epochs", type=int, default=3, help="measured epochs, after a first one")
    parser.add_argument("--peers", help="Python interpreter with the other libraries; by default they are skipped")
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
        export_files(dataset, folder)
        marked = add_restart_markers(dataset, Path(scratch) / "marked") if shutil.which("jpegtran") else None
        if marked is None:
            print("jpegtran is not installed: restart markers are not measured")
        print(f"{len(dataset.rows('train'))} images, {cores} cores, batches of {BATCH} windows of {CROP}x{CROP}")
        for crops in (1, 4):
            rates = {"this loader": measure_loader(dataset, crops, arguments.epochs)}
            if marked:
                rates["this loader, restart markers"] = measure_loader(marked, crops, arguments.epochs)
            for reader in arguments.readers if arguments.peers else ():
                if reader == "usual" and crops > 1:
                    continue  # it cuts one window per decoding
                rates[reader] = measure_peer(arguments.peers, reader, folder, crops, arguments.epochs, cores)
            rates["this loader, with depth"] = measure_loader(dataset, crops, arguments.epochs, depth=True)
            rates["this loader, images cached"] = measure_loader(dataset, crops, arguments.epochs, 2**34)
            print(f"  windows/s, {crops} per decoded image")
            own = [rates["this loader"], rates.get("this loader, restart markers", float("nan"))]
            for name, rate in rates.items():
                plain, with_markers = (f"{value / rate:.2f}" for value in own)
                print(f"    {name:30} {rate:8.0f}   this loader is {plain} ({with_markers}) times as fast")
    print("  in brackets: with restart markers (goal: 1.8 times the best other library, one window per decoded image)")
    print("  goals: 10 times the usual recipe, 1.2 times the best other library")


if __name__ == "__main__":
    main()
