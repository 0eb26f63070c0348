"""What the statistics of an ablation allow to say, in sentences."""

from collections.abc import Iterator

from crowdray.ablation.arms import ALL, PLACEBO
from crowdray.ablation.record import AblationRecord
from crowdray.ablation.summary import ArmSummary
from crowdray.evaluation.comparison import EFFECT, POWER, Comparison


def verdicts(record: AblationRecord) -> Iterator[str]:
    """Yield a sentence for each arm but those of sweeps, then what the placebo says, for each group of cells."""
    groups: dict[tuple[float, str], list[ArmSummary]] = {}
    for arm in record.arms:
        groups.setdefault((arm.fraction, arm.backbone), []).append(arm)
    for (fraction, backbone), arms in groups.items():
        prefix = f"{fraction:.0%} of the labels, {backbone}: " if len(groups) > 1 else ""
        by_name = {arm.arm: arm for arm in arms if "=" not in arm.arm}
        yield from (
            f"{prefix}{name}: {_gain(arm.gain)}." for name, arm in by_name.items() if arm.gain and name != PLACEBO
        )
        yield from (f"{prefix}{sentence}" for sentence in _placebo(by_name.get(PLACEBO), by_name.get(ALL)))


def _placebo(placebo: ArmSummary | None, everything: ArmSummary | None) -> Iterator[str]:
    if placebo and placebo.gain:
        yield f"placebo: {_gain(placebo.gain)}."
    if everything and (over := everything.gain_over_placebo):
        if over.interval.low > 0:
            meaning = "the tasks help by what they know of the image"
        elif over.interval.high < 0:
            meaning = "true targets are worse than those of other images"
        else:
            meaning = "it is not shown that the tasks help by more than regularization"
        yield f"all against the placebo: {_gain(over)}; {meaning}."


def _gain(comparison: Comparison) -> str:
    """Describe a gain: what it is, how sure, and how many seeds would show half a head where it is not shown."""
    low, high, seeds = comparison.interval.low, comparison.interval.high, len(comparison.seed_gains)
    shown = low > 0 or high < 0
    direction = "fewer" if comparison.gain >= 0 else "more"
    size, ends = f"{abs(comparison.gain):.2f}", (low, high) if comparison.gain >= 0 else (-high, -low)
    text = f"{size} {direction} heads of error, 95% {ends[0]:.2f} to {ends[1]:.2f}, "
    if seeds == 1:
        return f"{text}one seed: other seeds may differ by more than that"
    text = f"{text}{seeds} seeds, p = {comparison.p_value:.2g}"
    if shown:
        return text
    return (
        f"no difference shown ({text}; {comparison.required_seeds} seeds show {EFFECT:g} heads in {POWER:.0%} of cases)"
    )
