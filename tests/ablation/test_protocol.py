"""The protocol of an ablation: what cells have in common, as many updates in each, and the order they start in."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdray.ablation.arms import Arm, default_arms, parse_arms
from crowdray.ablation.protocol import (
    Ablation,
    Cell,
    cell_config,
    check_updates,
    plan_ablation,
    planned_updates,
    with_annealed_end,
)
from crowdray.ablation.schedule import next_cell
from crowdray.config import Config
from crowdray.data.shards import Dataset, write_index, write_shard
from crowdray.errors import UserError
from crowdray.presets import preset
from crowdray.stage_cache.keys import stage_keys

from ..support.builders import noise_sample
from ..support.trainers import debug_config, trainer_of

BASE = with_annealed_end(debug_config())
ARMS = parse_arms(default_arms(BASE.loss), ["loss.depth=0.1,2"], BASE.loss)


def cell(arm: Arm, fraction: float = 1, seed: int = 0, backbone: str = "cfcn") -> Cell:
    return Cell(arm, fraction, backbone, seed)


def changed(one: Config, other: Config) -> set[str]:
    """Names of the groups in which two configurations differ."""
    return {name for name in vars(one) if getattr(one, name) != getattr(other, name)}


def plan(data: str, folder: Path, **options: Any) -> Ablation:
    given: dict[str, Any] = {
        "arms": None,
        "sweeps": [],
        "fractions": [1.0],
        "backbones": [],
        "seeds": [1],
        "threads": 1,
    }
    given |= {"name": None, "tracking_uri": None} | options
    return plan_ablation(preset("debug"), data, "debug", folder=str(folder), **given)


def test_arms_differ_in_loss_alone_except_none_which_replaces_decoders() -> None:
    configs = [cell_config(BASE, cell(arm, seed=3), 24) for arm in ARMS]
    reference = configs[-1]
    for arm, config in zip(ARMS, configs, strict=True):
        assert changed(config, reference) <= ({"loss", "stages"} if arm.name == "none" else {"loss"})
        assert config.seed == 3
    assert configs[0].stages.joint.epochs == BASE.stages.joint.epochs + BASE.stages.decoders.epochs
    assert configs[0].stages.joint.anneal_epochs == BASE.stages.joint.anneal_epochs == 1


@pytest.mark.parametrize("fraction", [1, 0.5, 0.3])
def test_planned_updates_are_those_of_trainer_and_equal_in_all_arms(discs: Dataset, fraction: float) -> None:
    cells = [cell(arm, fraction, seed) for arm in ARMS for seed in (0, 1)]
    updates = {}
    for one in cells:
        config = cell_config(BASE, one, 24)
        trainer = trainer_of(discs, config) if one.arm.name in ("none", "all") else None
        updates[one] = planned_updates(config, discs)
        if trainer:
            epochs = sum(stage.schedule.epochs for stage in trainer.stages)
            assert updates[one] == trainer.loader.steps() * epochs
    check_updates(updates)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_fraction_keeps_number_of_updates(fraction: float) -> None:
    stages = dataclasses.replace(BASE.stages, joint=dataclasses.replace(BASE.stages.joint, epochs=16))
    base = dataclasses.replace(BASE, stages=stages)
    whole, part = (cell_config(base, cell(ARMS[0], f), 400) for f in (1, fraction))
    assert part.sampling.images == 400 * fraction

    def drawn(config: Config, images: float) -> float:
        return float(images * sum(stage.epochs for stage in vars(config.stages).values()))

    assert drawn(part, 400 * fraction) == pytest.approx(drawn(whole, 400), rel=0.02)


def test_check_updates_refuses_arm_with_other_number() -> None:
    none, everything = parse_arms(["none", "all"], [], BASE.loss)
    equal = {cell(none): 25, cell(everything): 25, cell(none, 0.5): 24, cell(everything, 0.5): 24}
    check_updates(equal)
    with pytest.raises(UserError, match=r"fraction 1 of cfcn: none 25, all 25, all 26"):
        check_updates(equal | {cell(everything, seed=1): 26})


def test_with_annealed_end_keeps_given_length_and_refuses_early_stopping() -> None:
    def stages(**joint: int) -> Config:
        config = debug_config()
        changed_joint = dataclasses.replace(config.stages.joint, **joint)
        return dataclasses.replace(config, stages=dataclasses.replace(config.stages, joint=changed_joint))

    assert with_annealed_end(stages(epochs=16)).stages.joint.anneal_epochs == 6
    assert with_annealed_end(stages(epochs=16, anneal_epochs=3)).stages.joint.anneal_epochs == 3
    with pytest.raises(UserError, match=r"stages.joint.patience is 2"):
        with_annealed_end(stages(patience=2))
    with pytest.raises(UserError, match=r"stages.joint.epochs is 0"):
        with_annealed_end(stages(epochs=0))


def test_plan_ablation_name_depends_on_protocol_but_not_on_seeds(discs: Dataset, tmp_path: Path) -> None:
    first = plan(discs.uri, tmp_path)
    assert plan(discs.uri, tmp_path, seeds=[1, 2]).uri == first.uri
    for options in (
        {"arms": ["none", "all"]},
        {"fractions": [0.5]},
        {"backbones": ["crowdray.models.cfcn:CFCN"]},
        {"threads": 2},
    ):
        assert plan(discs.uri, tmp_path, **options).uri != first.uri


def test_create_or_verify_accepts_more_seeds_and_refuses_other_arms(discs: Dataset, tmp_path: Path) -> None:
    plan(discs.uri, tmp_path, name="a").create_or_verify(device="cpu")
    plan(discs.uri, tmp_path, name="a", seeds=[1, 2]).create_or_verify()
    with pytest.raises(UserError, match="arms"):
        plan(discs.uri, tmp_path, name="a", sweeps=["loss.depth=9"]).create_or_verify()
    with pytest.raises(UserError, match="device: recorded cpu, given gpu"):
        plan(discs.uri, tmp_path, name="a").create_or_verify(device="gpu")


def test_plan_ablation_on_dataset_without_depth_needs_weight_0(tmp_path: Path) -> None:
    listed = [noise_sample(number, "train", (24, 32), 2, roi=False, depth=None) for number in range(6)]
    data = str(tmp_path / "data")
    write_index(data, [write_shard(listed, data, 0)], source="listed", depth_teacher="none")
    with pytest.raises(UserError, match=r"--loss.depth 0"):
        plan(data, tmp_path)
    plan(data, tmp_path, arms=["none", "count"])


@pytest.mark.parametrize(
    "options", [{"seeds": [1, 1]}, {"seeds": []}, {"fractions": [0]}, {"fractions": [1.5]}, {"threads": 0}]
)
def test_plan_ablation_wrong_option_is_user_error(discs: Dataset, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        plan(discs.uri, tmp_path, **options)


def start_all(cells: Sequence[str], stages: dict[str, list[str]], slots: int, pick: Any) -> list[str]:
    """Run cells stage by stage, in an order of progress that `pick` chooses; returns the trained stages."""
    waiting, running, trained = [*cells], dict[str, int](), list[str]()
    while waiting or running:
        while len(running) < slots and (name := next_cell(waiting, running, stages)):
            waiting.remove(name)
            running[name] = 0
        assert running, "no cell can start"
        name = pick(sorted(running))
        key = stages[name][running[name]]
        if key not in trained:
            trained.append(key)
            others = [stages[other][done:] for other, done in running.items() if other != name]
            assert all(key not in left for left in others), "two running cells train one stage"
        running[name] += 1
        if running[name] == len(stages[name]):
            del running[name]
    return trained


@settings(max_examples=20, deadline=None)
@given(slots=st.integers(1, 6), data=st.data())
def test_next_cell_trains_each_shared_stage_once(slots: int, data: st.DataObject) -> None:
    cells = {cell(arm, seed=seed).name: cell(arm, seed=seed) for seed in (1, 2) for arm in ARMS}
    stages = {
        name: [key.key for key in stage_keys(cell_config(BASE, one, 24), "digest", 1, {})]
        for name, one in cells.items()
    }
    trained = start_all([*cells], stages, slots, lambda names: data.draw(st.sampled_from(names)))
    assert sorted(trained) == sorted({key for keys in stages.values() for key in keys})
    baselines = {keys[0] for keys in stages.values()}
    assert len(baselines) == 2, "one baseline for each seed"
