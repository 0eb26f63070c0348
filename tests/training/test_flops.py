"""Counted FLOPs against their closed form, and peak memory."""

import resource
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from crowdray.config import Config, ModelConfig, SamplingConfig
from crowdray.models.backbone import Backbone
from crowdray.models.build import build_counter
from crowdray.models.counter import AUXILIARY, DENSITY
from crowdray.training.flops import flops_per_window, peak_memory

CPU = torch.device("cpu")


def forward_flops(layers: list[torch.nn.Conv2d], cells: list[int]) -> list[int]:
    """FLOPs of convolutions: two per weight and output cell."""
    return [2 * layer.weight.numel() * number for layer, number in zip(layers, cells, strict=True)]


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_per_window_equals_closed_form_of_convolutions(frozen: bool) -> None:
    """The gradients of weights and of inputs cost a forward pass each.

    Neither the image nor anything below the first trained layer needs a gradient.
    """
    config = replace(Config(), sampling=SamplingConfig(crop=64, context=0), model=ModelConfig("csrnet", "pooled"))
    counter = build_counter(config, 1.0)
    for name, parameter in counter.named_parameters():
        parameter.requires_grad_(name.startswith("decoders.density") or not (frozen or name.startswith("decoders")))
    encoder = [layer for layer in counter.encoder.modules() if isinstance(layer, torch.nn.Conv2d)]
    decoder = [layer for layer in counter.decoders[DENSITY].modules() if isinstance(layer, torch.nn.Conv2d)]
    side = 64
    sizes = [side] * 2 + [side // 2] * 2 + [side // 4] * 3 + [side // 8] * 6
    encoder_flops = forward_flops(encoder, [size**2 for size in sizes])
    decoder_flops = forward_flops(decoder, [8**2] * 4)
    if frozen:
        expected = sum(encoder_flops) + 3 * sum(decoder_flops) - decoder_flops[0]
    else:
        expected = 3 * (sum(encoder_flops) + sum(decoder_flops)) - encoder_flops[0]
    counted = flops_per_window(counter, (DENSITY,), (64, 64), frozen_encoder=frozen, autocast=nullcontext())
    assert counted == expected


class DepthwiseBackbone(Backbone):
    """A backbone with a depthwise convolution."""

    channels = 16
    stride = 8
    output_stride = 8
    receptive_radius = 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 8, stride=8), torch.nn.Conv2d(16, 16, 7, padding=3, groups=16)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(image)
        return features


def test_flops_per_window_counts_grouped_convolutions_once() -> None:
    model = ModelConfig(f"{__name__}:DepthwiseBackbone", "pooled")
    counter = build_counter(replace(Config(), sampling=SamplingConfig(crop=64, context=0), model=model), 1.0)
    for name, parameter in counter.named_parameters():
        parameter.requires_grad_(name.startswith(("encoder", "decoders.density")))
    stripped = counter.strip()
    layers = [layer for layer in stripped.modules() if isinstance(layer, torch.nn.Conv2d)]
    forward = forward_flops(layers, [8**2] * len(layers))
    counted = flops_per_window(stripped, (DENSITY,), (64, 64), frozen_encoder=False, autocast=nullcontext())
    assert counted == 3 * sum(forward) - forward[0]


def test_flops_per_window_leaves_no_side_effects() -> None:
    counter = build_counter(replace(Config(), model=ModelConfig("cfcn", "pooled")), 1.0)
    counter.train()
    generator = torch.get_rng_state()
    tasks = (DENSITY, *AUXILIARY)
    flops_per_window(counter, tasks, (160, 160), frozen_encoder=False, autocast=nullcontext())
    assert all(parameter.grad is None for parameter in counter.parameters())
    assert all(module.training for module in counter.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_peak_memory_on_cpu_is_that_of_the_process() -> None:
    before = peak_memory(CPU)
    allocated = torch.ones(64 * 2**20)
    assert peak_memory(CPU) >= before + 200 * 2**20 or before > 2 * allocated.nbytes
    assert peak_memory(CPU) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
