"""Configuration: valid presets, all problems in one error, and a JSON form that is read back."""

import dataclasses
import json
import operator
from typing import Any

import pytest

from crowdray.config import (
    RENAMED_FIELDS,
    Config,
    ConfigError,
    LossConfig,
    SamplingConfig,
    TargetConfig,
    from_json,
    to_json,
    with_init,
)
from crowdray.errors import UserError
from crowdray.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_from_json_restores_every_preset(name: str) -> None:
    config = preset(name)
    assert from_json(to_json(config), "config.json") == config


def test_preset_with_unknown_name_lists_the_presets() -> None:
    with pytest.raises(UserError, match=r"'mal-cfcn'; choose one of demo, mall-cfcn"):
        preset("mal-cfcn")


def test_config_reports_all_problems_with_value_and_fix() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(
            seed=-1,
            sampling=SamplingConfig(crop=30, batch=0),
            target=TargetConfig(threshold=2.0),
            loss=LossConfig(depth=float("nan")),
        )
    assert len(caught.value.problems) == 5
    for part in ("seed is -1", "crop is 30", "try 28", "batch is 0", "threshold is 2.0", "loss.depth is nan"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 3", ["x.json is not valid JSON"]),
        ("[1]", ["x.json is [1]"]),
        ('{"sampling": {"batch": 0}}', ["sampling.batch is 0; give at least 1"]),
        (
            '{"sampling": {"crop": "wide"}, "optimizer": {"nam": "sgd"}, "loss": {"depth": null}}',
            ["sampling.crop in x.json is 'wide'", "unknown field optimizer.nam in x.json", "loss.depth in x.json"],
        ),
    ],
)
def test_from_json_reports_every_problem_of_the_text(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(text, "x.json")
    assert all(part in str(caught.value) for part in parts)
    assert len(caught.value.problems) == len(parts)


@pytest.mark.parametrize(
    ("old", "value", "now"),
    [
        ("loss.share", 0.25, 0.25),
        ("optimizer.accumulate", 3, 3),
        ("optimizer.average", 0.5, 0.5),
        ("numerics.recompute", True, True),
        ("numerics.exchange", "bf16", "bf16"),
        ("numerics.compile", True, "yes"),
        ("numerics.compile", False, "no"),
    ],
)
def test_from_json_accepts_previous_names_and_values_of_fields(old: str, value: Any, now: Any) -> None:
    group, name = old.split(".")
    config = from_json(json.dumps({group: {name: value}}), "config.json")
    assert operator.attrgetter(RENAMED_FIELDS.get(old, old))(config) == now


def test_from_json_with_both_names_of_a_field_keeps_the_present_one() -> None:
    assert from_json('{"loss": {"share": 0.2, "gradient_share": 0.4}}', "config.json").loss.gradient_share == 0.4


def test_from_json_fills_missing_fields_with_defaults() -> None:
    assert from_json('{"seed": 3}', "config.json") == dataclasses.replace(Config(), seed=3)


def test_a_counter_to_start_from_replaces_pretrained_weights() -> None:
    model = with_init(preset("lite0"), "models:/crowdray-mall/1").model
    assert (model.init, model.weights) == ("models:/crowdray-mall/1", "")
