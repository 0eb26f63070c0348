"""Laws of the loop: stages train what they name, a resumed training equals an unbroken one, and windows see
what images see."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

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
from crowdray.data.batch import View, collate
from crowdray.data.sampling import draw_window
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.evaluation.inference import count_images
from crowdray.evaluation.metrics import summarise
from crowdray.models.backbone import Backbone
from crowdray.models.counter import AUXILIARY, DENSITY, TASKS
from crowdray.presets import preset
from crowdray.training.checkpoint import MEASURED_METRICS, EpochMetrics, load_checkpoint
from crowdray.training.distributed import World, local_world
from crowdray.training.errors import DivergedError
from crowdray.training.result import TrainingResult, final_result
from crowdray.training.stages import build_stages, module_of
from crowdray.training.trainer import Trainer

CPU = torch.device("cpu")


def small(**change: object) -> Config:
    config = preset("debug")
    sampling = dataclasses.replace(config.sampling, context=16, validation_fraction=0.25)
    return dataclasses.replace(config, **{"sampling": sampling, **change})  # type: ignore[arg-type]


def training(discs: Dataset, config: Config | None = None, restored: Path | None = None) -> Trainer:
    checkpoint = load_checkpoint(restored) if restored else None
    return Trainer(config or small(), discs, world=World(), device=CPU, restored=checkpoint)


def numbers(rows: list[EpochMetrics]) -> list[dict[str, float | str]]:
    """Rows without what a clock measured."""
    return [{name: value for name, value in row.items() if name not in MEASURED_METRICS} for row in rows]


class Thin(Backbone):
    """A user's own: stride 8, and running statistics."""

    channels = 16
    stride = 8
    output_stride = 8
    receptive_radius = 70

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in ((3, 8), (8, 16), (16, 16))
        ]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, image: Tensor) -> Tensor:
        features: Tensor = self.blocks(image)
        return features


OWN = f"{__name__}:Thin"


