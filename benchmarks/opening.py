"""Time and memory to open a dataset of many rows and to read its splits and columns."""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray import storage
from crowdray.data.sample import Sample
from crowdray.data.shards import Dataset, ShardInfo, write_index, write_shard
from crowdray.datasets.conversion import ROWS_PER_SHARD


def make_dataset(rows: int, folder: Path) -> None:
    """Write a dataset of small rows, all of whose shards are links to the first."""
    points = np.zeros((20, 2), np.float32)
    samples = [
        Sample(f"image-{n:06d}", "train", "scene", bytes(64), 8, 8, points, None, None, "0" * 64)
        for n in range(ROWS_PER_SHARD)
    ]
    first = write_shard(samples, str(folder), 0)
    shards = [first]
    for number in range(1, rows // ROWS_PER_SHARD + 1):
        name = first.path.replace("00000", f"{number:05d}", 1)
        (folder / name).hardlink_to(folder / first.path)
        shards.append(ShardInfo(name, first.rows, first.bytes, first.sha256, first.runs, first.heads))
    write_index(str(folder), shards, source="many", depth_teacher="none")


def measure(name: str, function: Callable[[], object]) -> None:
    """Call a function and print its time and memory."""
    # Mapped files do not count: the system can reclaim their pages.
    before, started, used = memory_mib("RssAnon"), time.perf_counter(), time.process_time()
    function()
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    private, resident = memory_mib("RssAnon") - before, memory_mib("VmRSS")
    print(f"  {name:<32} {seconds:6.2f} s ({cpu:.2f} s of CPU), {private:6.1f} MiB more private memory, ", end="")
    print(f"{resident:.0f} MiB resident with mapped files")


def memory_mib(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    with tempfile.TemporaryDirectory(prefix="crowdray-many-") as folder:
        process = multiprocessing.Process(target=make_dataset, args=(parser.parse_args().rows, Path(folder)))
        process.start()  # keeps its memory out of the measurement
        process.join()
        opened: list[Dataset] = []
        measure("open", lambda: opened.append(Dataset.open(storage.resolve(folder))))
        (dataset,) = opened
        print(f"  {len(dataset)} rows in {len(dataset.index.shards)} shards")
        measure("rows of a split", lambda: dataset.rows("train"))
        measure("one sample", lambda: dataset.sample(len(dataset) // 2))
        measure("counts, which opens each shard", lambda: dataset.counts("train"))
        measure("sizes", lambda: dataset.sizes("train"))
        measure("names", lambda: dataset.strings("name", "train"))


if __name__ == "__main__":
    main()
