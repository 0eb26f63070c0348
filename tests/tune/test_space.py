"""The search space: its samples are valid, its points survive a round trip, and each mistake has a message."""

import dataclasses
import json
import pickle
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import optuna
import pytest

from crowdray.config import FIELDS, Config, LossConfig, StageConfig, StagesConfig
from crowdray.presets import PRESETS, preset
from crowdray.tune.space import (
    FIXED,
    PAPER_POINT,
    Choice,
    Range,
    Space,
    SpaceError,
    default_space,
    first_points,
    load_space,
)

WIDE = [
    'target.sigma={"low": 2, "high": 6}',
    'optimizer.name=["sgd", "adamw", "muon"]',
    'optimizer.warmup={"low": 10, "high": 110, "step": 20}',
    'optimizer.plateau_patience={"low": 1, "high": 32, "log": true}',
    'optimizer.clip={"low": 0.1, "high": 10, "log": true, "zero": true}',
    'stages.joint.learning_rate={"low": 1e-4, "high": 1e-2, "log": true}',
    'stages.joint.patience={"low": 2, "high": 4, "zero": true}',
    "sampling.crop=[96, 64]",
]
"""One dimension of every kind, in addition to the default ones."""


@pytest.fixture(autouse=True)
def silence_optuna() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(verbosity)


def random_study(seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))


def problems_of(vary: list[str], base: Config | None = None, path: str | None = None) -> list[str]:
    with pytest.raises(SpaceError) as caught:
        load_space(path, vary, base or preset("mall-cfcn"))
    return caught.value.problems


def contains(dimension: Any, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.choices
    on_step = not dimension.step or (value - dimension.low) % dimension.step == 0
    return (dimension.zero and value == 0) or (dimension.low <= value <= dimension.high and on_step)


@pytest.mark.parametrize("name", PRESETS)
def test_samples_are_inside_the_space_and_valid(name: str) -> None:
    base = preset(name)
    excluded = {"stages.joint.patience": base.stages.joint.anneal_epochs > 0, "sampling.crop": base.sampling.crop < 96}
    space = load_space(None, [entry for entry in WIDE if not excluded.get(entry.partition("=")[0])], base)
    study = random_study()
    for _ in range(200):
        values = space.suggest(study.ask())
        config = space.configure(base, values)
        for field in FIELDS:
            value, own = attrgetter(field)(config), attrgetter(field)(base)
            assert value == values.get(field, own) and type(value) is type(own)
            assert field not in space.dimensions or contains(space.dimensions[field], value), (field, value)


def test_parameters_of_a_configuration_reproduce_it() -> None:
    base = preset("demo")
    space = load_space(None, WIDE, base)
    study = random_study()
    sampled = [space.configure(base, space.suggest(study.ask())) for _ in range(100)]
    again = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
    for config in sampled:
        again.enqueue_trial(space.parameters(config))
    for config in sampled:
        trial = again.ask()
        assert space.configure(base, space.suggest(trial)) == config
        assert trial.params == space.parameters(config)
        again.tell(trial, 1.0)


def test_random_samples_contain_each_subset_of_tasks_equally_often() -> None:
    space = default_space(preset("demo"))
    study = random_study(seed=3)
    points = [space.suggest(study.ask()) for _ in range(800)]
    subsets = [tuple(name for name in PAPER_POINT if point[name] > 0) for point in points]
    chi_square = sum((subsets.count(subset) - 100) ** 2 / 100 for subset in set(subsets))
    assert len(set(subsets)) == 8
    assert chi_square < 24.3  # the 99.9th percentile for 7 degrees of freedom


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("demo", [(2, 4, 6), (1, 2), (3, 5, 8)]),
        ("mall-cfcn", [(2, 3, 5), (1, 2), (8, 16, 24)]),
        ("cfcn", [(20, 40, 60), (2, 4, 6), (10, 20, 30)]),
        ("debug", [(1, 2, 3), (1, 2), (1, 2, 3)]),
    ],
)
def test_default_space_is_centered_on_the_paper_weights_and_the_preset_lengths(name: str, lengths: list[Any]) -> None:
    space = default_space(preset(name))
    assert [space.stage_lengths(stage) for stage in ("baseline", "decoders", "joint")] == lengths
    for weight, paper in PAPER_POINT.items():
        dimension: Any = space.dimensions[weight]
        assert (dimension.low * dimension.high) ** 0.5 == pytest.approx(paper)


