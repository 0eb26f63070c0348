"""A training that starts from what others left is the training that started from nothing, bit for bit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdray.config import Config, LossConfig, SamplingConfig, StageConfig, StagesConfig
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.presets import preset
from crowdray.stage_cache.session import StageCacheConfig, StageCacheOptions, StageCacheSession
from crowdray.stage_cache.store import StageStore
from crowdray.training.checkpoint import MEASURED_METRICS, EpochMetrics, load_checkpoint
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer

CPU = torch.device("cpu")


def config_of(baseline: int, decoders: int, joint: int, **loss: float) -> Config:
    config = preset("debug")
    stages = StagesConfig(StageConfig(baseline, 3e-4), StageConfig(decoders, 1e-3), StageConfig(joint, 3e-4))
    sampling = SamplingConfig(crop=32, context=16, batch=4, validation_fraction=0.25)
    return dataclasses.replace(config, sampling=sampling, stages=stages, loss=LossConfig(**loss))


def train(discs: Dataset, config: Config, stage_cache: StageCacheConfig | None) -> tuple[Trainer, int]:
    """Train, through the shelf if there is one; also says how many epochs were found there."""
    if stage_cache is None:
        alone = Trainer(config, discs, world=World(), device=CPU)
        alone.fit()
        return alone, 0
    session = StageCacheSession(stage_cache, config, discs, world=World(), device=CPU, threads=torch.get_num_threads())
    training = Trainer(config, discs, world=World(), device=CPU, restored=session.restore())
    found = len(training.state.progress.history)
    training.fit(lambda row, save: session.keep(training, save))
    return training, found


def test_a_training_through_the_store_equals_one_without_it(discs: Dataset, tmp_path: Path) -> None:
    stage_cache = StageCacheConfig(str(tmp_path / "stages"), 2**30, quanta={"baseline": (1,)})
    steps = [
        (config_of(2, 1, 1), 0),
        (config_of(2, 1, 1, depth=1.2), 3),  # the decoders' stage does not depend on the weights
        (config_of(3, 1, 1), 2),  # a longer baseline
        (config_of(1, 2, 1), 1),  # a shorter one, a snapshot on the way
        (config_of(2, 2, 1, segmentation=0), 2),  # other decoders
        (config_of(2, 1, 2, depth=1.2), 4),  # a longer joint stage
        (config_of(2, 1, 1), 4),  # the first one again: nothing is left to train
    ]
    for config, expected in steps:
        shared, found = train(discs, config, stage_cache)
        assert found == expected
        alone, _ = train(discs, config, None)
        rows = [
            [{k: v for k, v in row.items() if k not in MEASURED_METRICS} for row in t.state.progress.history]
            for t in (shared, alone)
        ]
        assert rows[0] == rows[1]
        assert shared.state.progress.best == alone.state.progress.best
        for stage, weights in alone.state.best_weights.items():
            assert all(torch.equal(shared.state.best_weights[stage][name], value) for name, value in weights.items())


def test_what_other_code_or_other_workers_began_is_continued_and_not_shared(discs: Dataset, tmp_path: Path) -> None:
    config = config_of(2, 1, 1)
    kept: list[Path] = []

    def keep(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        session.keep(training, save)
        kept.append(tmp_path / f"own-{row['epoch']}")
        kept[-1].mkdir()
        save(kept[-1])

    def sharing_of(stage_cache: str, threads: int) -> StageCacheSession:
        return StageCacheSession(
            StageCacheConfig(str(tmp_path / stage_cache), 2**30),
            config,
            discs,
            world=World(),
            device=CPU,
            threads=threads,
        )

    session, training = sharing_of("first", 1), Trainer(config, discs, world=World(), device=CPU)
    training.fit(keep)

    def shared_by(threads: int) -> list[str]:
        going_on = sharing_of(f"{threads}", threads)
        own = going_on.resume_from(load_checkpoint(kept[1]))
        continued = Trainer(config, discs, world=World(), device=CPU, restored=own)
        continued.fit(lambda row, save: going_on.keep(continued, save))
        store = StageStore(str(tmp_path / f"{threads}"), 2**30)
        return [chain.stage for chain in going_on.chains if store.epochs(chain)]

    assert shared_by(threads=1) == ["decoders", "joint"]
    assert shared_by(threads=7) == []


def test_a_stage_that_is_over_keeps_no_search_waiting(discs: Dataset, tmp_path: Path) -> None:
    stage_cache, config = StageCacheConfig(str(tmp_path / "stages"), 2**30), config_of(2, 1, 2)
    session = StageCacheSession(stage_cache, config, discs, world=World(), device=CPU, threads=1)
    training = Trainer(config, discs, world=World(), device=CPU)
    claimed: list[list[bool]] = []

    def keep(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        session.keep(training, save)
        claimed.append([stage_cache.open().claimed(chain) for chain in session.chains])

    with session.advertise("me"):
        training.fit(keep)
    done = [[True, True, True], [False, True, True], [False, False, True], [False, False, True], [False, False, False]]
    assert claimed == done


class Lost(Exception):
    """The workers are gone."""


def test_what_groups_of_several_sizes_trained_is_under_no_key(discs: Dataset, tmp_path: Path) -> None:
    """Two workers, one, and two again: only what came before the first change is stored, under the key of two."""
    config = config_of(4, 1, 1)
    stage_cache = StageCacheConfig(str(tmp_path / "stages"), 2**30, quanta={"baseline": (1, 2, 3)})
    store = stage_cache.open()

    def stored_by(size: int, begun: int, ended: int) -> list[list[int]]:
        """So many workers go on after an epoch and are lost after another; gives the epochs under their keys."""
        session = StageCacheSession(stage_cache, config, discs, world=World(0, size), device=CPU, threads=1)
        own = session.resume_from(load_checkpoint(tmp_path / f"own-{begun}")) if begun else None
        training = Trainer(config, discs, world=World(), device=CPU, restored=own)

        def keep(row: EpochMetrics, save: Callable[[Path], None]) -> None:
            session.keep(training, save)
            (tmp_path / f"own-{row['epoch']}").mkdir()
            save(tmp_path / f"own-{row['epoch']}")
            if row["epoch"] == ended:
                raise Lost

        with session.advertise("me"), pytest.raises(Lost):
            assert all(store.claimed(chain) != bool(begun) for chain in session.chains)
            training.fit(keep)
        return [store.epochs(chain) for chain in session.chains]

    assert stored_by(2, 0, 1) == [[1], [], []]
    assert stored_by(1, 1, 2) == [[], [], []]
    assert stored_by(2, 2, 6) == [[1], [], []]


def test_a_damaged_beginning_is_trained_again(discs: Dataset, tmp_path: Path) -> None:
    stage_cache = StageCacheConfig(str(tmp_path / "stages"), 2**30)
    config = config_of(1, 1, 1)
    train(discs, config, stage_cache)
    for place in (tmp_path / "stages" / "states").rglob("weights.safetensors"):
        content = bytearray(place.read_bytes())
        content[-1] ^= 1
        place.write_bytes(content)
    again, found = train(discs, config, stage_cache)
    assert found == 0 and len(again.state.progress.history) == 3
    assert train(discs, config, stage_cache)[1] == 3


def test_the_store_lies_beside_the_runs_unless_it_is_named(tmp_path: Path) -> None:
    assert StageCacheOptions().config(str(tmp_path)) == StageCacheConfig(str(tmp_path / "stages"), 20 * 2**30)
    assert StageCacheOptions("memory://stages", 0.5).config(str(tmp_path)) == StageCacheConfig("memory://stages", 2**29)
    with pytest.raises(UserError, match=r"--stage-cache-gib is -1; give at least 0"):
        StageCacheOptions(stage_cache_gib=-1).config(str(tmp_path))


class Apart(World):
    """Two ranks, the second of which has a store of its own."""

    def all_gather(self, items: list[Any]) -> list[Any]:
        """See World.all_gather."""
        return [*items, False if items == [True] else items[0]]


def test_a_store_that_is_not_the_same_for_all_workers_is_told(discs: Dataset, tmp_path: Path) -> None:
    config, stage_cache = config_of(1, 1, 1), StageCacheConfig(str(tmp_path / "stages"), 2**30)
    session = StageCacheSession(stage_cache, config, discs, world=Apart(0, 2), device=CPU, threads=1)
    training = Trainer(config, discs, world=World(), device=CPU)
    training.fit(lambda row, save: session.keep(training, save))
    with pytest.raises(UserError, match=r"stages is not the same folder for all workers; give --stage-cache"):
        session.restore()
