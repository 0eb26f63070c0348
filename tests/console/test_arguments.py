"""Parsing of arguments, and overrides of single configuration fields."""

from dataclasses import replace

import pytest

from crowdray.config import IMAGENET, ConfigError
from crowdray.console.arguments import parse, parse_with_config
from crowdray.console.commands.convert import ConvertJob
from crowdray.console.commands.train import TrainJob
from crowdray.console.commands.tune import TuneJob
from crowdray.errors import UserError
from crowdray.presets import preset

REQUIRED = ["--preset", "debug", "--data", "d"]


def test_parse_with_config_reports_all_invalid_overrides_at_once() -> None:
    invalid = ["--loss.depth", "much", "--stages.joint.epochs=few", "--seed", "-3", "--optimizer.name", "adam"]
    with pytest.raises(ConfigError) as caught:
        parse_with_config(TrainJob, [*REQUIRED, *invalid, "--los.count", "1"], "train")
    message = "\n".join(caught.value.problems)
    for part in ("loss.depth", "'much'", "stages.joint.epochs", "'few'", "seed is -3", "'adam'", "use --loss.count"):
        assert part in message
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(
    ("job", "arguments", "option"),
    [
        (TuneJob, [*REQUIRED, "--trials", "2", "--vary", "a=[1]", "--vary=b=[2]"], "--vary"),
        (TrainJob, [*REQUIRED, "--preset", "demo"], "--preset"),
        (TrainJob, [*REQUIRED, "--loss.depth_", "1", "--loss.depth-=2"], "--loss.depth-"),
    ],
)
def test_parse_with_config_with_a_repeated_option_raises(job: type, arguments: list[str], option: str) -> None:
    with pytest.raises(UserError, match=rf"^{option} is given twice; give it once, followed by all its values"):
        parse_with_config(job, arguments, "job")


def test_parse_with_a_repeated_option_raises() -> None:
    with pytest.raises(UserError, match=r"^--split is given twice"):
        parse(ConvertJob, ["csv", "--split", "train", "--split", "test"], "convert")


def test_parse_with_config_overrides_the_preset() -> None:
    overrides = ["--sampling.roi", "False", "--optimizer.weight-decay=0"]
    base = preset("debug")
    assert parse_with_config(TrainJob, [*REQUIRED, *overrides], "train").config == replace(
        base,
        sampling=replace(base.sampling, roi=False),
        optimizer=replace(base.optimizer, weight_decay=0.0),
    )


def test_init_replaces_pretrained_weights_and_the_counter_of_a_recorded_configuration() -> None:
    arguments = ["--preset", "adapt", "--data", "d", "--model.init-sha256", "0" * 64]
    assert parse_with_config(TrainJob, arguments, "train").resolved_config.model.weights == IMAGENET
    model = parse_with_config(TrainJob, [*arguments, "--init", "models:/a/1"], "train").resolved_config.model
    assert (model.init, model.init_sha256, model.weights) == ("models:/a/1", "", "")


def test_parse_with_config_accepts_overrides_that_are_valid_only_together() -> None:
    overrides = ["--stages.decoders.epochs", "0", "--stages.joint.epochs", "0"]
    stages = parse_with_config(TrainJob, [*REQUIRED, *overrides], "train").config.stages
    assert stages.decoders.epochs == stages.joint.epochs == 0


def test_overrides_that_are_valid_only_together_are_not_among_the_problems_of_others() -> None:
    arguments = ["--stages.baseline.epochs", "40", "--stages.baseline.anneal-epochs", "20", "--sampling.flip", "7"]
    with pytest.raises(ConfigError) as caught:
        parse_with_config(TrainJob, ["--preset", "lite0", "--data", "x", *arguments], "train")
    assert [problem.split()[0] for problem in caught.value.problems] == ["sampling.flip"]


def test_parse_with_config_accepts_previous_option_names() -> None:
    previous = ["--optimizer.accumulate", "2", "--loss.share=0.5", "--store", "stages", "--store_gib=3"]
    current = ["--optimizer.grad-accumulation-steps", "2", "--loss.gradient-share=0.5"]
    current += ["--stage-cache", "stages", "--stage-cache-gib=3"]
    parsed = [parse_with_config(TrainJob, [*REQUIRED, *options], "train") for options in (previous, current)]
    assert parsed[0] == parsed[1]
