"""The trainer: which parameters a stage trains, resuming, windows against whole images, and many workers."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from crowdray.config import (
    BACKBONES,
    Config,
    LossConfig,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
    StagesConfig,
)
from crowdray.data.batch import Crop, collate
from crowdray.data.sampling import draw_window
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.evaluation.inference import count_images
from crowdray.evaluation.metrics import summarise
from crowdray.models.counter import AUXILIARY, DENSITY, TASKS
from crowdray.training.checkpoint import EpochMetrics, load_checkpoint
from crowdray.training.distributed import World
from crowdray.training.errors import DivergedError
from crowdray.training.losses import measure_scales
from crowdray.training.result import final_result
from crowdray.training.stages import build_stages, module_of
from crowdray.training.trainer import Trainer

from ..support.backbones import SMALL
from ..support.states import checkpoint
from ..support.trainers import CPU, computed, debug_config, equal_tensors, save_epochs, trainer_of


def sgd_config(backbone: str) -> Config:
    """Any backbone by SGD in fp32, one epoch per stage: frozen parameters stay equal to the bit."""
    count_decoder = "paper" if backbone == "cfcn" else "pooled"
    once = StageConfig(1, 1e-2)
    return debug_config(
        model=ModelConfig(backbone, count_decoder),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(name="sgd", clip=0.0),
        stages=StagesConfig(once, once, once),
        numerics=NumericsConfig(precision="fp32"),
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("backbone", [*BACKBONES, SMALL])
def test_train_epoch_changes_exactly_the_modules_of_its_stage(discs: Dataset, backbone: str, stage: int) -> None:
    check_gradients(trainer_of(discs, sgd_config(backbone)), stage)


def check_gradients(trainer: Trainer, stage: int) -> None:
    """Assert that an epoch changes all parameters and buffers of the stage's modules, and no others."""
    stage_trainer = trainer.stage_trainer(trainer.stages[stage])
    counter, modules = trainer.state.counter, stage_trainer.stage.modules
    before = {name: value.clone() for name, value in counter.state_dict().items()}
    stage_trainer.train_epoch()
    for name, value in counter.state_dict().items():
        assert torch.equal(value, before[name]) == (module_of(name) not in modules), name
    for name, parameter in counter.named_parameters():
        assert (parameter.grad is not None) == (module_of(name) in modules), name


def test_decoders_stage_trained_jointly_equals_decoders_trained_one_by_one(discs: Dataset) -> None:
    """They share a frozen encoder and do not influence each other; clipping, which would couple them, is off."""
    config = debug_config(optimizer=OptimizerConfig(clip=0.0))

    def trained(tasks: tuple[str, ...]) -> nn.ModuleDict:
        trainer = trainer_of(discs, config)
        stage_trainer = trainer.stage_trainer(dataclasses.replace(trainer.stages[1], tasks=tasks, modules=tasks))
        for batch in trainer.loader.epoch(1):
            stage_trainer.train_step(batch)
        return trainer.state.counter.decoders

    jointly = trained(AUXILIARY)
    for task in AUXILIARY:
        alone = trained((task,))[task]
        assert all(map(torch.equal, jointly[task].parameters(), alone.parameters()))


def test_fit_resumed_after_any_epoch_equals_unbroken_run(discs: Dataset, tmp_path: Path) -> None:
    unbroken = trainer_of(discs)
    unbroken.fit(save_epochs(tmp_path))
    expected = final_result(unbroken)
    counts = expected.stages[expected.best_stage].validation_counts
    assert [count.row for count in counts] == unbroken.validation_rows.tolist()
    assert expected.mean_predictor_validation is not None
    mean_errors = [abs(count.truth - expected.mean_count) for count in counts]
    assert expected.mean_predictor_validation.mae == pytest.approx(sum(mean_errors) / len(mean_errors))
    epochs = sorted(int(folder.name) for folder in tmp_path.iterdir())
    assert epochs == [1, 2, 3, 4, 5]
    for epoch in epochs:
        resumed = trainer_of(discs, restored=load_checkpoint(tmp_path / str(epoch)))
        resumed.fit()
        result = final_result(resumed)
        assert computed(result.history) == computed(expected.history)
        assert result.stages == expected.stages
        assert result.best_stage == expected.best_stage


