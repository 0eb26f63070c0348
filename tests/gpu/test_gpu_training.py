"""Training on a GPU: the CPU's numbers in fp32, nearly so in bf16 and compiled; and memory that really ends."""

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
from crowdray.errors import UserError
from crowdray.presets import preset
from crowdray.training.batch_size_finder import measure_batch_size
from crowdray.training.distributed import World
from crowdray.training.errors import DivergedError
from crowdray.training.trainer import Trainer

GPU = torch.device("cuda", 0)
JOINT = -1


def settings(backbone: str, precision: str = "fp32", compiled: str = "no", **optimizer: float) -> Config:
    """Small windows, plain gradient descent, so that a difference of the gradient is one of the weights."""
    base = preset("debug")
    return replace(
        base,
        sampling=replace(base.sampling, crop=32, context=32),
        model=ModelConfig(backbone, "pooled"),
        optimizer=OptimizerConfig(name="sgd", warmup=0, **optimizer),  # type: ignore[arg-type]
        numerics=NumericsConfig(precision=precision, compile=compiled),  # type: ignore[arg-type]
    )


def trained(config: Config, dataset: Dataset, device: torch.device, updates: int = 3) -> tuple[Trainer, torch.Tensor]:
    """The training after a few joint updates, and the losses (updates, tasks) that it saw."""
    training = Trainer(config, dataset, world=World(), device=device)
    stage = replace(training.stages[JOINT], balanced=False)
    running = training.stage_trainer(stage)
    running.set_train_mode()
    batches = training.loader.epoch(1)
    return training, torch.stack([running.train_step(next(batches)) for _ in range(updates)]).cpu()


def change(training: Trainer, start: Trainer) -> torch.Tensor:
    """What the updates did to all weights."""
    pairs = zip(training.state.counter.parameters(), start.state.counter.parameters(), strict=True)
    return torch.cat([(new.detach().cpu() - old.detach().cpu()).flatten() for new, old in pairs])


@pytest.mark.parametrize("backbone", ["cfcn", "csrnet"])
def test_fp32_updates_are_those_of_a_cpu(discs: Dataset, backbone: str) -> None:
    config = settings(backbone)
    start = Trainer(config, discs, world=World(), device=torch.device("cpu"))
    here, there = (trained(config, discs, device) for device in (torch.device("cpu"), GPU))
    torch.testing.assert_close(there[1], here[1], rtol=1e-4, atol=1e-6)
    expected, got = change(here[0], start), change(there[0], start)
    assert expected.norm() > 0
    assert (got - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
@pytest.mark.parametrize("grad_accumulation_steps", [1, 2])
@pytest.mark.parametrize("compiled", ["no", "yes", "graphs"])
@pytest.mark.parametrize("backbone", ["cfcn", "csrnet"])
def test_bf16_and_compiled_updates_are_nearly_those_of_fp32(
    discs: Dataset, backbone: str, compiled: str, grad_accumulation_steps: int
) -> None:
    exact = trained(settings(backbone), discs, GPU, updates=6)
    fast = trained(
        settings(backbone, "bf16", compiled, grad_accumulation_steps=grad_accumulation_steps), discs, GPU, updates=6
    )
    torch.testing.assert_close(fast[1], exact[1], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("name", "grad_accumulation_steps"), [("sgd", 1), ("adamw", 2), ("muon", 2)])
def test_an_update_waits_for_none_before_it(
    discs: Dataset, name: Literal["sgd", "adamw", "muon"], grad_accumulation_steps: int
) -> None:
    config = settings("cfcn", "bf16", grad_accumulation_steps=grad_accumulation_steps)
    config = replace(config, optimizer=replace(config.optimizer, name=name))
    training = Trainer(config, discs, world=World(), device=GPU)
    running = training.stage_trainer(replace(training.stages[JOINT], balanced=False))
    running.set_train_mode()
    first, *others = [next(training.loader.epoch(1)) for _ in range(3)]
    running.train_step(first)  # it counts operations and makes room
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in others:
            running.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Grouped(World):
    """One rank that asks a group of its own all the same."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """See World.mean."""
        values = values.clone()
        dist.all_reduce(values)
        return values


def test_whatever_ranks_agree_on_goes_through_nccl(discs: Dataset, tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        training = Trainer(settings("cfcn"), discs, world=Grouped(), device=GPU)
        for stage in training.stages:
            training.stage_trainer(stage).fit_epoch()
        assert len(training.state.progress.history) == len(training.stages)
    finally:
        dist.destroy_process_group()


def test_what_fits_into_the_memory_is_said_and_does_fit(discs: Dataset) -> None:
    def large(grad_accumulation_steps: int) -> Config:
        config = settings("csrnet", grad_accumulation_steps=grad_accumulation_steps)
        return replace(config, sampling=replace(config.sampling, batch=96, crops_per_image=8))

    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated(GPU) + 2**30) / total, GPU)
    try:
        with pytest.raises(UserError) as caught:
            trained(large(1), discs, GPU, updates=1)
        found = re.search(r"(\d+) at a time do: set --optimizer.grad_accumulation_steps (\d+)", str(caught.value))
        assert found, caught.value
        torch.cuda.empty_cache()
        trained(large(int(found[2])), discs, GPU, updates=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def test_the_batch_is_found(discs: Dataset) -> None:
    found = measure_batch_size(settings("cfcn", "bf16"), discs, device=GPU, workers=1)
    assert found >= 1


@pytest.mark.parametrize("position", [0, -1])
def test_a_loss_that_is_not_finite_stops_before_the_epoch_is_saved(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    """One update later, or at the epoch's end: of the rows that it saw."""
    training = Trainer(settings("cfcn"), discs, world=World(), device=GPU)
    running = training.stage_trainer(training.stages[0])
    batches = list(training.loader.epoch(1))
    batches[position].brightness[0] = float("nan")
    monkeypatch.setattr(training.loader, "epoch", lambda *_, **__: iter(batches))
    rows = re.escape(str(batches[position].rows.tolist()))
    with pytest.raises(DivergedError, match=rf"baseline stage.*density nan.*{rows}.*learning_rate"):
        running.fit_epoch()
    assert not training.state.progress.history


@pytest.mark.parametrize("context", [0, 8, 200])
def test_windows_are_cut_on_the_gpu_as_by_the_loader(noise: Dataset, context: int) -> None:
    base = settings("cfcn")
    config = replace(base, sampling=replace(base.sampling, context=context, brightness=0.1))
    kept = replace(config, sampling=replace(config.sampling, gpu_cache_gib=1))
    there, here = (Trainer(choice, noise, world=World(), device=GPU) for choice in (kept, config))
    assert isinstance(there.loader.images, GpuImageCache)
    assert isinstance(here.loader.images, ImageCache)
    running = there.stage_trainer(there.stages[0])
    for one, other in zip(here.loader.epoch(1), there.loader.epoch(1), strict=True):
        expected, got = one.to(GPU), running._to_device(other)
        for field in fields(Batch):
            values = (torch.as_tensor(getattr(batch, field.name)) for batch in (expected, got))
            assert torch.equal(*values), field.name
