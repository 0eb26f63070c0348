"""Conversion of JPEGs on one core: images/s compared with decoding only and writing only, and peak memory.

The images are synthetic, 1024x768, in ShanghaiTech's layout; --source takes a part of the real dataset instead. The
methods alternate within each round. Peak memory is measured in new processes that convert n and 4n images.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from scipy.io import savemat

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.data.sample import check_image, decode_image
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
            multiply(Path(source), Path(folder, "four", "part_B"), 4)
            peaks = [peak(path, f"{folder}/made") for path in (source, f"{folder}/four/part_B")]
            print(f"  peak memory of {arguments.images} images {peaks[0]} MB, of {4 * arguments.images} {peaks[1]} MB")


def rates(source: str, dest: str) -> None:
    """Print images/s of each method in wall-clock and processor time, and ratios of medians."""
    images = [Path(item.image).read_bytes() for item in open_source("shanghaitech", source, depth="none").items()]
    work: dict[str, Callable[[], None]] = {
        "decode": lambda: decode(images),
        "check": lambda: check(images),
        "write": lambda: write(images, f"{dest}.bytes"),
        "convert": lambda: convert(source, dest),
    }
    seconds: dict[str, list[tuple[float, float]]] = {method: [] for method in work}
    for _ in range(ROUNDS):
        for method, run in work.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[method].append((time.perf_counter() - clock, time.process_time() - cpu))
    size = sum(map(len, images)) / len(images)
    print(f"{len(images)} JPEGs of {size / 1024:.0f} KiB, medians of {ROUNDS} rounds, images/s")
    for number, name in enumerate(("wall-clock time", "processor time")):
        rate = {method: len(images) / sorted(pair[number] for pair in seconds[method])[ROUNDS // 2] for method in work}
        slower = min(rate["check"], rate["write"])
        print(f"  {name}: " + ", ".join(f"{method} {images_per_s:.0f}" for method, images_per_s in rate.items()))
        print(f"    convert / slower of check and write: {rate['convert'] / slower:.2f} (goal 0.8)")


def decode(images: list[bytes]) -> None:
    """Decode as training does."""
    for image in images:
        decode_image(image)


def check(images: list[bytes]) -> None:
    """Decode as conversion does."""
    for image in images:
        check_image(image)


def convert(source: str, dest: str) -> None:
    conversion.convert(open_source("shanghaitech", source, depth="none"), dest, overwrite=True)
    shutil.rmtree(dest)


def write(images: list[bytes], path: str) -> None:
    """Write the images' bytes to one file, and flush it to disk."""
    with open(path, "wb") as file:
        for image in images:
            file.write(image)
        file.flush()
        os.fsync(file.fileno())
    os.remove(path)


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


def multiply(part: Path, larger: Path, times: int) -> None:
    """Link the files of a part under several names each."""
    for file in part.rglob("*.*"):
        for number in range(times):
            link = larger / file.relative_to(part).with_name(f"{file.stem}{number:02d}{file.suffix}")
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, link)


if __name__ == "__main__":
    main()