def with_backbone(backbone: str, **change: object) -> Config:
    """A small training of any backbone, by SGD in fp32: what is frozen stands still to the bit, whatever it is."""
    count_decoder = "paper" if backbone == "cfcn" else "pooled"
    once = StageConfig(1, 1e-2)
    return small(
        model=ModelConfig(backbone, count_decoder),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(name="sgd", clip=0.0),
        stages=StagesConfig(once, once, once),
        numerics=NumericsConfig(precision="fp32"),
        **change,
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("backbone", [*BACKBONES, OWN])
def test_a_stage_trains_the_modules_it_names_and_no_other(discs: Dataset, backbone: str, stage: int) -> None:
    check_gradients(training(discs, with_backbone(backbone)), stage)


def check_gradients(run: Trainer, stage: int) -> None:
    """After an epoch all parameters that the stage names have changed, and nothing else has, statistics included."""
    running = run.stage_trainer(run.stages[stage])
    before = {name: value.clone() for name, value in run.state.counter.state_dict().items()}
    running.train_epoch()
    for name, value in run.state.counter.state_dict().items():
        assert torch.equal(value, before[name]) == (module_of(name) not in running.stage.modules), name
    for name, parameter in run.state.counter.named_parameters():
        assert (parameter.grad is not None) == (module_of(name) in running.stage.modules), name


def test_decoders_side_by_side_equal_decoders_in_succession(discs: Dataset) -> None:
    """Decision 4: they share a frozen encoder and do not influence each other. Clipping, which would join
    them, is off."""
    together = small(optimizer=OptimizerConfig(clip=0.0))
    run = training(discs, together)
    side_by_side = run.stage_trainer(run.stages[1])
    for batch in run.loader.epoch(1):
        side_by_side.train_step(batch)
    for task in AUXILIARY:
        alone = training(discs, together)
        stage = dataclasses.replace(alone.stages[1], tasks=(task,), modules=(task,))
        running = alone.stage_trainer(stage)
        for batch in alone.loader.epoch(1):
            running.train_step(batch)
        for one, other in zip(
            run.state.counter.decoders[task].parameters(), alone.state.counter.decoders[task].parameters(), strict=True
        ):
            assert torch.equal(one, other)


def test_resumed_after_any_epoch_equals_unbroken(discs: Dataset, tmp_path: Path) -> None:
    def keep(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        folder = tmp_path / str(row["epoch"])
        folder.mkdir()
        save(folder)

    unbroken = training(discs)
    unbroken.fit(keep)
    expected = final_result(unbroken)
    epochs = sorted(int(folder.name) for folder in tmp_path.iterdir())
    assert epochs == [1, 2, 3, 4, 5]
    for epoch in epochs:
        resumed = training(discs, restored=tmp_path / str(epoch))
        resumed.fit()
        result = final_result(resumed)
        assert numbers(result.history) == numbers(expected.history)
        assert result.stages == expected.stages
        assert result.best_stage == expected.best_stage
    assert TrainingResult.from_json(expected.to_json(), "x") == expected


def test_a_shorter_training_ends_where_a_longer_one_passes(discs: Dataset, tmp_path: Path) -> None:
    """The last checkpoint of a stage goes on into the next stage, or into a longer version of its own."""

    def keep(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        folder = tmp_path / f"{row['epoch']}"
        folder.mkdir()
        save(folder)

    training(discs).fit(keep)
    stages = small().stages
    longer = StagesConfig(
        dataclasses.replace(stages.baseline, epochs=stages.baseline.epochs + 1),
        dataclasses.replace(stages.decoders, epochs=stages.decoders.epochs + 1),
        dataclasses.replace(stages.joint, epochs=1),
    )
    config = small(stages=longer)
    unbroken = training(discs, config)
    unbroken.fit()
    continued = training(discs, config, restored=tmp_path / str(stages.baseline.epochs))
    continued.fit()
    assert numbers(continued.state.progress.history) == numbers(unbroken.state.progress.history)
    for name, value in unbroken.state.counter.state_dict().items():
        assert torch.equal(continued.state.counter.state_dict()[name], value)


def test_a_window_sees_what_the_whole_image_sees(discs: Dataset) -> None:
    """The cure of the border surplus: wherever a window's loss has weight, its density is the whole
    image's."""
    run = training(discs, small(sampling=SamplingConfig(crop=16, context=36, flip=0.0)))
    run.state.counter.eval()
    rule, checked = run.loader.rule, 0
    for row in range(8):
        picture = run.images[row]
        wide = dataclasses.replace(picture, image=picture.image.repeat(2, axis=1), roi=None, encoded_depth=None)
        window = draw_window(rule, wide.size, seed=1, epoch=0, sample=row)
        batch = collate([View(wide, wide.size, window)], rule)
        with torch.no_grad():
            whole = run.state.counter.density(torch.from_numpy(wide.image).permute(2, 0, 1)[None])
            seen = run.state.counter.density(batch.image)
        valid = batch.weight > 0
        there = whole[..., window.top : window.top + window.height, window.left : window.left + window.width]
        torch.testing.assert_close(seen[valid], there[valid], atol=1e-8, rtol=1e-4)
        checked += int(window.left > 0) * int((~valid).any())
    assert checked > 2


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(discs: Dataset) -> None:
    run = training(discs)
    running = run.stage_trainer(run.stages[0])
    batch = next(run.loader.epoch(1))
    before = {name: value.detach().clone() for name, value in run.state.counter.named_parameters()}
    batch.brightness[0] = float("nan")
    with pytest.raises(DivergedError, match=r"baseline stage.*density nan.*learning_rate"):
        running.train_step(batch)
    assert all(torch.equal(value, before[name]) for name, value in run.state.counter.named_parameters())


def test_tasks_without_weight_are_dropped_and_without_any_the_joint_stage_is_the_baseline_continued() -> None:
    without = build_stages(small(loss=LossConfig(depth=0)))
    assert [stage.tasks for stage in without] == [
        (DENSITY,), ("segmentation", "count"), (DENSITY, "segmentation", "count"),
    ]  # fmt: skip
    alone = build_stages(small(loss=LossConfig(segmentation=0, depth=0, count=0)))
    assert [(stage.name, stage.tasks) for stage in alone] == [("baseline", (DENSITY,)), ("joint", (DENSITY,))]
    assert [stage.tasks for stage in build_stages(small())] == [(DENSITY,), AUXILIARY, TASKS]


def test_a_stage_ends_early_when_its_patience_is_over(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = StageConfig(epochs=30, learning_rate=1e-3, patience=2)
    stages = StagesConfig(schedule, decoders=StageConfig(0, 1e-3), joint=StageConfig(0, 1e-3))
    run = training(discs, small(stages=stages))
    whole = run.validate(nullcontext)
    errors = iter([3.0, 2.0, 2.0, 4.0])
    monkeypatch.setattr(run, "validate", lambda autocast: dataclasses.replace(whole, mae=next(errors)))
    run.fit()
    assert [row["val/mae"] for row in run.state.progress.history] == [3.0, 2.0, 2.0, 4.0]
    assert run.state.progress.best["baseline"].epoch == 2


def test_a_checkpoint_of_other_data_or_a_damaged_one_is_refused(discs: Dataset, tmp_path: Path) -> None:
    run = training(discs)
    running = run.stage_trainer(run.stages[0])
    running.fit_epoch()
    run._save(tmp_path, running)
    checkpoint = load_checkpoint(tmp_path)
    checkpoint.progress.data_digest = "f" * 64
    with pytest.raises(DataError, match="under a new --name"):
        Trainer(small(), discs, world=World(), device=CPU, restored=checkpoint)
    content = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="does not contain a complete checkpoint"):
        load_checkpoint(tmp_path)


def test_a_dataset_too_small_to_validate_on_is_refused(discs: Dataset) -> None:
    config = small(sampling=SamplingConfig(crop=32, validation_fraction=0.0))
    with pytest.raises(UserError, match=r"0 for validation.*validation_fraction"):
        training(discs, config)


def _rank(rank: int, world: int, place: str, uri: str, config: Config) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}/rendezvous-{world}", rank=rank, world_size=world
    )
    run = Trainer(config, Dataset.open(uri), world=local_world(), device=CPU)
    if world > 1:
        for stage in range(3):
            check_gradients(Trainer(config, run.images.dataset, world=run.state.world, device=CPU), stage)

    def keep(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        if rank == 0 and row["epoch"] == 1:
            save(Path(place))

    run.fit(keep)
    torch.save(run.state.counter.state_dict(), f"{place}/{world}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # the interpreter's own end now and then aborts in a thread of gloo's, after all is done


@pytest.mark.parametrize(
    ("backbone", "workers", "grad_accumulation_steps"), [("cfcn", 3, 1), ("cfcn", 1, 3), ("csrnet", 2, 2)]
)
def test_many_workers_and_parts_train_what_one_worker_trains_at_once(
    discs: Dataset, tmp_path: Path, backbone: str, workers: int, grad_accumulation_steps: int
) -> None:
    """Same global batches of 4, SGD, fp32: the weights agree within rounding after all three stages, also where shares
    and parts are uneven, and each stage trains what it names on every rank."""
    config = with_backbone(backbone)
    few = dataclasses.replace(config.sampling, validation_fraction=0.5)  # three updates an epoch
    config = dataclasses.replace(config, sampling=few)
    parts = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, grad_accumulation_steps=grad_accumulation_steps)
    )
    alone = training(discs, config)
    alone.fit()
    mp.spawn(_rank, args=(workers, str(tmp_path), discs.uri, parts), nprocs=workers)  # type: ignore[attr-defined, no-untyped-call]
    states = [torch.load(tmp_path / f"{workers}-{rank}.pt") for rank in range(workers)]
    fewer = training(discs, config, tmp_path)  # what so many began, one ends
    assert (fewer.state.progress.epochs, fewer.state.progress.world_size) == (1, 1)
    fewer.fit()
    assert [row["workers"] for row in fewer.state.progress.history] == [workers] + [1] * (
        alone.state.progress.epochs - 1
    )
    for name, value in alone.state.counter.state_dict().items():
        torch.testing.assert_close(states[0][name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(fewer.state.counter.state_dict()[name], value, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(state[name], states[0][name]) for state in states)


def _exchange(rank: int, place: str, uri: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=2)
    config = small(numerics=NumericsConfig(precision="fp32", grad_allreduce_dtype="bf16"))
    run = Trainer(config, Dataset.open(uri), world=local_world(), device=CPU)
    running = run.stage_trainer(run.stages[0])
    model = running.model
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    batch = next(run.loader.epoch(1))
    with model.no_sync():
        running.microbatch_losses(model, batch, batch).sum().backward()  # type: ignore[no-untyped-call]
    halves = [(p.grad / 2).bfloat16() for p in running.parameters if p.grad is not None]
    for half in halves:
        torch.distributed.all_reduce(half)
    running.optimizer.zero_grad(set_to_none=True)
    running.microbatch_losses(model, batch, batch).sum().backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in running.parameters]
    assert len(found) == len(halves)
    assert all(got is not None and torch.equal(got, half.float()) for got, half in zip(found, halves, strict=True))
    assert any(half.count_nonzero() for half in halves)
    torch.distributed.barrier()
    os._exit(0)


def test_gradients_exchanged_in_bf16_are_the_mean_of_rounded_ones(discs: Dataset, tmp_path: Path) -> None:
    mp.spawn(_exchange, args=(str(tmp_path), discs.uri), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]


def test_running_statistics_are_the_same_on_all_workers_and_ship(discs: Dataset, tmp_path: Path) -> None:
    config = with_backbone(OWN)
    mp.spawn(_rank, args=(2, str(tmp_path), discs.uri, config), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    one, other = (torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2))
    assert any("running_mean" in name for name in one)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    run = training(discs, config)
    run.fit()
    shipped = run.best_counter("joint").state_dict()
    assert shipped.keys() == run.state.best_weights["joint"].keys()
    assert all(torch.equal(shipped[name], value) for name, value in run.state.best_weights["joint"].items())


def test_one_and_two_workers_evaluate_a_checkpoint_identically(discs: Dataset, tmp_path: Path) -> None:
    run = training(discs)
    run.fit()
    rows = discs.rows("test")
    alone = run.evaluate("joint", rows)
    density = run.best_counter("joint").density
    shares = [list(count_images(density, run.images, rows[rank::2].tolist(), CPU)) for rank in range(2)]
    assert sorted(shares[0] + shares[1], key=lambda count: count.row) == alone
    assert summarise(shares[1] + shares[0]) == summarise(alone)
