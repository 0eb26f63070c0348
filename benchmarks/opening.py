"""Opening a dataset of many rows: seconds and memory to open it, to read its splits, and to read one column of all."""

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


def many(rows: int, place: Path) -> None:
    """A dataset of small rows, each shard the first one under another name."""
    points = np.zeros((20, 2), np.float32)
    one = [
        Sample(f"image-{n:06d}", "train", "scene", bytes(64), 8, 8, points, None, None, "0" * 64)
        for n in range(ROWS_PER_SHARD)
    ]
    first = write_shard(one, str(place), 0)
    shards = [first]
    for number in range(1, rows // ROWS_PER_SHARD + 1):
        name = first.path.replace("00000", f"{number:05d}", 1)
        (place / name).hardlink_to(place / first.path)
        shards.append(ShardInfo(name, first.rows, first.bytes, first.sha256, first.runs, first.heads))
    write_index(str(place), shards, source="many", depth_teacher="none")


def measured(what: str, work: Callable[[], object]) -> None:
    """Do it, and print what it took."""
    before, started, used = own_mib(), time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    print(
        f"  {what:<32} {seconds:6.2f} s ({cpu:.2f} s of CPU), {own_mib() - before:6.1f} MiB more of its own, "
        f"{memory_mib('VmRSS'):.0f} MiB with all that is mapped"
    )


def own_mib() -> float:
    """Memory of this process, in MiB, without the pages of mapped files, which the system takes back at will."""
    return memory_mib("RssAnon")


def memory_mib(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    with tempfile.TemporaryDirectory(prefix="crowdray-many-") as folder:
        made = multiprocessing.Process(target=many, args=(parser.parse_args().rows, Path(folder)))
        made.start()  # what making it takes is not counted
        made.join()
        opened: list[Dataset] = []
        measured("open", lambda: opened.append(Dataset.open(storage.resolve(folder))))
        (dataset,) = opened
        print(f"  {len(dataset)} rows in {len(dataset.index.shards)} shards")
        measured("rows of a split", lambda: dataset.rows("train"))
        measured("one sample", lambda: dataset.sample(len(dataset) // 2))
        measured("counts, which opens each shard", lambda: dataset.counts("train"))
        measured("sizes", lambda: dataset.sizes("train"))
        measured("names", lambda: dataset.strings("name", "train"))


if __name__ == "__main__":
    main()
