"""Density targets of 500 heads on 768x1024 against one full-frame scipy Gaussian filter per head."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.data.targets import density_map

HEADS, HEIGHT, WIDTH, SIGMA, REPEATS = 500, 768, 1024, 4.0, 20


def main() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, [WIDTH, HEIGHT], (HEADS, 2)).astype(np.float32)
    ours = density_map(torch.from_numpy(points)[None], torch.ones(1, HEADS), (HEIGHT, WIDTH), sigma=SIGMA)
    started = time.perf_counter()
    for _ in range(REPEATS):
        density_map(torch.from_numpy(points)[None], torch.ones(1, HEADS), (HEIGHT, WIDTH), sigma=SIGMA)
    seconds = (time.perf_counter() - started) / REPEATS

    reference = np.zeros((HEIGHT, WIDTH), np.float32)
    started = time.perf_counter()
    for x, y in points:
        impulse = np.zeros((HEIGHT, WIDTH), np.float32)
        impulse[int(y), int(x)] = 1
        reference += gaussian_filter(impulse, SIGMA, mode="constant")
    reference_seconds = time.perf_counter() - started
    print(f"{HEADS} heads on {HEIGHT}x{WIDTH}, sigma {SIGMA}, {torch.get_num_threads()} threads")
    print(f"  a scipy filter per head: {reference_seconds:8.3f} s, sum {reference.sum():.3f}")
    print(f"  density_map:             {seconds:8.5f} s, sum {ours.double().sum().item():.5f}")
    print(f"  ratio {reference_seconds / seconds:,.0f} (goal: at least 1,000, sum within 0.001 of {HEADS})")


if __name__ == "__main__":
    main()