def test_density_of_window_equals_that_of_whole_image_where_loss_has_weight(discs: Dataset) -> None:
    """Prevents a surplus at the borders: the loss ignores pixels whose receptive field the window cuts."""
    trainer = trainer_of(discs, debug_config(sampling=SamplingConfig(crop=16, context=36, flip=0.0)))
    counter = trainer.state.counter.eval()
    rule, checked = trainer.loader.windows, 0
    for row in range(8):
        image = trainer.images[row]
        wide = dataclasses.replace(
            image, size=(64, 192), image=image.image.repeat(2, axis=1), roi=None, encoded_depth=None
        )
        window = draw_window(rule, wide.size, seed=1, epoch=0, sample=row)
        batch = collate([Crop(wide, wide.size, window)], rule)
        with torch.no_grad():
            whole = counter.density(torch.from_numpy(wide.image).permute(2, 0, 1)[None])
            cut = counter.density(batch.image)
        valid = batch.weight > 0
        expected = whole[..., window.top : window.top + window.height, window.left : window.left + window.width]
        torch.testing.assert_close(cut[valid], expected[valid], atol=1e-8, rtol=1e-4)
        checked += int(window.left > 0) * int((~valid).any())
    assert checked > 2


def test_train_step_with_nan_loss_raises_before_weights_change(discs: Dataset) -> None:
    trainer = trainer_of(discs)
    stage_trainer = trainer.stage_trainer(trainer.stages[0])
    batch = next(trainer.loader.epoch(1))
    parameters = dict(trainer.state.counter.named_parameters())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    batch.brightness[0] = float("nan")
    with pytest.raises(DivergedError, match=r"baseline stage.*density nan.*learning_rate"):
        stage_trainer.train_step(batch)
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())


def test_build_stages_with_zero_weights_drops_tasks() -> None:
    without_depth = build_stages(debug_config(loss=LossConfig(depth=0)))
    assert [stage.tasks for stage in without_depth] == [
        (DENSITY,), ("segmentation", "count"), (DENSITY, "segmentation", "count"),
    ]  # fmt: skip
    density_alone = build_stages(debug_config(loss=LossConfig(segmentation=0, depth=0, count=0)))
    assert [(stage.name, stage.tasks) for stage in density_alone] == [("baseline", (DENSITY,)), ("joint", (DENSITY,))]
    assert [stage.tasks for stage in build_stages(debug_config())] == [(DENSITY,), AUXILIARY, TASKS]


def test_fit_with_patience_stops_stage_early(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = StageConfig(epochs=30, learning_rate=1e-3, patience=2)
    stages = StagesConfig(schedule, decoders=StageConfig(0, 1e-3), joint=StageConfig(0, 1e-3))
    trainer = trainer_of(discs, debug_config(stages=stages))
    validated = trainer.validate(nullcontext)
    errors = iter([3.0, 2.0, 2.0, 4.0])
    monkeypatch.setattr(trainer, "validate", lambda autocast: dataclasses.replace(validated, mae=next(errors)))
    trainer.fit()
    assert [epoch["val/mae"] for epoch in trainer.state.progress.history] == [3.0, 2.0, 2.0, 4.0]
    assert trainer.state.progress.best["baseline"].epoch == 2


def test_trainer_with_checkpoint_of_other_data_raises(discs: Dataset) -> None:
    with pytest.raises(DataError, match="under a new --name"):
        trainer_of(discs, restored=checkpoint(1))


def test_trainer_with_rows_measures_trains_and_validates_these_only(discs: Dataset) -> None:
    rows = discs.rows("train")
    trainer = Trainer(debug_config(), discs, world=World(), device=CPU, rows=(rows[:8], rows[8:10]))
    scales = measure_scales(debug_config(), discs, rows[:8], trainer.state.counter.encoder.output_stride)
    assert trainer.state.scales == scales
    assert {row for batch in trainer.loader.epoch(1) for row in batch.rows.tolist()} == set(rows[:8].tolist())
    assert trainer.validate(nullcontext).images == 2


def test_trainer_without_validation_images_raises(discs: Dataset) -> None:
    config = debug_config(sampling=SamplingConfig(crop=32, validation_fraction=0.0))
    with pytest.raises(UserError, match=r"0 for validation.*validation_fraction"):
        trainer_of(discs, config)


def _start_rank(rank: int, workers: int, folder: str) -> World:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous-{workers}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=workers)
    return World(rank, workers)


def _end_rank() -> None:
    torch.distributed.barrier()
    os._exit(0)  # at a regular exit a thread of gloo sometimes aborts


def _train_rank(rank: int, workers: int, folder: str, uri: str, config: Config) -> None:
    world, dataset = _start_rank(rank, workers, folder), Dataset.open(uri)
    if workers > 1:
        for stage in range(3):
            check_gradients(trainer_of(dataset, config, world=world), stage)

    def save_first(metrics: EpochMetrics, save: Callable[[Path], None]) -> None:
        if rank == 0 and metrics["epoch"] == 1:
            save(Path(folder))

    trainer = trainer_of(dataset, config, world=world)
    trainer.fit(save_first)
    torch.save(trainer.state.counter.state_dict(), f"{folder}/{workers}-{rank}.pt")
    _end_rank()


