"""Activation checkpointing: bit-equal training in less memory."""

from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from crowdray.config import (
    BACKBONES,
    Config,
    ConfigError,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
    StagesConfig,
)
from crowdray.data.shards import Dataset
from crowdray.models.build import build_counter
from crowdray.models.counter import TASKS

from ..support.backbones import SINGLE_SEGMENT, SMALL
from ..support.trainers import debug_config, equal_tensors, trainer_of

USER_BACKBONES = [SMALL, SINGLE_SEGMENT]


def config_of(backbone: str, activation_checkpointing: bool = False) -> Config:
    once = StageConfig(1, 1e-2)
    return debug_config(
        sampling={"validation_fraction": 0.7},
        model=ModelConfig(backbone, "pooled"),
        optimizer=OptimizerConfig(name="sgd", grad_accumulation_steps=2),
        stages=StagesConfig(once, once, once),
        numerics=NumericsConfig(precision="fp32", activation_checkpointing=activation_checkpointing),
    )


@pytest.mark.parametrize("backbone", [*BACKBONES, *USER_BACKBONES])
def test_checkpoint_segments_in_sequence_equal_the_encoder(backbone: str) -> None:
    encoder = build_counter(config_of(backbone), 1.0).encoder.eval()
    image = torch.randn(1, 3, 50, 67)
    with torch.no_grad():
        features = image
        for segment in encoder.checkpoint_segments():
            features = segment(features)
        assert torch.equal(features, encoder(image))


@pytest.mark.parametrize("backbone", USER_BACKBONES)
def test_fit_with_activation_checkpointing_is_bit_equal(discs: Dataset, backbone: str) -> None:
    """Weights and running statistics, in a frozen and a trained encoder, over microbatches."""
    stored, recomputed = (
        trainer_of(discs, config_of(backbone, activation_checkpointing)) for activation_checkpointing in (False, True)
    )
    for trainer in (stored, recomputed):
        trainer.fit()
    assert recomputed.state.counter.activation_checkpointing
    assert not recomputed.best_counter("joint").activation_checkpointing
    state = recomputed.state.counter.state_dict()
    assert any("num_batches_tracked" in name for name in state)
    assert equal_tensors(stored.state.counter.state_dict(), state)


@pytest.mark.parametrize(("backbone", "bf16"), [("cfcn", False), ("csrnet", True), ("convnext", False)])
def test_gradients_with_activation_checkpointing_are_bit_equal(backbone: str, bf16: bool) -> None:
    gradients = []
    for activation_checkpointing in (False, True):
        counter = build_counter(config_of(backbone), 1.0)
        counter.activation_checkpointing = activation_checkpointing
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = counter(image, TASKS)
        torch.stack([output.float().square().mean() for output in outputs.values()]).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append({name: parameter.grad for name, parameter in counter.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None and torch.equal(gradient, other), name


def peak_bytes(backbone: str, activation_checkpointing: bool) -> int:
    """Peak bytes of a step's activations and their gradients; gradients of parameters are allocated before."""
    counter = build_counter(replace(config_of(backbone), sampling=SamplingConfig(crop=96, context=0)), 1.0)
    counter.activation_checkpointing = activation_checkpointing
    for parameter in counter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    image = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)
    tracker = MemTracker()
    tracker.track_external(counter)
    with tracker:
        outputs = counter(image, TASKS)
        torch.stack([output.square().mean() for output in outputs.values()]).sum().backward()  # type: ignore[no-untyped-call]
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return sum(size for kind, size in peak.items() if str(kind).endswith(("ACT", "TEMP")))


@pytest.mark.filterwarnings("ignore:Module is None")  # from the tracker
@pytest.mark.parametrize(("backbone", "fraction"), [("csrnet", 0.65), ("convnext", 0.3)])
def test_peak_memory_with_activation_checkpointing_falls(backbone: str, fraction: float) -> None:
    assert peak_bytes(backbone, True) < fraction * peak_bytes(backbone, False)


def test_config_with_activation_checkpointing_and_compile_raises() -> None:
    with pytest.raises(
        ConfigError, match=r"activation_checkpointing is True and numerics.compile is graphs.*set only one of them"
    ):
        Config(numerics=NumericsConfig(activation_checkpointing=True, compile="graphs"))


def test_config_with_cuda_graphs_and_scale_raises() -> None:
    with pytest.raises(ConfigError, match=r"numerics.compile is graphs and sampling.scale 0.25; .*compile yes"):
        Config(sampling=SamplingConfig(scale=0.25), numerics=NumericsConfig(compile="graphs"))
