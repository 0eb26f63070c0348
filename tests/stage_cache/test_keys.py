"""Laws of the keys: a field changes the keys from the first stage whose states depend on it, and no earlier one."""

import dataclasses
import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdray.config import Config, LossConfig, ModelConfig, StageConfig, StagesConfig
from crowdray.data.shards import Dataset
from crowdray.models.cfcn import CFCN
from crowdray.presets import preset
from crowdray.stage_cache.keys import digest_of, numerics_of, stage_keys
from crowdray.training.checkpoint import Checkpoint, Row, load_checkpoint
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer

CPU = torch.device("cpu")
STAGES = ("baseline", "decoders", "joint")

# Every field of the configuration: another value, and the first stage whose states it changes. None: no stage's.
FIRST: dict[str, tuple[object, str | None]] = {
    "seed": (1, "baseline"),
    "sampling.validation": ("run", "baseline"),
    "sampling.validation_fraction": (0.25, "baseline"),
    "sampling.downsample": (2, "baseline"),
    "sampling.crop": (32, "baseline"),
    "sampling.context": (40, "baseline"),
    "sampling.batch": (4, "baseline"),
    "sampling.crops_per_image": (2, "baseline"),
    "sampling.flip": (0.25, "baseline"),
    "sampling.brightness": (0.1, "baseline"),
    "sampling.contrast": (0.1, "baseline"),
    "sampling.colour": (0.1, "baseline"),
    "sampling.scale": (0.1, "baseline"),
    "sampling.roi": (False, "baseline"),
    "sampling.cache_gib": (1.0, None),
    "sampling.gpu_cache_gib": (1.0, None),
    "target.sigma": (2.0, "baseline"),
    "target.threshold": (0.5, "decoders"),
    "model.backbone": (f"{__name__}:Other", "baseline"),
    "model.count_decoder": ("pooled", "decoders"),
    "model.weights": ("here.safetensors", "baseline"),
    "model.weights_sha256": ("0" * 64, "baseline"),
    "loss.segmentation": (0.08, "joint"),
    "loss.depth": (0.3, "joint"),
    "loss.count": (2.0, "joint"),
    "loss.gradient_share": (0.2, "joint"),
    "optimizer.name": ("sgd", "baseline"),
    "optimizer.momentum": (0.8, "baseline"),
    "optimizer.weight_decay": (0.1, "baseline"),
    "optimizer.warmup": (10, "baseline"),
    "optimizer.plateau_patience": (2, "baseline"),
    "optimizer.plateau_factor": (0.5, "baseline"),
    "optimizer.clip": (0.5, "baseline"),
    "optimizer.grad_accumulation_steps": (2, "baseline"),
    "optimizer.ema_decay": (0.9, "baseline"),
    "stages.baseline.epochs": (7, "decoders"),
    "stages.baseline.learning_rate": (1e-4, "baseline"),
    "stages.baseline.patience": (3, "baseline"),
    "stages.decoders.epochs": (7, "joint"),
    "stages.decoders.learning_rate": (1e-4, "decoders"),
    "stages.decoders.patience": (3, "decoders"),
    "stages.joint.epochs": (7, None),
    "stages.joint.learning_rate": (1e-4, "joint"),
    "stages.joint.patience": (3, "joint"),
    "numerics.precision": ("bf16", None),  # by way of numerics_of
    "numerics.compile": ("yes", None),  # likewise
    "numerics.tf32": (True, None),  # likewise
    "numerics.activation_checkpointing": (True, None),
    "numerics.threads": (3, None),  # likewise
    "numerics.grad_allreduce_dtype": ("bf16", None),  # of one worker, who exchanges nothing
}

TOGETHER = sorted(FIRST.keys() - {"numerics.activation_checkpointing"})
"""Those that may all be changed at once: a compiler recomputes by itself."""


class Other(CFCN):
    """A backbone that is not the default."""


def leaves(group: object, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(group):  # type: ignore[arg-type]
        value = getattr(group, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def changed(group: Any, path: str, value: object) -> Any:
    name, _, rest = path.partition(".")
    return dataclasses.replace(group, **{name: changed(getattr(group, name), rest, value) if rest else value})


def keys(config: Config, data: str = "d", world: int = 1, numerics: dict[str, str | int] | None = None) -> list[str]:
    return [chain.key for chain in stage_keys(config, data, world, numerics or {"threads": 1})]


def test_every_field_has_its_stage_and_another_value() -> None:
    assert set(FIRST) == set(leaves(Config())), "decide which stage's states a new field changes, in prefix.py and here"
    for path, (value, _) in FIRST.items():
        assert changed(Config(), path, value) != Config()


@pytest.mark.parametrize("path", FIRST)
def test_a_field_changes_the_keys_from_its_stage_on(path: str) -> None:
    value, first = FIRST[path]
    earlier = STAGES.index(first) if first else len(STAGES)
    equal = [one == other for one, other in zip(keys(Config()), keys(changed(Config(), path, value)), strict=True)]
    assert equal == [stage < earlier for stage in range(len(STAGES))]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.sampled_from(TOGETHER)), st.sets(st.sampled_from(TOGETHER)))
def test_keys_are_equal_just_where_all_that_matters_is(one: set[str], other: set[str]) -> None:
    def build(paths: set[str]) -> Config:
        config = Config()
        for path in paths:
            config = changed(config, path, FIRST[path][0])
        return config

    firsts = {first for path in one ^ other if (first := FIRST[path][1])}
    apart = min((STAGES.index(first) for first in firsts), default=len(STAGES))
    equal = [a == b for a, b in zip(keys(build(one)), keys(build(other)), strict=True)]
    assert equal == [stage < apart for stage in range(len(STAGES))]


