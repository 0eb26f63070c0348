"""Figures of an ablation: what they plot, and what they do without data."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from crowdray.evaluation.comparison import compare_errors
from crowdray.evaluation.intervals import Interval
from crowdray.evaluation.metrics import ImageCount
from crowdray.plots.ablation import ArmGain, SweepPoint, draw_gains, draw_groups, draw_sweeps, group_counts

URI = "memory://figures/ablation.png"


def test_gains_show_each_arm_and_the_paper_where_it_has_one(drawn: list[Figure]) -> None:
    gain = compare_errors([[2.0, 4.0], [3.0, 4.0]], [[1.0, 3.0], [1.0, 2.0]])
    arms = [ArmGain("depth", 1.7, gain, 0.35), ArmGain("all", 1.6, gain)]
    draw_gains(arms, URI, reference_mae=3.2, placebo=gain, title="mall")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["depth", "all"]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert lines["paper"].get_xydata().tolist() == [[0.35, 0.0]]  # type: ignore[union-attr]
    assert list(np.asarray(lines["gain, 95%"].get_xdata())) == [gain.gain]
    assert list(np.asarray(lines["a seed"].get_xdata())) == [*gain.seed_gains]
    draw_gains([], URI, reference_mae=3.2)


def test_sweeps_share_weights_with_the_paper_and_put_zero_at_the_left(drawn: list[Figure]) -> None:
    points = [SweepPoint(1.0, 2.0, Interval(1.5, 2.5)), SweepPoint(0.0, 2.2, None), SweepPoint(0.1, 2.1, None)]
    draw_sweeps({"depth": points}, {"depth": {0: 12.9, 0.1: 12.0, 10: 18.6}}, URI)
    above, below = drawn[0].axes
    assert above.get_xlim() == below.get_xlim()
    assert [text.get_text() for text in above.get_xticklabels()] == ["0", "0.1", "1", "10"]
    weights = above.lines[1].get_xydata()
    assert np.asarray(weights).tolist() == [[pytest.approx(-5 / 3), 2.2], [-1.0, 2.1], [0.0, 2.0]]
    assert [text.get_text() for text in below.texts] == ["18.6 ↑"]
    draw_sweeps({}, {}, URI)


def test_groups_contain_each_image_once_by_true_count(drawn: list[Figure]) -> None:
    generator = np.random.default_rng(2)
    truth = generator.integers(0, 60, 47)
    models = [
        [[ImageCount(row, int(truth[row]), truth[row] + bias + seed, 0.0) for row in generator.permutation(47)]
         for seed in (0, 1)]
        for bias in (2.0, -1.0)
    ]  # fmt: skip
    groups = group_counts(models, block=5)
    ordered = np.array_split(np.sort(truth), 10)
    assert [group.truth for group in groups] == [(part.min(), part.max()) for part in ordered]
    for group, part in zip(groups, ordered, strict=True):
        assert group.predicted == pytest.approx((part.mean() + 2.5, part.mean() - 0.5))
        assert group.intervals[0].low <= group.predicted[0] <= group.intervals[0].high
    draw_groups(groups, ("none", "all"), URI)
    assert len(drawn[0].axes[0].patches) == 10
    assert len(group_counts([[models[0][0][:3]]])) == 3
