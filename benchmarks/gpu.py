"""AT-CSRNet's joint stage on one GPU: crops/s against the usual recipe and the roofline, and the cost of tasks.

The usual recipe is the same network without tasks in fp32, eager, channels first, Adam, one image per step: images
through Pillow, h5 density maps through cv2, four DataLoader workers. Ours is the preset's joint stage with its loader
and optimizer. The roofline sums over all layers with weights, and over their three passes (forward, gradient of the
input, gradient of the weights), the larger of FLOPs over the measured matmul FLOP/s and bytes over the measured
bandwidth. The usual recipe needs opencv-python-headless.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]
from benchmarks.peers.reading import WindowCutter, usual
from benchmarks.reading import export_files, render

from crowdray.config import Config
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.models.build import build_counter
from crowdray.models.counter import DENSITY
from crowdray.presets import preset
from crowdray.training.distributed import World, pick_device
from crowdray.training.flops import peak_matmul_flops, synchronize
from crowdray.training.trainer import Trainer

BASELINE, JOINT = 0, -1
STEPS = 40
"""Timed steps of the usual recipe, after a tenth of them as warmup."""
IMAGES = 48
"""Images that it trains on."""


def bandwidth(device: torch.device) -> float:
    """Measure the bytes/s that a copy within the device's memory reads and writes."""
    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(times)


@dataclass(frozen=True)
class Throughput:
    """Training speed of a stage."""

    crops_per_s: float
    data_wait_fraction: float
    """Fraction of the time spent waiting for batches."""


def measure_stage(config: Config, dataset: Dataset, stage: int, epochs: int) -> Throughput:
    """Measure the median throughput of epochs without validation, after a first one that compiles."""
    device = pick_device()
    torch.compiler.reset()  # else a second batch size would be compiled for all sizes
    trainer = Trainer(config, dataset, world=World(), device=device)
    stage_trainer = trainer.stage_trainer(trainer.stages[stage])
    measured = []
    for _ in range(1 + epochs):
        trainer.state.progress.epochs += 1
        synchronize(device)
        started = time.perf_counter()
        _, data_wait_s, windows = stage_trainer.train_epoch()
        synchronize(device)
        elapsed = time.perf_counter() - started
        measured.append((windows / elapsed, data_wait_s / elapsed))
    rates, waits = zip(*measured[1:], strict=True)
    return Throughput(median(rates), median(waits))


def measure_usual(config: Config, folder: Path, crop: int, tf32: bool) -> float:
    """Measure the crops/s of the usual recipe, or images/s with crop 0."""
    device = pick_device()
    torch.backends.cudnn.allow_tf32 = tf32
    network = build_counter(config, 1.0).strip().to(device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    loader = usual(folder, WindowCutter(crop, 1), 1, 4)()

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()
    for count in (STEPS // 10, STEPS):
        synchronize(device)
        started = time.perf_counter()
        for image, target in islice(batches, count):
            output = network(255 * image.to(device), (DENSITY,))[DENSITY]
            loss = (output[:, 0] - target.to(device)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        elapsed = time.perf_counter() - started
    return STEPS / elapsed


def roofline(config: Config, flops_per_s: float, bytes_per_s: float) -> float:
    """Return an upper bound of this device's crops/s in the joint stage."""
    device, batch, crop = pick_device(), config.sampling.batch, config.sampling.crop
    counter = build_counter(config, 1.0).to(device)
    seconds = []

    def account(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight, source = layer.weight, inputs[0]
        assert isinstance(weight, torch.Tensor)
        cells = output.numel() // weight.shape[0]
        compute = 2 * cells * weight.numel() / flops_per_s
        memory = 2 * (source.numel() + output.numel() + weight.numel()) / bytes_per_s  # two bytes per number
        passes = 3 if source.requires_grad else 2  # the image needs no gradient
        seconds.append(passes * max(compute, memory))

    for layer in counter.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(account)
    counter(torch.zeros(batch, 3, crop, crop, device=device), tuple(counter.decoders))
    return batch / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="converted dataset of 1024x768 images; rendered scenes by default")
    parser.add_argument("--preset", default="shb-csrnet")
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--compile", nargs="*", default=["no", "yes"])
    parser.add_argument("--gpu-cache-gib", type=float, nargs="*", default=[0, 4], help="0 crops windows on the CPU")
    parser.add_argument(
        "--updates", type=int, default=40, help="minimum steps per epoch; images are cropped repeatedly"
    )
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no GPU; run benchmarks/backbones.py on a CPU")
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.data is None:
            render(Path(scratch) / "data", IMAGES)
        measure(Dataset.open(arguments.data or str(Path(scratch) / "data")), arguments)


def measure(dataset: Dataset, arguments: argparse.Namespace) -> None:
    """Measure and print everything on a dataset."""
    base = preset(arguments.preset)
    device = pick_device()
    flops_per_s, bytes_per_s = peak_matmul_flops(device, torch.bfloat16, 0), bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    print(f"  bf16 matmul {flops_per_s / 1e12:.0f} TFLOP/s, copy {bytes_per_s / 1e12:.2f} TB/s")

    crop = base.sampling.crop
    images = len(split_rows(base, dataset, 1)[0])
    recipes = {}
    with tempfile.TemporaryDirectory() as scratch:
        export_files(dataset, Path(scratch), IMAGES)
        height, width = dataset.sizes("train")[0]
        for tf32 in (False, True):
            arithmetic = "fp32, TF32 in cuDNN" if tf32 else "fp32"
            recipes[f"crops of {crop}, {arithmetic}"] = measure_usual(base, Path(scratch), crop, tf32)
            whole = measure_usual(base, Path(scratch), 0, tf32)
            recipes[f"images, in crops of {crop}, {arithmetic}"] = whole * height * width / crop**2
    for name, rate in recipes.items():
        print(f"  usual recipe, one per step, {name}: {rate:.0f} crops/s", flush=True)

    for compiled, batch, cache in product(arguments.compile, arguments.batch, arguments.gpu_cache_gib):
        crops = -(-batch * arguments.updates // images)
        sampling = replace(base.sampling, batch=batch, crops_per_image=crops, gpu_cache_gib=cache)
        config = replace(base, sampling=sampling, numerics=replace(base.numerics, compile=compiled))
        joint = measure_stage(config, dataset, JOINT, arguments.epochs)
        ratios = ", ".join(f"{joint.crops_per_s / rate:.1f}" for rate in recipes.values())
        bound = roofline(config, flops_per_s, bytes_per_s)
        print(f"  ours, batch {batch}, compile {compiled}, cache {cache:g} GiB: {joint.crops_per_s:.0f} crops/s")
        print(f"    {ratios} times the usual recipes (goal 8)")
        print(f"    {joint.crops_per_s / bound:.1%} of the roofline, {bound:.0f} crops/s (goal 60%)")
        print(f"    waiting for data: {joint.data_wait_fraction:.2%} (goal 1%)", flush=True)
        plain = measure_stage(config, dataset, BASELINE, arguments.epochs)
        print(f"    all tasks / plain: {plain.crops_per_s / joint.crops_per_s:.3f} (goal 1.15)", flush=True)


if __name__ == "__main__":
    main()
