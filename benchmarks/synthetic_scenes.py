"""Rendering speed in images per minute on two processes."""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.datasets.sources import Item, open_source

WARM_UP = 64


def render(items: list[Item]) -> None:
    source = open_source("synthetic", None)
    for item in items:
        source.load(item)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    images = parser.parse_args().images
    items = open_source("synthetic", None, train=images + 2 * WARM_UP, test=1).items(["train"])
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(render, [items[:WARM_UP], items[WARM_UP : 2 * WARM_UP]]))  # caches the backgrounds
        started = time.perf_counter()
        list(pool.map(render, [items[2 * WARM_UP :: 2], items[2 * WARM_UP + 1 :: 2]]))
        seconds = time.perf_counter() - started
    print(f"  {60 * images / seconds:.0f} images of 320x240 per minute on two processes (goal: at least 500)")


if __name__ == "__main__":
    main()