def test_default_space_contains_its_base_for_any_weights_and_omitted_stages() -> None:
    omitted = StageConfig(epochs=0, learning_rate=1e-3)
    stages = StagesConfig(StageConfig(epochs=4, learning_rate=1e-3), omitted, omitted)
    changes: list[dict[str, Any]] = [{"stages": stages}]
    changes += [{"loss": LossConfig(depth=50.0, count=0.0)}, {"loss": LossConfig(segmentation=1e-5)}]
    for change in changes:
        base = dataclasses.replace(preset("mall-cfcn"), **change)
        space = default_space(base)
        trial = optuna.trial.FixedTrial(space.parameters(base))
        assert space.configure(base, space.suggest(trial)) == base


def test_stage_lengths_of_a_range_are_its_steps() -> None:
    vary = ['stages.joint.epochs={"low": 4, "high": 12, "step": 4, "zero": true}', "stages.decoders.epochs=null"]
    space = load_space(None, vary, preset("demo"))
    assert space.stage_lengths("joint") == (0, 4, 8, 12)
    assert space.stage_lengths("decoders") == ()


def points_of(space: Space, base: Config) -> list[Config]:
    """The configurations that a study starts with."""
    points = first_points(space, base)
    return [space.configure(base, space.suggest(optuna.trial.FixedTrial(point))) for point in points]


def test_first_points_are_the_base_the_paper_weights_and_no_task() -> None:
    paper = preset("demo")
    none = dataclasses.replace(paper, loss=LossConfig(0.0, 0.0, 0.0, gradient_share=paper.loss.gradient_share))
    other = dataclasses.replace(paper, loss=dataclasses.replace(paper.loss, depth=2.0))
    assert points_of(default_space(paper), paper) == [paper, none]
    assert points_of(default_space(other), other) == [other, paper, none]


def test_first_points_have_the_nearest_values_of_other_fields() -> None:
    base = preset("mall-cfcn")
    vary = [
        "stages.baseline.epochs=[8, 4]",
        'target.sigma={"low": 5, "high": 9}',
        'optimizer.warmup={"low": 10, "high": 110, "step": 50}',
        'optimizer.name=["sgd", "adamw"]',
    ]
    for config in points_of(load_space(None, vary, base), base):
        assert config.stages.baseline.epochs == 4
        assert config.target.sigma == 5.0
        assert config.optimizer.warmup == 110
        assert config.optimizer.name == "adamw"


def test_first_points_omit_points_outside_the_space() -> None:
    base = preset("demo")
    always = load_space(None, ['loss.depth={"low": 0.06, "high": 6}'], base)
    assert points_of(always, base) == [base]
    still = load_space(None, ["loss.depth=null", 'loss.count={"low": 2, "high": 4, "zero": true}'], base)
    assert points_of(still, base) == []


def test_json_of_a_space_loads_as_the_same_space(tmp_path: Path) -> None:
    base, other = preset("demo"), preset("mall-cfcn")
    file = tmp_path / "space.json"
    for vary in ([], WIDE, ["loss.count=null", "stages.joint.epochs=null", *WIDE]):
        space = load_space(None, vary, base)
        file.write_text(space.to_json())
        for again in (load_space(str(file), [], base), load_space(str(file), [], other)):
            assert again == space
            assert list(again.dimensions) == list(space.dimensions)
        assert pickle.loads(pickle.dumps(space)) == space


