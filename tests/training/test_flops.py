"""Counted FLOPs against their closed form, and peak memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from crowdray.config import Config, ModelConfig, SamplingConfig
from crowdray.models.build import build_counter
from crowdray.models.counter import COUNT, DENSITY
from crowdray.training.flops import flops_per_window, peak_memory
from crowdray.training.stages import module_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("frozen_encoder", [False, True])
@pytest.mark.parametrize("backbone", ["csrnet", "convnext"])  # cfcn also upsamples
def test_flops_per_window_equals_closed_form_of_its_layers(backbone: str, frozen_encoder: bool) -> None:
    """Two per weight and output, also in depthwise convolutions, and as much for the gradients of either.

    With a frozen encoder, the first layers of the decoders need no gradient of their inputs.
    """
    config = replace(Config(), sampling=SamplingConfig(crop=64, context=0), model=ModelConfig(backbone, "pooled"))
    counter = build_counter(config, 1.0)
    forward: dict[str, list[int]] = {"encoder": [], "density": [], "count": []}

    def count(name: str, layer: Any, output: torch.Tensor) -> None:
        outputs = output.shape[-2:].numel() if isinstance(layer, nn.Conv2d) else output.numel() // layer.out_features
        forward[module_of(name)].append(2 * layer.weight.numel() * outputs)

    for name, layer in counter.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, _, output, name=name: count(name, layer, output))
    counter.activation_checkpointing = True
    counted = flops_per_window(counter, (DENSITY, COUNT), (64, 64), frozen_encoder=frozen_encoder)
    encoder, decoders = sum(forward["encoder"]), sum(forward["density"] + forward["count"])
    first = forward["density"][0] + forward["count"][0]
    assert counted == (encoder + 3 * decoders - first if frozen_encoder else 3 * (encoder + decoders))


def test_peak_memory_on_cpu_is_that_of_the_process() -> None:
    before = peak_memory(CPU)
    allocated = torch.ones(64 * 2**20)
    assert peak_memory(CPU) >= before + 200 * 2**20 or before > 2 * allocated.nbytes
