"""Conversion of JPEGs on one core: images/s compared with decoding and checking alone, and peak memory.

The images are synthetic, 1024x768, in ShanghaiTech's layout; --source takes a part of the real dataset instead. The
methods alternate within each round. Peak memory is measured in new processes that convert n and 4n images.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import simplejpeg
from scipy.io import savemat

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.data.decoding import check_image, decode_image
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source

HEIGHT, WIDTH, HEADS, ROUNDS = 768, 1024, 100, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--source", help="a part of ShanghaiTech instead of synthetic images")
    parser.add_argument("--peak", nargs=2, metavar=("SOURCE", "DEST"), help="convert and print the peak memory, MB")
    arguments = parser.parse_args()
    if arguments.peak:
        convert(*arguments.peak)
        lines = Path("/proc/self/status").read_text().splitlines()
        print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")))
        return
    with tempfile.TemporaryDirectory(prefix="crowdray-conversion-") as folder:
        source = arguments.source or make_images(f"{folder}/part_B", arguments.images)
        rates(source, f"{folder}/made")
        if arguments.source is None:
            larger = make_images(f"{folder}/four/part_B", 4 * arguments.images)
            peaks = [peak(path, f"{folder}/made") for path in (source, larger)]
            print(f"  peak memory of {arguments.images} images {peaks[0]} MB, of {4 * arguments.images} {peaks[1]} MB")


def rates(source: str, dest: str) -> None:
    """Print images/s of each method in processor time, and ratios of medians."""
    images = [Path(item.image).read_bytes() for item in open_source("shanghaitech", source, depth="none").items()]
    work: dict[str, Callable[[], object]] = {
        "decode": lambda: [decode_image(image) for image in images],  # as training does
        "check": lambda: [check_image(image) for image in images],  # as conversion does
        "convert": lambda: convert(source, dest),
    }
    seconds: dict[str, list[float]] = {method: [] for method in work}
    for _ in range(ROUNDS):
        for method, run in work.items():
            started = time.process_time()
            run()
            seconds[method].append(time.process_time() - started)
    rate = {method: len(images) / median(times) for method, times in seconds.items()}
    size = sum(map(len, images)) / len(images)
    print(f"{len(images)} JPEGs of {size / 1024:.0f} KiB, medians of {ROUNDS} rounds, images/s of processor time")
    print("  " + ", ".join(f"{method} {images_per_s:.0f}" for method, images_per_s in rate.items()))
    ratios = {method: f"{rate['convert'] / rate[method]:.2f}" for method in ("decode", "check")}
    print(f"  convert / decode: {ratios['decode']}, convert / check: {ratios['check']} (goal 0.8)")


def convert(source: str, dest: str) -> None:
    conversion.convert(open_source("shanghaitech", source, depth="none"), dest, overwrite=True)
    shutil.rmtree(dest)


def peak(source: str, dest: str) -> int:
    """Peak memory in MB of a new process that converts."""
    command = [sys.executable, __file__, "--peak", source, dest]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def make_images(part: str, count: int) -> str:
    """Write a part of ShanghaiTech: blobs with camera noise, with as many bytes per pixel as its photos."""
    rng = np.random.default_rng(0)
    blobs = rng.normal(128, 50, (HEIGHT // 16, WIDTH // 16, 3)).repeat(16, axis=0).repeat(16, axis=1)
    image = np.clip(blobs + rng.normal(0, 5, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    for name in ("images", "ground_truth"):
        Path(part, "train_data", name).mkdir(parents=True)
    for number in range(count):
        content = simplejpeg.encode_jpeg(np.roll(image, number, axis=1).copy(), quality=85)
        Path(part, "train_data", "images", f"IMG_{number}.jpg").write_bytes(content)
        info = np.empty((1, 1), dtype=object)
        info[0, 0] = {"location": rng.uniform(0, [WIDTH, HEIGHT], (HEADS, 2)), "number": HEADS}
        savemat(f"{part}/train_data/ground_truth/GT_IMG_{number}.mat", {"image_info": info})
    return part


if __name__ == "__main__":
    main()