def test_load_space_applies_the_file_and_then_vary(tmp_path: Path) -> None:
    base = preset("demo")
    file = tmp_path / "space.json"
    file.write_text('{"loss.depth": {"low": 1, "high": 2}, "loss.count": null, "target.sigma": [3, 2.5]}')
    space = load_space(str(file), ["loss.depth=[0.5, 0]", " target.threshold = [0.2, 0.3]"], base)
    kept = {name: item for name, item in default_space(base).dimensions.items() if name.startswith("stages")}
    assert space.dimensions == kept | {
        "loss.segmentation": Range(low=0.004, high=0.4, log=True, zero=True),
        "loss.depth": Choice(choices=(0.0, 0.5)),
        "target.sigma": Choice(choices=(2.5, 3.0)),
        "target.threshold": Choice(choices=(0.2, 0.3)),
    }
    assert "target.sigma" not in load_space(str(file), ["target.sigma=null"], base).dimensions


MISTAKES = [
    ("los.depth=[0, 1]", "los.depth in --vary is not a field; is it loss.depth?"),
    ("sigma=null", "sigma in --vary is not a field; is it target.sigma?"),
    *((f"{name}=[1, 2]", f"{name} in --vary cannot vary: {reason}") for name, reason in FIXED.items()),
    ("zzz=[1, 2]", "zzz in --vary is not a field; see --help"),
    ("loss.depth", "--vary 'loss.depth' has no =; write --vary 'loss.depth={\"low\": 0.06, \"high\": 6}'"),
    ("loss.depth={low: 1}", "--vary loss.depth is not JSON: key must be a string"),
    ("loss.depth=0.6", "loss.depth in --vary is 0.6; give a range"),
    ('loss.depth={"lo": 1, "high": 2}', "lo of loss.depth in --vary is not a key; is it low?"),
    ('loss.depth={"0": 1}', "0 of loss.depth in --vary is not a key; give low, high, log, zero, step"),
    ('loss.depth={"choices": 0}', "choices of loss.depth in --vary is 0: input should be a valid tuple"),
    ("loss.depth={}", "loss.depth in --vary has no low; give low and high, or choices"),
    ('loss.depth={"low": 1}', "loss.depth in --vary has no high; give low and high, or choices"),
    ('loss.depth={"low": 1, "choices": [1]}', "low of loss.depth in --vary is not a key; give choices"),
    ('loss.depth={"choices": [1], "zero": true}', "zero of loss.depth in --vary is not a key; give choices"),
    ('loss.depth={"low": 6, "high": 1}', "low of loss.depth in --vary is 6.0 and high is 1.0; give a low below high"),
    ('loss.depth={"low": "1", "high": 2}', "low of loss.depth in --vary is '1': input should be a valid number"),
    ('loss.depth={"low": true, "high": 2}', "low of loss.depth in --vary is True: input should be a valid number"),
    ('loss.depth={"low": [1], "high": 2}', "low of loss.depth in --vary is [1]: input should be a valid number"),
    ('loss.depth={"low": 1, "high": NaN}', "high of loss.depth in --vary is nan; give at least 0.0"),
    ('loss.depth={"low": 0, "high": 2, "log": true}', 'is 0.0, but a log scale has no 0; raise low and add "zero"'),
    ('loss.depth={"low": 1, "high": 2, "log": 1}', "log of loss.depth in --vary is 1: input should be a valid boolean"),
    ('loss.depth={"low": 1, "high": 2, "zero": "no"}', "zero of loss.depth in --vary is 'no': input should be a"),
    ('loss.depth={"low": 1, "high": 2, "step": 1}', "step of loss.depth in --vary is 1; only integers on a linear"),
    ('optimizer.name={"low": 1, "high": 2}', "optimizer.name in --vary is a range, but the field is not a number"),
    ('sampling.batch={"low": 2, "high": 8, "step": 2, "log": true}', "step of sampling.batch in --vary is 2; only int"),
    ('sampling.batch={"low": 2, "high": 8, "step": 0}', "step of sampling.batch in --vary is 0: input should be"),
    ('sampling.batch={"low": 2, "high": 8, "step": "2"}', "step of sampling.batch in --vary is '2': input should be"),
    ('sampling.batch={"low": 2, "high": 9, "step": 4}', "is 4 and does not lead from 2 to 9; give high 6"),
    ('sampling.batch={"low": 2, "high": 4, "step": 8}', "is 8 and does not lead from 2 to 4; give high 10"),
    ("loss.depth=[]", "choices of loss.depth in --vary are empty; give at least one value"),
    ("loss.depth=[1, 2, 1.0]", "choices of loss.depth in --vary contain 1.0 twice; give each value once"),
    ("stages.joint.epochs=[2, 2.5]", "a choice of stages.joint.epochs in --vary is 2.5: input should be a valid"),
    ("stages.joint.epochs=[2, true]", "a choice of stages.joint.epochs in --vary is True: input should be a valid"),
    ('optimizer.name=["sgd", "adam"]', "a choice of optimizer.name in --vary is 'adam': input should be 'sgd', "),
    ('loss.depth={"low": -1, "high": 1}', "low of loss.depth in --vary is -1.0; give at least 0.0"),
    ("target.sigma=[4, 65]", "a choice of target.sigma in --vary is 65.0; give a number from 0.25 to 64.0"),
    ('target.sigma={"low": 2, "high": 6, "zero": true}', "zero of target.sigma in --vary allows 0.0; give a number"),
    ('stages.baseline.epochs={"low": 2, "high": 6, "zero": true}', "zero of stages.baseline.epochs in --vary allows 0"),
    ('sampling.crop={"low": 32, "high": 64}', "step of sampling.crop in --vary leads to 33; the model's stride of 4"),
    ("stages.decoders.epochs=[0, 1]", "in --vary is 0; stages.decoders.epochs is 0 but stages.joint.epochs is not"),
]


