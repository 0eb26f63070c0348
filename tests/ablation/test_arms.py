"""Arms of an ablation by name and by sweep."""

import pytest

from crowdray.ablation.arms import default_arms, parse_arms
from crowdray.config import LossConfig
from crowdray.errors import UserError

LOSS = LossConfig(segmentation=0.04, depth=0.6, count=1.0)


def test_default_arms_are_rows_of_paper_with_placebo() -> None:
    pairs = ["depth+segmentation", "depth+count", "segmentation+count"]
    assert default_arms(LOSS) == ["none", "depth", "segmentation", "count", *pairs, "all", "placebo"]


def test_default_arms_without_depth_leave_it_out() -> None:
    assert default_arms(LossConfig(depth=0)) == ["none", "segmentation", "count", "all", "placebo"]


def test_parse_arms_takes_weights_of_configuration() -> None:
    none, both, everything, placebo = parse_arms(["none", "count+depth", "all", "placebo"], [], LOSS)
    assert none.weights == {"depth": 0, "segmentation": 0, "count": 0}
    assert both.name == "depth+count" and both.weights == {"depth": 0.6, "segmentation": 0, "count": 1.0}
    assert everything.weights == placebo.weights == {"depth": 0.6, "segmentation": 0.04, "count": 1.0}
    assert [arm.placebo for arm in (none, both, everything, placebo)] == [False, False, False, True]


def test_parse_arms_of_sweep_varies_one_weight_and_shares_zero_with_none() -> None:
    arms = parse_arms(["none"], ["loss.depth=0,0.1,2", "count=1e1"], LOSS)
    assert [arm.name for arm in arms] == ["none", "depth=0.1", "depth=2", "count=10"]
    assert [arm.weights["depth"] for arm in arms] == [0, 0.1, 2, 0]


@pytest.mark.parametrize("name", ["", "both", "depth+", "none+depth"])
def test_parse_arms_unknown_name_is_user_error(name: str) -> None:
    with pytest.raises(UserError, match="--arms has"):
        parse_arms([name], [], LOSS)


@pytest.mark.parametrize("sweep", ["loss.share=1", "depth", "depth=a", "depth=-1", "depth=nan", "depth=1,", "=1"])
def test_parse_arms_wrong_sweep_is_user_error(sweep: str) -> None:
    with pytest.raises(UserError, match="--sweep"):
        parse_arms([], [sweep], LOSS)


@pytest.mark.parametrize("name", ["depth", "depth+count"])
def test_parse_arms_task_without_weight_is_user_error(name: str) -> None:
    with pytest.raises(UserError, match=r"loss.depth is 0"):
        parse_arms([name], [], LossConfig(depth=0))
    assert parse_arms(["all"], [], LossConfig(depth=0))[0].weights["depth"] == 0
