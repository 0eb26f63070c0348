"""The batch size finder: its search, limits that raise and limits that kill, and a real measurement."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdray.config import Config
from crowdray.data.batch import Batch
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.training import batch_size_finder
from crowdray.training.batch_size_finder import (
    MEMORY_FRACTION,
    MIN_SPEEDUP,
    StepTimer,
    measure_batch_size,
    search_microbatch_size,
)
from crowdray.training.stage_trainer import StageTrainer

from ..support.trainers import CPU, debug_config, limit_windows, trainer_of

WORKERS, STEPS = 3, 2


@settings(max_examples=300, deadline=None)
@given(capacity=st.integers(0, 300), limit=st.integers(1, 300), overhead=st.floats(0, 100), knee=st.integers(1, 400))
def test_search_microbatch_size_returns_smallest_fast_power_of_two_or_largest_that_fits(
    capacity: int, limit: int, overhead: float, knee: int
) -> None:
    """A step costs a constant and a time per window, which grows beyond the knee."""
    measured: list[int] = []

    def speed(size: int) -> float:
        return size / (overhead + size * max(1, size / knee))

    def windows_per_s(size: int) -> float | None:
        assert max([before for before in measured if before <= capacity], default=0) < size <= limit
        measured.append(size)
        return speed(size) if size <= capacity else None

    largest = min(capacity, limit)
    powers = [2**k for k in range(10) if 2**k <= largest]
    expected = next((p for p in powers if 2 * p in powers and speed(2 * p) < MIN_SPEEDUP * speed(p)), None)
    if expected is None and powers:
        expected = largest if speed(largest) >= MIN_SPEEDUP * speed(powers[-1]) else powers[-1]
    assert search_microbatch_size(windows_per_s, limit) == (expected or 0)
    assert len(measured) <= 2 * limit.bit_length() + 1


def config_of(grad_accumulation_steps: int = STEPS, crops_per_image: int = 8) -> Config:
    optimizer = {"grad_accumulation_steps": grad_accumulation_steps}
    return debug_config(sampling={"crops_per_image": crops_per_image}, optimizer=optimizer)


@pytest.fixture
def memory_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat larger sizes as always faster, so that only memory limits the batch."""
    monkeypatch.setattr(batch_size_finder, "MIN_SPEEDUP", 0.0)
    monkeypatch.setattr(batch_size_finder, "TIMED_STEPS", 1)


@pytest.mark.usefixtures("memory_limited")
def test_measure_batch_size_with_out_of_memory_errors_returns_largest_that_fits(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit holds for a microbatch; the batch is that of all microbatches of all workers."""
    seen = limit_windows(monkeypatch, 11)
    assert measure_batch_size(config_of(), discs, device=CPU, workers=WORKERS) == 11 * WORKERS * STEPS
    assert {1, 2, 4, 8, 11, 12, 16} <= set(seen)


def test_measure_batch_size_without_memory_for_one_window_raises(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_windows(monkeypatch, 0)
    with pytest.raises(UserError, match=r"no window of 64x64 pixels fits into 90% of .*--sampling.crop \(32"):
        measure_batch_size(config_of(), discs, device=CPU, workers=WORKERS)


@pytest.mark.usefixtures("memory_limited")
def test_measure_batch_size_with_memory_limit_never_exceeds_it(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 500 bytes and 100 per window, minus the decoded images that the worker will cache."""
    train_step, seen = StageTrainer.train_step, [0]

    def recorded(self: StageTrainer, batch: Batch) -> torch.Tensor:
        seen.append(len(batch.rows))
        return train_step(self, batch)

    monkeypatch.setattr(StageTrainer, "train_step", recorded)
    monkeypatch.setattr(batch_size_finder, "peak_memory", lambda device: 500 + 100 * max(seen))
    config = config_of(grad_accumulation_steps=1)
    memory = (500 + 100 * 13 + 50 + 5 * 24 * 64 * 96) / MEMORY_FRACTION
    assert measure_batch_size(config, discs, device=CPU, workers=1, memory_bytes=int(memory)) == 13
    assert max(seen) == 13


def test_measure_batch_size_result_trains(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size_finder, "TIMED_STEPS", 1)
    config = config_of(crops_per_image=1)
    batch = measure_batch_size(config, discs, device=CPU, workers=1, memory_bytes=2**34)
    assert batch % STEPS == 0 and STEPS <= batch <= 18
    config = replace(config, sampling=replace(config.sampling, batch=batch))
    trainer = trainer_of(discs, config)
    trainer.stage_trainer(trainer.stages[-1]).train_step(next(trainer.loader.epoch(1)))


def test_step_timer_leaves_parameters_unchanged(discs: Dataset) -> None:
    timer = StepTimer(config_of(), discs, CPU, None, distributed=True)
    parameters = dict(timer.state.counter.named_parameters())
    assert len(timer.gradient_buckets) == sum(value.numel() for value in parameters.values())
    before = {name: value.clone() for name, value in parameters.items()}
    assert timer.stage_trainer.stage.name == "joint"
    assert (timer.windows_per_s(2) or 0) > 0
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())
