"""Latency and parameters of the exported counter against a plain network of torch layers.

Several processes time the models in interleaved calls, together with a copy of the plain one, whose ratio shows
the noise of the measurement. Their C allocator keeps freed memory: otherwise page faults of large intermediates,
which vary by process, dominate the ratio.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.config import Config, ModelConfig, SamplingConfig
from crowdray.models.build import build_counter
from crowdray.models.counter import DENSITY, Counter
from crowdray.models.export import ExportedCounter
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import package_counter

ROUNDS = 40
WARM_UP = 3
STEADY_ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "400000000",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--package", type=Path, help="time this packaged model in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampling = SamplingConfig(crop=160, context=0)
    config = Config(sampling=sampling, model=ModelConfig("cfcn", "pooled"))
    counter = build_counter(config, density_scale=100.0).eval()
    plain_network = PlainCFCN(counter)
    image = torch.randint(0, 256, (1, 3, 480, 640), dtype=torch.uint8)
    if args.package:
        print(json.dumps(measure(plain_network, args.package, image)))
        return
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "model"
        package_counter(ExportedCounter(counter), image, package, config={}, metrics={}, tags={})
        command = [sys.executable, __file__, "--threads", str(args.threads), "--package", str(package)]
        environment = {**os.environ, **STEADY_ALLOCATOR}
        measured = [
            json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(args.processes)
        ]
    print(
        f"  parameters: exported {sum(p.numel() for p in counter.strip().parameters()):,}, "
        f"plain {sum(p.numel() for p in plain_network.parameters()):,}"
    )
    plain = median(times["plain"] for times in measured)
    print(f"  480x640, {args.threads} threads, median of {ROUNDS} calls: plain {plain:.1f} ms")
    for name in ("copy", "exported"):
        ratios = [times[name] / times["plain"] for times in measured]
        print(f"  {name} / plain: {median(ratios):.3f}; by process {', '.join(f'{r:.3f}' for r in ratios)}")
    print("  goal: exported within 0.02 of 1")


def measure(plain: nn.Module, package: Path, image: Tensor) -> dict[str, float]:
    """Return the median milliseconds per call of each model, interleaved in a rotating order."""
    exported = load_counter(str(package))
    models: dict[str, Callable[[Tensor], Tensor]] = {"plain": plain, "copy": copy.deepcopy(plain), "exported": exported}
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        torch.testing.assert_close(exported(image), plain(image), atol=1e-6, rtol=1e-4)
        for number in range(WARM_UP + ROUNDS):
            names = names[1:] + names[:1]
            for name in names:
                started = time.perf_counter()
                models[name](image)
                if number >= WARM_UP:
                    times[name].append(1000 * (time.perf_counter() - started))
    return {name: median(values) for name, values in times.items()}


class PlainCFCN(nn.Module):
    """CFCN encoder and density decoder in plain torch, with the counter's weights."""

    mean: Tensor
    std: Tensor
    kernel: Tensor

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        density = counter.decoders[DENSITY]
        self.layers = nn.ModuleList([*counter.encoder.children(), density.get_submodule("conv")])
        self.scale = counter.density_scale
        for name, value in (
            ("mean", counter.mean),
            ("std", counter.std),
            ("kernel", density.get_buffer("upsample.kernel")),
        ):
            self.register_buffer(name, value)

    def forward(self, image: Tensor) -> Tensor:
        x = (image.float() - self.mean) / self.std
        for layer in self.layers:
            x = torch.relu(layer(x))
        x = x.mean(1, keepdim=True)
        for _ in range(2):
            x = nn.functional.pad(x, (1, 2, 1, 2), mode="replicate")
            x = nn.functional.conv_transpose2d(x, self.kernel, stride=2, padding=5)
        return x[..., : image.shape[-2], : image.shape[-1]] / self.scale


if __name__ == "__main__":
    main()
