"""The shipped counter against the plain CFCN written with torch's own layers: latency in turn, and
parameters."""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.config import Config
from crowdray.models.build import build_counter
from crowdray.models.counter import DENSITY, Counter
from crowdray.models.packaged import PackagedCounter
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import package_counter

PAIRS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    counter = build_counter(Config(), density_scale=100.0).eval()
    plain = PlainCFCN(counter)
    image = torch.randint(0, 256, (1, 3, 480, 640), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        package = package_counter(
            PackagedCounter(counter), image, Path(folder) / "model", config={}, metrics={}, tags={}
        )
        shipped = load_counter(str(package.path))
        torch.testing.assert_close(shipped(image), plain(image), atol=1e-6, rtol=1e-4)
        times: dict[str, list[float]] = {"plain": [], "shipped": []}
        for number in range(PAIRS + 3):
            for name, model in (("plain", plain), ("shipped", shipped)):
                started = time.perf_counter()
                model(image)
                if number >= 3:
                    times[name].append(time.perf_counter() - started)
    ratio = median(b / a for a, b in zip(times["plain"], times["shipped"], strict=True))
    print(
        f"  parameters: shipped {sum(p.numel() for p in counter.strip().parameters()):,}, "
        f"plain {sum(p.numel() for p in plain.parameters()):,}"
    )
    print(
        f"  480x640: plain {1000 * median(times['plain']):.1f} ms, shipped {1000 * median(times['shipped']):.1f} ms, "
        f"median ratio of {PAIRS} pairs {ratio:.3f} (goal: within 0.02 of 1)"
    )


class PlainCFCN(nn.Module):
    """Encoder and density decoder as one would write them without this project, with the counter's weights."""

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
