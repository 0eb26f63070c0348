"""The batch that fits: the search against its definition, a memory that refuses, one that would kill, and the real
one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdray.config import Config
from crowdray.data.batch import Batch
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.presets import preset
from crowdray.training import batch_size_finder
from crowdray.training.batch_size_finder import RISE, SHARE, fastest, largest_batch
from crowdray.training.distributed import World
from crowdray.training.stage_trainer import StageTrainer
from crowdray.training.trainer import Trainer

CPU = torch.device("cpu")
WORKERS, PARTS = 3, 2


@settings(max_examples=300, deadline=None)
@given(limit=st.integers(0, 300), most=st.integers(1, 300), overhead=st.floats(0, 100), peak=st.integers(1, 400))
def test_the_smallest_power_of_two_that_is_fast_or_all_that_fits(
    limit: int, most: int, overhead: float, peak: int
) -> None:
    """Updates take a time of their own and one for each window, more for each beyond a peak."""
    asked: list[int] = []

    def pace(size: int) -> float:
        return size / (overhead + size * max(1, size / peak))

    def windows_per_s(size: int) -> float | None:
        fitting_before = [before for before in asked if before <= limit]
        assert size <= most and size > max(fitting_before, default=0)
        asked.append(size)
        return pace(size) if size <= limit else None

    room = min(limit, most)
    powers = [2**k for k in range(10) if 2**k <= room]
    expected = next((p for p in powers if 2 * p in powers and pace(2 * p) < RISE * pace(p)), None)
    if expected is None and powers:
        expected = room if pace(room) >= RISE * pace(powers[-1]) else powers[-1]
    assert fastest(windows_per_s, most) == (expected or 0)
    assert len(asked) <= 2 * most.bit_length() + 1


def config_of(grad_accumulation_steps: int = PARTS) -> Config:
    base = preset("debug")
    sampling = replace(base.sampling, context=16, validation_fraction=0.25, crops_per_image=8)
    return replace(
        base, sampling=sampling, optimizer=replace(base.optimizer, grad_accumulation_steps=grad_accumulation_steps)
    )


@pytest.fixture
def tirelessly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger is always faster, so that memory decides."""
    monkeypatch.setattr(batch_size_finder, "RISE", 0.0)
    monkeypatch.setattr(batch_size_finder, "TIMED", 1)


@pytest.mark.usefixtures("tirelessly")
def test_what_memory_refuses_is_not_taken(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of the parts of an update, so that the batch is that of all parts of all workers."""
    whole, seen = StageTrainer._losses, []

    def losses(self: StageTrainer, model: torch.nn.Module, part: Batch, batch: Batch) -> torch.Tensor:
        seen.append(len(part.rows))
        if len(part.rows) > 11:
            raise torch.OutOfMemoryError
        return whole(self, model, part, batch)

    monkeypatch.setattr(StageTrainer, "_losses", losses)
    assert largest_batch(config_of(), discs, device=CPU, workers=WORKERS) == 11 * WORKERS * PARTS
    assert {1, 2, 4, 8, 11, 12, 16} <= set(seen)
    monkeypatch.setattr(StageTrainer, "_losses", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match=r"not even one window of 64x64 pixels fits into 90% of .*--sampling.crop 32"):
        largest_batch(config_of(), discs, device=CPU, workers=WORKERS)


@pytest.mark.usefixtures("tirelessly")
def test_what_would_be_killed_is_never_tried(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 500 bytes, 100 for each window; the pictures that it will keep are taken off."""
    whole, seen = StageTrainer._step, [0]

    def step(self: StageTrainer, batch: Batch) -> torch.Tensor:
        seen.append(len(batch.rows))
        return whole(self, batch)

    monkeypatch.setattr(StageTrainer, "_step", step)
    monkeypatch.setattr(batch_size_finder, "peak_memory", lambda device: 500 + 100 * max(seen))
    config = config_of(grad_accumulation_steps=1)
    room = (500 + 100 * 13 + 50 + 5 * 24 * 64 * 96) / SHARE
    assert largest_batch(config, discs, device=CPU, workers=1, room=int(room)) == 13
    assert max(seen) == 13


def test_the_real_one_trains(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size_finder, "TIMED", 1)
    config = config_of()
    config = replace(config, sampling=replace(config.sampling, crops_per_image=1))
    batch = largest_batch(config, discs, device=CPU, workers=1, room=2**34)
    assert batch % PARTS == 0 and PARTS <= batch <= 18
    find_batch_size = replace(config, sampling=replace(config.sampling, batch=batch))
    training = Trainer(find_batch_size, discs, world=World(), device=CPU)
    StageTrainer(training, training.stages[-1], None)._step(next(training.loader.epoch(1)))


def test_measuring_learns_nothing(discs: Dataset) -> None:
    updates = batch_size_finder._Updates(config_of(), discs, CPU, None, grouped=True)
    assert len(updates.buckets) == sum(value.numel() for value in updates.training.counter.parameters())
    before = {name: value.clone() for name, value in updates.training.counter.named_parameters()}
    assert updates.running.stage.name == "joint"
    assert (updates.windows_per_s(2) or 0) > 0
    assert all(torch.equal(value, before[name]) for name, value in updates.training.counter.named_parameters())
