"""Training on a GPU: equal to a CPU in fp32, close in bf16 and compiled, and out of memory for real."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist

from crowdray.config import Config, ModelConfig, NumericsConfig, OptimizerConfig
from crowdray.data.batch import Batch
from crowdray.data.gpu_cache import GpuImageCache
from crowdray.data.image_cache import ImageCache
from crowdray.data.shards import Dataset
from crowdray.errors import InfeasibleConfigError
from crowdray.presets import preset
from crowdray.training.batch_size_finder import measure_batch_size
from crowdray.training.distributed import World
from crowdray.training.errors import DivergedError
from crowdray.training.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config_of(backbone: str, precision: str = "fp32", compiled: str = "no", **optimizer: float) -> Config:
    """Small windows and plain gradient descent, so that weights differ as much as gradients."""
    base = preset("debug")
    return replace(
        base,
        sampling=replace(base.sampling, crop=32, context=32),
        model=ModelConfig(backbone, "pooled"),
        optimizer=OptimizerConfig(name="sgd", warmup=0, **optimizer),  # type: ignore[arg-type]
        numerics=NumericsConfig(precision=precision, compile=compiled),  # type: ignore[arg-type]
    )


def joint_trainer(config: Config, dataset: Dataset, device: torch.device) -> Trainer:
    """A trainer of the joint stage alone, with equal loss weights."""
    trainer = Trainer(config, dataset, world=World(), device=device)
    trainer.stages = (replace(trainer.stages[-1], balanced=False),)
    return trainer


def train(config: Config, dataset: Dataset, device: torch.device, steps: int = 3) -> tuple[Trainer, torch.Tensor]:
    """Take joint training steps; returns the trainer and the losses (steps, tasks)."""
    trainer = joint_trainer(config, dataset, device)
    stage_trainer = trainer.stage_trainer(trainer.stages[0])
    batches = trainer.loader.epoch(1)
    return trainer, torch.stack([stage_trainer.train_step(next(batches)) for _ in range(steps)]).cpu()


def change(trainer: Trainer, start: Trainer) -> torch.Tensor:
    """The difference of all parameters to those at the start."""
    pairs = zip(trainer.state.counter.parameters(), start.state.counter.parameters(), strict=True)
    return torch.cat([(new.detach().cpu() - old.detach().cpu()).flatten() for new, old in pairs])


@pytest.mark.parametrize("backbone", ["cfcn", "csrnet"])
def test_train_steps_in_fp32_equal_those_on_cpu(discs: Dataset, backbone: str) -> None:
    config = config_of(backbone)
    start = Trainer(config, discs, world=World(), device=CPU)
    (on_cpu, cpu_losses), (on_gpu, gpu_losses) = (train(config, discs, device) for device in (CPU, GPU))
    torch.testing.assert_close(gpu_losses, cpu_losses, rtol=1e-4, atol=1e-6)
    expected, actual = change(on_cpu, start), change(on_gpu, start)
    assert expected.norm() > 0
    assert (actual - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # from the compiler
@pytest.mark.parametrize("grad_accumulation_steps", [1, 2])
@pytest.mark.parametrize("compiled", ["no", "yes", "graphs"])
@pytest.mark.parametrize("backbone", ["cfcn", "csrnet"])
def test_train_steps_in_bf16_and_compiled_are_close_to_fp32(
    discs: Dataset, backbone: str, compiled: str, grad_accumulation_steps: int
) -> None:
    _, exact = train(config_of(backbone), discs, GPU, steps=6)
    config = config_of(backbone, "bf16", compiled, grad_accumulation_steps=grad_accumulation_steps)
    _, fast = train(config, discs, GPU, steps=6)
    torch.testing.assert_close(fast, exact, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("name", "grad_accumulation_steps"), [("sgd", 1), ("adamw", 2), ("muon", 2)])
def test_train_step_never_synchronizes_with_gpu(
    discs: Dataset, name: Literal["sgd", "adamw", "muon"], grad_accumulation_steps: int
) -> None:
    config = config_of("cfcn", "bf16", grad_accumulation_steps=grad_accumulation_steps)
    config = replace(config, optimizer=replace(config.optimizer, name=name))
    trainer = joint_trainer(config, discs, GPU)
    stage_trainer = trainer.stage_trainer(trainer.stages[0])
    first, *others = [next(trainer.loader.epoch(1)) for _ in range(3)]
    stage_trainer.train_step(first)  # counts FLOPs and allocates memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in others:
            stage_trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class SingleRankGroup(World):
    """One rank that uses its process group nevertheless."""

    def all_reduce_mean(self, values: torch.Tensor) -> torch.Tensor:
        """See World.all_reduce_mean."""
        values = values.clone()
        dist.all_reduce(values)
        return values


def test_fit_epoch_with_nccl_reduces_only_gpu_tensors(discs: Dataset, tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        trainer = Trainer(config_of("cfcn"), discs, world=SingleRankGroup(), device=GPU)
        for stage in trainer.stages:
            trainer.stage_trainer(stage).fit_epoch(trainer.validate)
        assert len(trainer.state.progress.history) == len(trainer.stages)
    finally:
        dist.destroy_process_group()


def test_fit_out_of_memory_suggests_steps_that_fit(discs: Dataset) -> None:
    def fit(grad_accumulation_steps: int) -> None:
        config = config_of("csrnet", grad_accumulation_steps=grad_accumulation_steps)
        config = replace(config, sampling=replace(config.sampling, batch=96, crops_per_image=8))
        joint_trainer(config, discs, GPU).fit()

    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated(GPU) + 2**30) / total, GPU)
    try:
        with pytest.raises(InfeasibleConfigError) as caught:
            fit(1)
        found = re.search(r"(\d+) at a time do: set --optimizer.grad_accumulation_steps (\d+)", str(caught.value))
        assert found, caught.value
        caught.value.__traceback__ = None  # its frames reference tensors of the first attempt
        del caught
        torch.cuda.empty_cache()
        fit(int(found[2]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def test_measure_batch_size_finds_one(discs: Dataset) -> None:
    assert measure_batch_size(config_of("cfcn", "bf16"), discs, device=GPU, workers=1) >= 1


@pytest.mark.parametrize("position", [0, -1])
def test_fit_epoch_with_nan_loss_raises_before_it_is_recorded(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    """One step later, or at the end of the epoch, with the rows of the diverged step."""
    trainer = Trainer(config_of("cfcn"), discs, world=World(), device=GPU)
    stage_trainer = trainer.stage_trainer(trainer.stages[0])
    batches = list(trainer.loader.epoch(1))
    batches[position].brightness[0] = float("nan")
    monkeypatch.setattr(trainer.loader, "epoch", lambda *_, **__: iter(batches))
    rows = re.escape(str(batches[position].rows.tolist()))
    with pytest.raises(DivergedError, match=rf"baseline stage.*density nan.*{rows}.*learning_rate"):
        stage_trainer.fit_epoch(trainer.validate)
    assert not trainer.state.progress.history


@pytest.mark.parametrize("context", [0, 8, 200])
def test_batches_cropped_on_gpu_equal_those_of_cpu(noise: Dataset, context: int) -> None:
    base = config_of("cfcn")
    config = replace(base, sampling=replace(base.sampling, context=context, brightness=0.1))
    cached = replace(config, sampling=replace(config.sampling, gpu_cache_gib=1))
    on_gpu, on_cpu = (Trainer(choice, noise, world=World(), device=GPU).loader for choice in (cached, config))
    assert isinstance(on_gpu.images, GpuImageCache)
    assert isinstance(on_cpu.images, ImageCache)
    for one, other in zip(on_cpu.epoch(1), on_gpu.epoch(1), strict=True):
        expected, actual = one.to(GPU), other.to(GPU)
        for field in fields(Batch):
            values = (torch.as_tensor(getattr(batch, field.name)) for batch in (expected, actual))
            assert torch.equal(*values), field.name
