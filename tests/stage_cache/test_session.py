"""The stage cache: a run that resumes from stored states equals a run from scratch, bit for bit."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdray.config import Config, LossConfig, StageConfig, StagesConfig
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.stage_cache.options import StageCacheOptions
from crowdray.stage_cache.session import StageCacheConfig, StageCacheSession
from crowdray.training.checkpoint import load_checkpoint
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer

from ..support.trainers import CPU, Interrupted, computed, debug_config, equal_tensors, save_epochs, trainer_of


def make_config(baseline: int, decoders: int, joint: int, **loss: Any) -> Config:
    stages = StagesConfig(StageConfig(baseline, 3e-4), StageConfig(decoders, 1e-3), StageConfig(joint, 3e-4))
    return debug_config(stages=stages, loss=LossConfig(**loss))


@pytest.fixture
def stage_cache(tmp_path: Path) -> StageCacheConfig:
    return StageCacheConfig(str(tmp_path / "stages"), 2**30)


def open_session(
    stage_cache: StageCacheConfig, config: Config, discs: Dataset, world: World | None = None, threads: int = 1
) -> StageCacheSession:
    return StageCacheSession(stage_cache, config, discs, world=world or World(), device=CPU, threads=threads)


def train(discs: Dataset, config: Config, stage_cache: StageCacheConfig) -> tuple[Trainer, int]:
    """Train with a stage cache; returns the trainer and the number of epochs restored from the cache."""
    session = open_session(stage_cache, config, discs, threads=torch.get_num_threads())
    trainer = trainer_of(discs, config, restored=session.restore())
    restored = len(trainer.state.progress.history)
    trainer.fit(lambda row, save: session.save(trainer, save))
    return trainer, restored


@pytest.mark.slow
def test_run_with_stage_cache_equals_run_from_scratch(discs: Dataset, stage_cache: StageCacheConfig) -> None:
    stage_cache = dataclasses.replace(stage_cache, snapshot_epochs={"baseline": (1,)})
    steps = [
        (make_config(2, 1, 1), 0),
        (make_config(2, 1, 1, depth=1.2), 3),  # the decoders stage does not depend on the loss weights
        (make_config(3, 1, 1), 2),  # longer baseline
        (make_config(1, 2, 1), 1),  # shorter baseline: its snapshot
        (make_config(2, 2, 1, segmentation=0), 2),  # other decoders
        (make_config(2, 1, 2, depth=1.2), 4),  # longer joint stage
        (make_config(2, 1, 1), 4),  # the first one again: nothing left to train
    ]
    for config, expected in steps:
        cached, restored = train(discs, config, stage_cache)
        assert restored == expected
        scratch = trainer_of(discs, config)
        scratch.fit()
        assert computed(cached.state.progress.history) == computed(scratch.state.progress.history)
        assert cached.state.progress.best == scratch.state.progress.best
        for stage, weights in scratch.state.best_weights.items():
            assert equal_tensors(cached.state.best_weights[stage], weights)


def test_session_stores_states_until_the_world_size_changes(
    discs: Dataset, tmp_path: Path, stage_cache: StageCacheConfig
) -> None:
    """Two workers, one, and two again: only epochs before the first change are stored, under the key of two."""
    config = make_config(4, 1, 1)
    stage_cache = dataclasses.replace(stage_cache, snapshot_epochs={"baseline": (1, 2, 3)})
    store = stage_cache.open()

    def epochs_stored_by(size: int, start: int, end: int) -> list[list[int]]:
        """Resume after epoch `start`, lose the workers after epoch `end`; returns the stored epochs per stage."""
        session = open_session(stage_cache, config, discs, World(0, size))
        own = session.resume_from(load_checkpoint(tmp_path / f"{start}")) if start else None
        trainer = trainer_of(discs, config, restored=own)
        with pytest.raises(Interrupted):
            trainer.fit(save_epochs(tmp_path, lambda save: session.save(trainer, save), end))
        return [store.epochs(key) for key in session.stage_keys]

    assert epochs_stored_by(2, 0, 1) == [[1], [], []]
    assert epochs_stored_by(2, 1, 2) == [[1, 2], [], []]
    assert epochs_stored_by(1, 2, 3) == [[], [], []]
    assert epochs_stored_by(2, 3, 6) == [[1, 2], [], []]


def test_damaged_states_are_trained_again(discs: Dataset, stage_cache: StageCacheConfig) -> None:
    config = make_config(1, 1, 1)
    train(discs, config, stage_cache)
    for path in Path(stage_cache.uri, "states").rglob("weights.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    again, restored = train(discs, config, stage_cache)
    assert restored == 0 and len(again.state.progress.history) == 3
    assert train(discs, config, stage_cache)[1] == 3


def test_stage_cache_options_default_to_a_folder_in_storage(tmp_path: Path) -> None:
    assert StageCacheOptions().config(str(tmp_path)) == StageCacheConfig(str(tmp_path / "stages"), 20 * 2**30)
    assert StageCacheOptions("memory://stages", 0.5).config(str(tmp_path)) == StageCacheConfig("memory://stages", 2**29)
    with pytest.raises(UserError, match=r"--stage-cache-gib is -1; give at least 0"):
        StageCacheOptions(stage_cache_gib=-1).config(str(tmp_path))


class SeparateStores(World):
    """Two ranks, the second of which finds no state to load in its own store."""

    def all_gather(self, items: list[Any]) -> list[Any]:
        """Return the items of both ranks."""
        return [*items, False if items == [True] else items[0]]


def test_restore_rejects_different_stores_per_rank(discs: Dataset, stage_cache: StageCacheConfig) -> None:
    config = make_config(1, 1, 1)
    session = open_session(stage_cache, config, discs, SeparateStores(0, 2))
    trainer = trainer_of(discs, config)
    trainer.fit(lambda row, save: session.save(trainer, save))
    with pytest.raises(UserError, match=r"stages is not the same folder for all workers; give --stage-cache"):
        session.restore()
