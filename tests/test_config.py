"""Configuration: valid presets, all problems in one error, and a JSON form that is read back."""

import dataclasses
import json
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


def test_from_json_reports_each_wrong_type_and_unknown_field() -> None:
    content = json.loads(to_json(preset("debug")))
    content["sampling"]["crop"] = "wide"
    content["optimizer"]["nam"] = "sgd"
    content["loss"]["depth"] = None
    with pytest.raises(ConfigError) as caught:
        from_json(json.dumps(content), "config.json")
    for part in ("sampling.crop in config.json is 'wide'", "unknown field optimizer.nam in config.json", "loss.depth"):
        assert part in str(caught.value)


def test_from_json_reports_invalid_values() -> None:
    content = json.loads(to_json(preset("debug")))
    content["sampling"]["batch"] = 0
    with pytest.raises(ConfigError, match=r"sampling\.batch is 0; give at least 1"):
        from_json(json.dumps(content), "config.json")


@pytest.mark.parametrize(
    ("old", "value"),
    [
        ("loss.share", 0.25),
        ("optimizer.accumulate", 3),
        ("optimizer.average", 0.5),
        ("numerics.recompute", True),
        ("numerics.exchange", "bf16"),
    ],
)
def test_from_json_accepts_previous_field_names(old: str, value: Any) -> None:
    group, name = old.split(".")
    config = from_json(json.dumps({group: {name: value}}), "config.json")
    new_group, new_name = RENAMED_FIELDS[old].split(".")
    assert getattr(getattr(config, new_group), new_name) == value


def test_from_json_with_both_names_of_a_field_keeps_the_present_one() -> None:
    assert from_json('{"loss": {"share": 0.2, "gradient_share": 0.4}}', "config.json").loss.gradient_share == 0.4


@pytest.mark.parametrize(("before", "now"), [(True, "yes"), (False, "no")])
def test_from_json_accepts_boolean_compile(before: bool, now: str) -> None:
    content = json.loads(to_json(preset("debug")))
    content["numerics"]["compile"] = before
    assert from_json(json.dumps(content), "config.json").numerics.compile == now


def test_from_json_fills_missing_fields_with_defaults() -> None:
    assert from_json('{"seed": 3}', "config.json") == dataclasses.replace(Config(), seed=3)


@pytest.mark.parametrize(("text", "problem"), [("seed: 3", "is not valid JSON"), ("[1]", "is [1]")])
def test_from_json_rejects_text_that_is_not_a_json_object(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(text, "x.json")
    assert "x.json" in str(caught.value) and problem in str(caught.value)
