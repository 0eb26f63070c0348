"""Rendering speed in images per minute on two processes, and the difficulty of the counts.

Difficulty: the error of two predictors without a network, the mean count and a linear fit on image statistics.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.data.sample import decode_image
from crowdray.datasets.sources import Item, open_source

WARM_UP = 64


def render(items: list[Item]) -> list[tuple[int, NDArray[np.float64]]]:
    """Return the number of heads and pixel statistics of each image."""
    source = open_source("synthetic", None)
    found = []
    for item in items:
        sample = source.load(item)
        grey = decode_image(sample.image).astype(np.float64).mean(axis=2)
        edges = np.hypot(*np.gradient(grey))
        found.append((len(sample.points), np.array([edges.mean(), (edges > 20).mean(), grey.mean(), grey.std(), 1.0])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    arguments = parser.parse_args()
    items = open_source("synthetic", None, train=arguments.images + 2 * WARM_UP, test=1).items(["train"])
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(render, [items[:WARM_UP], items[WARM_UP : 2 * WARM_UP]]))  # caches the backgrounds
        started = time.perf_counter()
        halves = list(pool.map(render, [items[2 * WARM_UP :: 2], items[2 * WARM_UP + 1 :: 2]]))
        seconds = time.perf_counter() - started
    counts = np.array([count for half in halves for count, _ in half], dtype=np.float64)
    statistics = np.array([values for half in halves for _, values in half])
    train = np.arange(len(counts)) % 4 > 0
    weights = np.linalg.lstsq(statistics[train], counts[train], rcond=None)[0]
    linear = np.abs(statistics[~train] @ weights - counts[~train]).mean()
    mean = np.abs(counts[train].mean() - counts[~train]).mean()
    print(f"  {60 * len(counts) / seconds:.0f} images of 320x240 per minute on two processes (goal: at least 500)")
    print(f"  heads per image {counts.mean():.1f} +- {counts.std():.1f}, {counts.min():.0f} to {counts.max():.0f}")
    print(f"  MAE of the mean count {mean:.1f}, of a linear fit on image statistics {linear:.1f}")


if __name__ == "__main__":
    main()
