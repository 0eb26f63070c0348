"""AT-CSRNet's joint stage on one GPU: crops/s against the usual recipe, share of the roofline, what the tasks cost.

The usual recipe is the same network without tasks in fp32, eager, in torch's layout, Adam, one image an update: a photo
through Pillow, an h5 density map through cv2, four DataLoader workers. Ours is the preset's joint stage on its own
loader, updates and all. The roofline sums over all layers with weights, and over their three passes (forward, gradient
of the input, gradient of the weights), the larger of FLOPs over the measured matrix rate and bytes over the measured
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
"""Updates of the usual recipe that are timed, after a tenth of them."""
PHOTOS = 48
"""Photos that it trains on."""


def bandwidth(device: torch.device) -> float:
    """Bytes/s that a copy within the device's memory reads and writes."""
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
class Pace:
    """How fast a stage trains."""

    crops_per_s: float
    waiting: float
    """Share of the time spent waiting for input."""


def paced(config: Config, dataset: Dataset, stage: int, epochs: int) -> Pace:
    """The pace of whole epochs without their validation, the median; the first one, which compiles, is left out."""
    device = pick_device()
    torch.compiler.reset()  # else a second batch size would be compiled for all sizes
    training = Trainer(config, dataset, world=World(), device=device)
    running = training.stage_trainer(training.stages[stage])
    found = []
    for _ in range(1 + epochs):
        training.state.progress.epochs += 1
        synchronize(device)
        started = time.perf_counter()
        _, waited, windows = running.train_epoch()
        synchronize(device)
        elapsed = time.perf_counter() - started
        found.append((windows / elapsed, waited / elapsed))
    rates, waits = zip(*found[1:], strict=True)
    return Pace(median(rates), median(waits))


def usual_pace(config: Config, folder: Path, crop: int, tf32: bool) -> float:
    """Crops/s, or photos/s with crop 0, of the usual recipe."""
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


def roofline(config: Config, rate: float, moved: float) -> float:
    """Crops/s that this device cannot exceed in the joint stage."""
    device, batch, crop = pick_device(), config.sampling.batch, config.sampling.crop
    counter = build_counter(config, 1.0).to(device)
    seconds = []

    def account(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weight, source = layer.weight, inputs[0]
        assert isinstance(weight, torch.Tensor)
        places = output.numel() // weight.shape[0]
        compute = 2 * places * weight.numel() / rate
        memory = 2 * (source.numel() + output.numel() + weight.numel()) / moved  # two bytes a number
        passes = 3 if source.requires_grad else 2  # the photo needs no gradient
        seconds.append(passes * max(compute, memory))

    for layer in counter.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(account)
    counter(torch.zeros(batch, 3, crop, crop, device=device), tuple(counter.decoders))
    return batch / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a converted dataset of photos of 1024x768; without it, scenes are rendered")
    parser.add_argument("--preset", default="shb-csrnet")
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--compile", nargs="*", default=["no", "yes"])
    parser.add_argument("--gpu-cache-gib", type=float, nargs="*", default=[0, 4], help="0: windows are cut on the CPU")
    parser.add_argument("--updates", type=int, default=40, help="how many an epoch has at least; photos are cut anew")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no GPU: nothing to measure here; benchmarks/backbones.py compares on a CPU")
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.data is None:
            render(Path(scratch) / "data", PHOTOS)
        measure(Dataset.open(arguments.data or str(Path(scratch) / "data")), arguments)


def measure(dataset: Dataset, arguments: argparse.Namespace) -> None:
    """Measure everything on a dataset, and print it."""
    base = preset(arguments.preset)
    device = pick_device()
    rate, moved = peak_matmul_flops(device, torch.bfloat16, 0), bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    print(f"  bf16 matrices {rate / 1e12:.0f} TFLOP/s, copying {moved / 1e12:.2f} TB/s")

    crop = base.sampling.crop
    photos = len(split_rows(base, dataset, 1)[0])
    recipes = {}
    with tempfile.TemporaryDirectory() as scratch:
        export_files(dataset, Path(scratch), PHOTOS)
        height, width = dataset.sizes("train")[0]
        for tf32 in (False, True):
            arithmetic = "fp32, cuDNN rounding to TF32" if tf32 else "fp32"
            recipes[f"crops of {crop}, {arithmetic}"] = usual_pace(base, Path(scratch), crop, tf32)
            whole = usual_pace(base, Path(scratch), 0, tf32)
            recipes[f"photos, in crops of {crop}, {arithmetic}"] = whole * height * width / crop**2
    for name, pace in recipes.items():
        print(f"  usual recipe, one an update, {name}: {pace:.0f} crops/s", flush=True)

    for compiled, batch, cache in product(arguments.compile, arguments.batch, arguments.gpu_cache_gib):
        crops = -(-batch * arguments.updates // photos)
        sampling = replace(base.sampling, batch=batch, crops_per_image=crops, gpu_cache_gib=cache)
        config = replace(base, sampling=sampling, numerics=replace(base.numerics, compile=compiled))
        joint = paced(config, dataset, JOINT, arguments.epochs)
        ratios = ", ".join(f"{joint.crops_per_s / pace:.1f}" for pace in recipes.values())
        bound = roofline(config, rate, moved)
        print(f"  ours, batch {batch}, compile {compiled}, cache {cache:g} GiB: {joint.crops_per_s:.0f} crops/s")
        print(f"    {ratios} times the usual recipes (goal 8)")
        print(f"    {joint.crops_per_s / bound:.1%} of the roofline, {bound:.0f} crops/s (goal 60%)")
        print(f"    waiting for input: {joint.waiting:.2%} (goal 1%)", flush=True)
        plain = paced(config, dataset, BASELINE, arguments.epochs)
        print(f"    all tasks / plain: {plain.crops_per_s / joint.crops_per_s:.3f} (goal 1.15)", flush=True)


if __name__ == "__main__":
    main()
