"""Cost of a training step of EfficientNet-Lite on a CPU with this project's depthwise gradients and with oneDNN's.

Steps in bfloat16 with each, and in float32, interleaved; processor time of one thread, median.
"""

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]
from benchmarks.backbones import time_interleaved

from crowdray.data.shards import Dataset
from crowdray.models import efficientnet_lite
from crowdray.models.depthwise import depthwise_conv2d
from crowdray.presets import preset
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer


def onednn_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The depthwise convolution with the gradients of oneDNN."""
    return F.conv2d(x, weight, None, stride, padding, 1, len(weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = preset("lite0")
    base = replace(
        base,
        sampling=replace(base.sampling, crop=arguments.crop, batch=arguments.batch, scale=0.0),
        model=replace(base.model, backbone=arguments.backbone, weights=""),
    )
    dataset = Dataset.open(arguments.data)
    ours, onednn, float32 = "bfloat16, ours", "bfloat16, oneDNN", "float32"
    stages = {}
    for name in (ours, onednn, float32):
        numerics = replace(base.numerics, precision="fp32" if name == float32 else "bf16")
        config = replace(base, numerics=numerics)
        trainer = Trainer(config, dataset, world=World(), device=torch.device("cpu"))
        stages[name] = trainer.stage_trainer(trainer.stages[0])
    batch = next(stages[ours].loader.epoch(1))

    def train_step(name: str) -> None:
        function = onednn_conv2d if name == onednn else depthwise_conv2d
        with mock.patch.object(efficientnet_lite, "depthwise_conv2d", function):
            stages[name].train_step(batch)

    calls = {name: partial(train_step, name) for name in stages}
    steps = time_interleaved(calls, arguments.rounds, clock=time.process_time)
    height, width = batch.image.shape[2:]
    print(f"{arguments.backbone}, {arguments.batch} windows of {height}x{width}, one thread")
    for name, seconds in steps.items():
        print(f"  {name}: {1000 * seconds:.0f} ms per step, {seconds / steps[onednn]:.2f} of bfloat16 with oneDNN")


if __name__ == "__main__":
    main()
