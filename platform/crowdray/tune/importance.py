"""Which searched fields decide the validation error: fANOVA over the complete trials."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator

from crowdray.tune.record import StudyRecord, Value, is_weight

MIN_TRIALS = 4
"""Complete trials below which no importance is computed."""
RESAMPLES = 20
"""Resamples of the trials behind the ranges of importances."""


def importances(study: StudyRecord) -> dict[str, float]:
    """Fraction of the MAE's variance that each field explains, of all that single fields explain.

    fANOVA (Hutter et al., ICML 2014) over complete trials: a random forest learns the MAE, and its variance over the
    whole space, with each field uniform over its range, is decomposed by field.

    Returns:
        Fractions by field in descending order, with sum 1. Empty with fewer than MIN_TRIALS complete trials, and when
        their MAEs or all of their fields are equal.
    """
    trials = [trial for trial in study.trials if trial.state == "complete" and trial.is_scored]
    if len(trials) < MIN_TRIALS or len({trial.mae for trial in trials}) == 1:
        return {}
    axes = {name: _axis(name, [trial.values[name] for trial in trials]) for name in study.fields()}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = optuna.create_study()
    for number, trial in enumerate(trials):
        params = {name: values[number] for name, (values, _) in axes.items()}
        ranges = {name: distribution for name, (_, distribution) in axes.items()}
        search.add_trial(optuna.trial.create_trial(value=trial.mae, params=params, distributions=ranges))
    try:
        fractions = FanovaImportanceEvaluator(seed=0).evaluate(search)
    except RuntimeError:  # to the forest, all MAEs are equal
        return {}
    total = sum(fractions.values())
    if not total > 0:
        return {}
    ordered = sorted(fractions.items(), key=lambda item: (-item[1], item[0]))
    return {name: float(fraction / total) for name, fraction in ordered}


def importance_intervals(study: StudyRecord) -> dict[str, tuple[float, float]]:
    """Return the range of each field's importance over RESAMPLES resamples of the complete trials, from the 10th to the
    90th percentile: what a search with other trials could have found.

    Returns:
        Ranges by field; empty where `importances` is.
    """
    complete = [trial for trial in study.trials if trial.state == "complete" and trial.is_scored]
    if not importances(study):
        return {}
    samples: dict[str, list[float]] = {name: [] for name in study.fields()}
    random_trials = random.Random(0)
    for _ in range(RESAMPLES):
        drawn = replace(study, trials=tuple(random_trials.choices(complete, k=len(complete))))
        for name, fraction in importances(drawn).items():
            samples[name].append(fraction)
    return {name: _percentiles(sorted(found)) for name, found in samples.items() if found}


def _percentiles(ordered: Sequence[float]) -> tuple[float, float]:
    last = len(ordered) - 1
    return ordered[round(0.1 * last)], ordered[round(0.9 * last)]


def _axis(name: str, values: Sequence[Value]) -> tuple[list[Any], BaseDistribution]:
    """Coordinates of a field's values in all trials, and the distribution that spans them.

    Weights are seen by their logarithm; Optuna's fANOVA would take them as they are. A weight of 0, which drops its
    task, lies below the lowest one, in an interval as wide as that of all others together: by default a search drops
    a task in every second trial. Integers have intervals of equal width.
    """
    if any(isinstance(value, bool | str) for value in values):
        return list(values), CategoricalDistribution(sorted(set(values)))
    weight = is_weight(name, values)
    scale: Callable[[Any], float] = math.log10 if weight else float
    inside = [scale(value) for value in values if value or not weight] or [0.0]
    low, high = min(inside), max(inside)
    width = (high - low) or 1.0
    coordinates = [scale(value) if value or not weight else low - width for value in values]
    if len(set(coordinates)) == 1:
        return coordinates, FloatDistribution(coordinates[0], coordinates[0])
    if len(inside) < len(values):  # trees split half-way to it, at low - width / 2
        low -= 2 * width
    elif all(isinstance(value, int) for value in values):
        half = math.gcd(*(int(value - low) for value in inside)) / 2
        low, high = low - half, high + half
    return coordinates, FloatDistribution(low, high)
