"""Counted operations against their closed form, and measured rates against what is known of them."""

import resource
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from crowdray.config import Config, ModelConfig, SamplingConfig
from crowdray.models.backbone import Backbone
from crowdray.models.build import build_counter
from crowdray.models.counter import AUXILIARY, DENSITY
from crowdray.training.flops import flops_per_window, peak_matmul_flops, peak_memory

CPU = torch.device("cpu")


def forward_operations(layers: list[torch.nn.Conv2d], cells: list[int]) -> list[int]:
    """A convolution does two operations for each weight and output cell."""
    return [2 * layer.weight.numel() * number for layer, number in zip(layers, cells, strict=True)]


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_of_the_convolutions_there_and_back(frozen: bool) -> None:
    """Back: the gradients of weights and of inputs cost a forward pass each; the photo needs none, nor does anything
    below what trains."""
    config = replace(Config(), sampling=SamplingConfig(crop=64, context=0), model=ModelConfig("csrnet", "pooled"))
    counter = build_counter(config, 1.0)
    for name, parameter in counter.named_parameters():
        parameter.requires_grad_(name.startswith("decoders.density") or not (frozen or name.startswith("decoders")))
    encoder = [layer for layer in counter.encoder.modules() if isinstance(layer, torch.nn.Conv2d)]
    decoder = [layer for layer in counter.decoders[DENSITY].modules() if isinstance(layer, torch.nn.Conv2d)]
    side = 64
    sizes = [side] * 2 + [side // 2] * 2 + [side // 4] * 3 + [side // 8] * 6
    there = forward_operations(encoder, [size**2 for size in sizes]), forward_operations(decoder, [8**2] * 4)
    if frozen:
        expected = sum(there[0]) + 3 * sum(there[1]) - there[1][0]
    else:
        expected = 3 * (sum(there[0]) + sum(there[1])) - there[0][0]
    counted = flops_per_window(counter, (DENSITY,), (64, 64), frozen_encoder=frozen, autocast=nullcontext())
    assert counted == expected


class Grouped(Backbone):
    """A convolution in which every channel is alone."""

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


def test_channels_that_are_alone_cost_what_they_cost() -> None:
    model = ModelConfig(f"{__name__}:Grouped", "pooled")
    counter = build_counter(replace(Config(), sampling=SamplingConfig(crop=64, context=0), model=model), 1.0)
    for name, parameter in counter.named_parameters():
        parameter.requires_grad_(name.startswith(("encoder", "decoders.density")))
    stripped = counter.strip()
    layers = [layer for layer in stripped.modules() if isinstance(layer, torch.nn.Conv2d)]
    there = forward_operations(layers, [8**2] * len(layers))
    counted = flops_per_window(stripped, (DENSITY,), (64, 64), frozen_encoder=False, autocast=nullcontext())
    assert counted == 3 * sum(there) - there[0]


def test_counting_leaves_no_trace() -> None:
    counter = build_counter(replace(Config(), model=ModelConfig("cfcn", "pooled")), 1.0)
    counter.train()
    generator = torch.get_rng_state()
    tasks = (DENSITY, *AUXILIARY)
    flops_per_window(counter, tasks, (160, 160), frozen_encoder=False, autocast=nullcontext())
    assert all(parameter.grad is None for parameter in counter.parameters())
    assert all(module.training for module in counter.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_process_is_as_large_as_the_system_says_and_matrices_take_time() -> None:
    before = peak_memory(CPU)
    held = torch.ones(64 * 2**20)
    assert peak_memory(CPU) >= before + 200 * 2**20 or before > 2 * held.nbytes
    assert peak_memory(CPU) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = peak_matmul_flops(CPU, torch.float32, torch.get_num_threads())
    assert 1e8 < rate < 1e14
    assert peak_matmul_flops(CPU, torch.float32, torch.get_num_threads()) == rate