@pytest.mark.parametrize(("vary", "message"), MISTAKES, ids=[vary for vary, _ in MISTAKES])
def test_load_space_message_states_field_value_source_and_fix(vary: str, message: str) -> None:
    found = problems_of([vary])
    assert any(message in problem for problem in found), found


def test_load_space_reports_all_problems_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    entries = {"loss.depth": {"low": 6, "high": -1}, "seed": [1, 2], "sampling.crop": [30], "loss.count": 2}
    file.write_text(json.dumps(entries))
    found = problems_of(["target.sigm=[1]", "loss.count=[1, 1]", "flip"], path=str(file))
    for part in (
        "--vary 'flip' has no =",
        f"low of loss.depth in {file} is 6.0 and high is -1.0",
        f"high of loss.depth in {file} is -1.0; give at least 0.0",
        f"seed in {file} cannot vary",
        f"a choice of sampling.crop in {file} is 30; the model's stride of 4 must divide it: try 28",
        "choices of loss.count in --vary contain 1.0 twice",
        "target.sigm in --vary is not a field; is it target.sigma?",
    ):
        assert any(problem.startswith(part) for problem in found), (part, found)
    assert len(found) == 7


def test_load_space_reports_pairs_of_values_that_conflict() -> None:
    left_out = StageConfig(epochs=0, learning_rate=1e-3)
    stages = StagesConfig(decoders=StageConfig(epochs=1, learning_rate=1e-3), joint=left_out)
    base = dataclasses.replace(preset("demo"), stages=stages)
    (problem,) = problems_of(["stages.decoders.epochs=[0, 1]", "stages.joint.epochs=[0, 5]"], base)
    assert problem.startswith("stages.decoders.epochs 0 with stages.joint.epochs 5: stages.decoders.epochs is 0 but")


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "is [1]; give an object"), ("{", "is not JSON"), ("\xff", "not JSON")]
)
def test_load_space_reports_an_unusable_file_once(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "space.json"
    file.write_bytes(text.encode("latin-1"))
    (problem,) = problems_of([], path=str(file))
    assert problem.startswith(str(file)) and message in problem


def test_empty_space_and_single_point_are_refused() -> None:
    nothing = [f"{name}=null" for name in default_space(preset("demo")).dimensions]
    assert problems_of(nothing)[0].startswith("it is empty; let a field vary: --vary 'loss.depth=")
    assert problems_of([*nothing, "loss.depth=[1]"]) == ["loss.depth has the single value 1.0; add a choice"]
