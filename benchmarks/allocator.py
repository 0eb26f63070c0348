"""Training steps on a CPU with glibc's default settings against those of Ray's workers (ALLOCATOR_ENV).

Each backbone trains all tasks on noise, in pairs of processes, one process at a time. Prints the medians of processor
time per step, their ratio, page faults per step and the peak of resident memory.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.cluster.runtime import ALLOCATOR_ENV
from crowdray.config import BACKBONES, Config, ModelConfig, SamplingConfig
from crowdray.models.build import build_counter
from crowdray.models.counter import TASKS

BACKBONES_TIMED = ("cfcn", "lite0", "csrnet")


def measure(backbone: str, crop: int, batch: int, steps: int) -> dict[str, float]:
    """Train on noise in this process; seconds and page faults per step, and peak memory in MiB."""
    config = Config(sampling=SamplingConfig(crop=crop, context=0), model=ModelConfig(backbone, "pooled"))
    counter = build_counter(config, density_scale=100.0).train()
    optimizer = torch.optim.AdamW(counter.parameters(), lr=1e-6, fused=True)
    image = torch.randint(0, 256, (batch, 3, crop, crop), dtype=torch.uint8)
    seconds, faults = [], []
    for _ in range(steps + 2):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        optimizer.zero_grad()
        torch.stack([value.square().mean() for value in counter(image, TASKS).values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds.append(time.process_time() - started)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": statistics.median(seconds[2:]), "faults": statistics.median(faults[2:]), "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES_TIMED)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="measure one backbone in this process, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure(options.backbones[0], options.crop, options.batch, options.steps)))
        return
    print(f"{options.batch} windows of {options.crop} pixels, {options.threads} thread(s), {options.pairs} pairs")
    for backbone in options.backbones:
        pairs = [[process(options, backbone, env) for env in ({}, ALLOCATOR_ENV)] for _ in range(options.pairs)]
        default, worker = zip(*pairs, strict=True)
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(default, worker, strict=True)]
        one, other = (
            {name: statistics.median(run[name] for run in runs) for name in runs[0]} for runs in (default, worker)
        )
        print(
            f"{backbone:8} {one['seconds']:.3f} -> {other['seconds']:.3f} s a step (ratio {min(ratios):.3f} to "
            f"{max(ratios):.3f}), page faults {one['faults']:,.0f} -> {other['faults']:,.0f}, peak {one['peak']:.0f} "
            f"-> {other['peak']:.0f} MiB",
            flush=True,
        )


def process(options: argparse.Namespace, backbone: str, environment: dict[str, str]) -> dict[str, float]:
    """Measure in a process of its own: glibc reads its settings when a process starts."""
    numbers = {name: getattr(options, name) for name in ("crop", "batch", "steps", "threads")}
    command = [sys.executable, __file__, "--measure", "--backbones", backbone]
    command += [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


if __name__ == "__main__":
    main()
