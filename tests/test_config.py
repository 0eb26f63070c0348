"""Configuration: presets are valid, all problems come together, and the saved form is accepted back."""

import dataclasses
import json

import pytest

from crowdray.config import Config, ConfigError, LossConfig, SamplingConfig, TargetConfig, from_json, to_json
from crowdray.errors import UserError
from crowdray.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_saved_form(name: str) -> None:
    config = preset(name)
    assert from_json(to_json(config), "here") == config


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'mal-cfcn'; choose one of demo, mall-cfcn"):
        preset("mal-cfcn")


def test_all_problems_are_reported_together_with_value_and_mend() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(
            seed=-1,
            sampling=SamplingConfig(crop=30, batch=0),
            target=TargetConfig(threshold=2.0),
            loss=LossConfig(depth=float("nan")),
        )
    assert len(caught.value.problems) == 5
    message = str(caught.value)
    for part in (
        "seed is -1",
        "sampling.crop is 30",
        "try 28",
        "sampling.batch is 0",
        "threshold is 2.0",
        "loss.depth is nan",
    ):
        assert part in message


def test_a_file_with_wrong_types_and_unknown_fields_reports_each() -> None:
    content = json.loads(to_json(preset("debug")))
    content["sampling"]["crop"] = "wide"
    content["optimizer"]["nam"] = "sgd"
    content["loss"]["depth"] = None
    with pytest.raises(ConfigError) as caught:
        from_json(json.dumps(content), "config.json")
    message = str(caught.value)
    for part in (
        "sampling.crop in config.json is 'wide'",
        "optimizer.nam in config.json is no field",
        "loss.depth",
    ):
        assert part in message


def test_problems_of_a_file_are_those_of_the_configuration() -> None:
    content = json.loads(to_json(preset("debug")))
    content["sampling"]["batch"] = 0
    with pytest.raises(ConfigError, match=r"sampling\.batch is 0; give at least 1"):
        from_json(json.dumps(content), "config.json")


@pytest.mark.parametrize(("before", "now"), [(True, "yes"), (False, "no")])
def test_a_file_from_when_compiling_was_a_switch_is_read(before: bool, now: str) -> None:
    content = json.loads(to_json(preset("debug")))
    content["numerics"]["compile"] = before
    assert from_json(json.dumps(content), "old.json").numerics.compile == now


def test_fields_left_out_keep_their_defaults() -> None:
    assert from_json('{"seed": 3}', "x") == dataclasses.replace(Config(), seed=3)


def test_no_json_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"x\.json is no JSON"):
        from_json("seed: 3", "x.json")