def test_a_chain_tells_its_stage_and_length_and_no_two_are_alike() -> None:
    chains = stage_keys(Config(), "d", 1, {})
    assert [(chain.stage, chain.epochs) for chain in chains] == [("baseline", 40), ("decoders", 4), ("joint", 20)]
    assert len({chain.key for chain in chains}) == 3
    assert all(len(chain.key) == 32 and int(chain.key, 16) >= 0 for chain in chains)
    assert chains == stage_keys(Config(), "d", 1, {})
    with_sgd = changed(Config(), "optimizer.name", "sgd")
    assert not {chain.key for chain in chains} & set(keys(with_sgd))


def test_what_is_no_field_changes_all_keys() -> None:
    usual = keys(Config())
    for other in (
        keys(Config(), data="e"),
        keys(Config(), world=2),
        keys(Config(), numerics={"threads": 2}),
        keys(Config(), numerics={"threads": 1, "torch": "3"}),
    ):
        assert not set(usual) & set(other)
    exchanging = changed(Config(), "numerics.grad_allreduce_dtype", "bf16")
    assert not set(keys(Config(), world=2)) & set(keys(exchanging, world=2))
    assert keys(Config(), numerics={"a": 1, "b": 2}) == keys(Config(), numerics={"b": 2, "a": 1})


def test_a_dropped_task_changes_the_decoders_and_its_threshold_no_longer_counts() -> None:
    def differ(loss: LossConfig, path: str, value: object) -> list[bool]:
        config = dataclasses.replace(Config(), loss=loss)
        return [a != b for a, b in zip(keys(config), keys(changed(config, path, value)), strict=True)]

    assert differ(LossConfig(), "loss.count", 0.0) == [False, True, True]
    # The mask of the distilled depth is the segmentation's target: the threshold counts for either.
    for loss in (LossConfig(depth=0), LossConfig(segmentation=0)):
        assert differ(loss, "target.threshold", 0.5) == [False, True, True]
    assert differ(LossConfig(segmentation=0, depth=0), "target.threshold", 0.5) == [False, False, False]
    alone = LossConfig(segmentation=0, depth=0, count=0)
    for path, value in (("target.threshold", 0.5), ("loss.gradient_share", 0.5)):
        assert differ(alone, path, value) == [False, False]


def test_numerics_are_those_of_the_machine() -> None:
    fp32 = changed(Config(), "numerics.precision", "fp32")
    bf16 = changed(Config(), "numerics.precision", "bf16")
    told = numerics_of(fp32, CPU, 2)
    assert told["precision"] == "fp32" and told["device"] == "cpu" and told["threads"] == 2
    assert {name for name in told if told[name] != numerics_of(bf16, CPU, 2)[name]} == {"precision"}
    assert {name for name in told if told[name] != numerics_of(fp32, CPU, 3)[name]} == {"threads"}
    assert numerics_of(Config(), CPU, 2)["precision"] in ("fp32", "bf16")


def test_code_that_decides_changes_the_digest_and_other_code_does_not(tmp_path: Path) -> None:
    for name in ("training/trainer.py", "datasets/sources/mall.py", "cluster/train.py", "models/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = digest_of(tmp_path)
    for name in ("cluster/train.py", "models/notes.txt"):
        (tmp_path / name).write_text("x = 2\n")
    assert digest_of(tmp_path) == before
    for name in ("training/trainer.py", "datasets/sources/mall.py", "evaluation/new.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 2\n")
        assert digest_of(tmp_path) != before
        before = digest_of(tmp_path)


def test_the_source_of_a_users_backbone_is_part_of_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    config = dataclasses.replace(Config(), model=ModelConfig("homemade:Own"))

    def keys_with(code: str) -> list[str]:
        (tmp_path / "homemade.py").write_text(f"from crowdray.models.cfcn import CFCN\n\n\nclass Own(CFCN):\n{code}")
        sys.modules.pop("homemade", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return keys(config)

    first, other = keys_with("    first = 1\n"), keys_with("    other = 20\n")
    assert not set(first) & set(other)
    assert keys_with("    first = 1\n") == first


class _Enough(Exception):
    """A training has come as far as a test wants it."""


def state(discs: Dataset, config: Config, epoch: int, folder: Path) -> Checkpoint:
    """The checkpoint after a global epoch, where the training ends."""

    def keep(row: Row, save: Callable[[Path], None]) -> None:
        if row["epoch"] == epoch:
            folder.mkdir()
            save(folder)
            raise _Enough

    with pytest.raises(_Enough):
        Trainer(config, discs, world=World(), device=CPU).run(keep)
    return load_checkpoint(folder)


def test_trainings_with_equal_keys_pass_through_the_same_states(discs: Dataset, tmp_path: Path) -> None:
    """What the table says does not matter does not: bit for bit, in the midst of the decoders stage."""
    stages = StagesConfig(StageConfig(1, 3e-4), StageConfig(2, 1e-3), StageConfig(1, 3e-4))
    debug = preset("debug")
    few = dataclasses.replace(debug.sampling, context=16, validation_fraction=0.7)
    one = other = dataclasses.replace(debug, sampling=few, stages=stages)
    for path, (value, first) in FIRST.items():
        if path == "stages.decoders.epochs" or (first in (None, "joint") and not path.startswith("numerics.")):
            other = changed(other, path, value)
    assert [a == b for a, b in zip(keys(one), keys(other), strict=True)] == [True, True, False]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = (state(discs, config, 2, tmp_path / name) for name, config in (("one", one), ("other", other)))
    finally:
        torch.set_num_threads(threads)
    for left, right in ((a.weights, b.weights), (a.average, b.average), (a.optimizer, b.optimizer)):
        assert left.keys() == right.keys() and left
        assert all(torch.equal(left[name], right[name]) for name in left)