@pytest.mark.parametrize(
    ("backbone", "workers", "grad_accumulation_steps"),
    [
        pytest.param("cfcn", 3, 1, marks=pytest.mark.slow),
        ("cfcn", 1, 3),
        pytest.param("csrnet", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_fit_with_workers_and_microbatches_equals_one_worker(
    discs: Dataset, tmp_path: Path, backbone: str, workers: int, grad_accumulation_steps: int
) -> None:
    """The weights agree within rounding after all stages, also for uneven slices and microbatches.

    Same global batches of 4, SGD, fp32. One worker resumes what several started.
    """
    config = sgd_config(backbone)
    three_updates = dataclasses.replace(config.sampling, validation_fraction=0.5)
    config = dataclasses.replace(config, sampling=three_updates)
    optimizer = dataclasses.replace(config.optimizer, grad_accumulation_steps=grad_accumulation_steps)
    accumulating = dataclasses.replace(config, optimizer=optimizer)
    alone = trainer_of(discs, config)
    alone.fit()
    mp.spawn(_train_rank, args=(workers, str(tmp_path), discs.uri, accumulating), nprocs=workers)  # type: ignore[attr-defined, no-untyped-call]
    states = [torch.load(tmp_path / f"{workers}-{rank}.pt") for rank in range(workers)]
    resumed = trainer_of(discs, config, restored=load_checkpoint(tmp_path))
    assert (resumed.state.progress.epochs, resumed.state.progress.world_size) == (1, 1)
    resumed.fit()
    epochs = alone.state.progress.epochs
    assert [epoch["workers"] for epoch in resumed.state.progress.history] == [workers] + [1] * (epochs - 1)
    for name, value in alone.state.counter.state_dict().items():
        torch.testing.assert_close(states[0][name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(resumed.state.counter.state_dict()[name], value, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(state[name], states[0][name]) for state in states)


def _reduce_in_bf16(rank: int, folder: str, uri: str) -> None:
    world = _start_rank(rank, 2, folder)
    config = debug_config(numerics=NumericsConfig(precision="fp32", grad_allreduce_dtype="bf16"))
    trainer = trainer_of(Dataset.open(uri), config, world=world)
    stage_trainer = trainer.stage_trainer(trainer.stages[0])
    model = stage_trainer.model
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    batch = next(trainer.loader.epoch(1))
    with model.no_sync():
        stage_trainer.microbatch_losses(model, batch, batch).sum().backward()  # type: ignore[no-untyped-call]
    halves = [(p.grad / 2).bfloat16() for p in stage_trainer.parameters if p.grad is not None]
    for half in halves:
        torch.distributed.all_reduce(half)
    stage_trainer.optimizer.zero_grad(set_to_none=True)
    stage_trainer.microbatch_losses(model, batch, batch).sum().backward()  # type: ignore[no-untyped-call]
    reduced = [p.grad for p in stage_trainer.parameters]
    for gradient, half in zip(reduced, halves, strict=True):
        assert gradient is not None and torch.equal(gradient, half.float())
    assert any(half.count_nonzero() for half in halves)
    _end_rank()


@pytest.mark.slow
def test_gradients_with_bf16_allreduce_are_mean_of_rounded_gradients(discs: Dataset, tmp_path: Path) -> None:
    mp.spawn(_reduce_in_bf16, args=(str(tmp_path), discs.uri), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]


@pytest.mark.slow
def test_running_statistics_with_two_workers_are_equal_and_exported(discs: Dataset, tmp_path: Path) -> None:
    config = sgd_config(SMALL)
    mp.spawn(_train_rank, args=(2, str(tmp_path), discs.uri, config), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    one, other = (torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2))
    assert any("running_mean" in name for name in one) and equal_tensors(one, other)
    trainer = trainer_of(discs, config)
    trainer.fit()
    assert equal_tensors(trainer.best_counter("joint").state_dict(), trainer.state.best_weights["joint"])


def test_evaluate_by_one_or_two_workers_is_identical(discs: Dataset) -> None:
    trainer = trainer_of(discs)
    trainer.fit()
    rows = discs.rows("test")
    alone = trainer.evaluate("joint", rows)
    density = trainer.best_counter("joint").density
    slices = [list(count_images(density, trainer.images, rows[rank::2].tolist(), CPU)) for rank in range(2)]
    assert sorted(slices[0] + slices[1], key=lambda count: count.row) == alone
    assert summarise(slices[1] + slices[0]) == summarise(alone)
