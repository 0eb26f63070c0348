"""A search over configurations as plain data: what each trial gave, what it cost, and what its beginnings
had in common with others'."""

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from pydantic import TypeAdapter

from crowdray.errors import DataError

Value = float | int | str | bool
State = Literal["complete", "pruned", "failed", "running"]
FEWEST = 4
"""Complete trials below which no importance is computed."""


@dataclass(frozen=True)
class StageCost:
    """One stage of one trial."""

    chain: str
    """Key of the chain of states that it passes through: this stage after one fixed beginning."""
    stage: str
    """baseline, decoders or joint."""
    epochs: int
    """Epochs of the stage in this trial, reused ones included."""
    reused: int
    """The first of these: found in the store, trained by somebody before."""
    seconds: float
    """Worker-seconds that this trial spent here."""
    saved: float
    """Worker-seconds that the reused epochs had cost."""

    def __post_init__(self) -> None:
        if not 0 <= self.reused <= self.epochs:
            raise ValueError(f"{self.stage}: {self.reused} reused epochs of {self.epochs}; give 0 to {self.epochs}")
        if not (0 <= self.seconds < math.inf and 0 <= self.saved < math.inf):
            raise ValueError(f"{self.stage}: {self.seconds} s spent, {self.saved} s saved; give numbers from 0 on")

    def costs(self) -> Iterator[tuple[bool, float]]:
        """Of each epoch in order: whether this trial trained it, and its worker-seconds."""
        for epoch in range(self.epochs):
            trained = epoch >= self.reused
            yield trained, self.seconds / (self.epochs - self.reused) if trained else self.saved / self.reused


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a search."""

    number: int
    """Its place in the search, from 0."""
    state: State
    """How it ended, if it has."""
    values: Mapping[str, Value]
    """What the search chose, by dotted field name."""
    mae: float | None
    """Best validation MAE of the joint stage so far, in heads; None before its first validation."""
    rmse: float | None
    """The same for the RMSE."""
    curve: Mapping[int, float]
    """Best validation MAE up to an epoch, by epoch of the joint stage."""
    legs: tuple[StageCost, ...]
    """Its stages in order, as far as it came."""
    reason: str = ""
    """Why it failed."""
    ended: float | None = None
    """When it ended, in seconds since 1970."""

    @property
    def spent(self) -> float:
        """Worker-seconds that it took."""
        return math.fsum(leg.seconds for leg in self.legs)

    @property
    def saved(self) -> float:
        """Worker-seconds that it would have taken on top without the store."""
        return math.fsum(leg.saved for leg in self.legs)

    @property
    def scored(self) -> bool:
        """Whether it has a finite MAE."""
        return self.mae is not None and math.isfinite(self.mae)


@dataclass(frozen=True)
class StudyRecord:
    """A search, finished or running; as JSON it lies beside what it found."""

    name: str
    """Name of the search."""
    trials: tuple[TrialRecord, ...]
    """Its trials by number."""

    def best(self) -> TrialRecord | None:
        """The complete trial of the lowest validation MAE, the first of equals; None before there is one."""
        complete = [trial for trial in self.trials if trial.state == "complete" and trial.scored]
        return min(complete, key=lambda trial: (trial.mae, trial.number), default=None)

    def by_end(self) -> list[TrialRecord]:
        """The trials in the order in which they ended, those under way last: what they spent adds up over time."""
        return sorted(self.trials, key=lambda trial: (math.inf if trial.ended is None else trial.ended, trial.number))

    def fields(self) -> list[str]:
        """Dotted names of the searched fields, in the order of their first appearance."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.values))

    @property
    def spent(self) -> float:
        """Worker-seconds of all trials."""
        return math.fsum(trial.spent for trial in self.trials)

    @property
    def saved(self) -> float:
        """Worker-seconds that all trials would have taken on top without the store."""
        return math.fsum(trial.saved for trial in self.trials)

    @property
    def needed(self) -> float:
        """Worker-seconds of training every distinct (chain, epoch) once.

        An epoch costs the mean of what it cost those who trained it; one that only earlier searches trained,
        the mean of what it saved.
        """
        trained: dict[tuple[str, int], list[float]] = defaultdict(list)
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        for leg in (leg for trial in self.trials for leg in trial.legs):
            for epoch, (own, cost) in enumerate(leg.costs(), start=1):
                (trained if own else found)[leg.chain, epoch].append(cost)
        return math.fsum(math.fsum(costs) / len(costs) for costs in (found | trained).values())

    @property
    def factor(self) -> float:
        """Worker-seconds without the store over those spent, (spent + saved) / spent; 1 before any were."""
        return _ratio(self.spent + self.saved, self.spent)

    @property
    def bound(self) -> float:
        """The factor of a store that trains nothing twice, (spent + saved) / needed; 1 before any were spent.

        `factor` passes it only with the help of states that were stored before the search.
        """
        return _ratio(self.spent + self.saved, self.needed)

    def to_json(self) -> str:
        """The search as JSON text."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, place: str) -> Self:
        """Parse what to_json gave; raises DataError naming `place` when it cannot be."""
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValueError as error:
            raise DataError(f"{place} is no record of a search ({error}); search again under a new --name") from error


def importances(study: StudyRecord) -> dict[str, float]:
    """Share of each searched field in what single fields explain of the MAE's variance, falling, with sum 1.

    fANOVA (Hutter et al., ICML 2014) over complete trials: a random forest learns the MAE, and its variance over
    the whole space, each field evenly over its range, is split among the fields. Empty with fewer than FEWEST
    complete trials, and when their MAEs or all of their fields are equal.
    """
    trials = [trial for trial in study.trials if trial.state == "complete" and trial.scored]
    if len(trials) < FEWEST or len({trial.mae for trial in trials}) == 1:
        return {}
    axes = {name: _axis(name, [trial.values.get(name) for trial in trials]) for name in study.fields()}
    with _quiet():
        search = optuna.create_study()
    for number, trial in enumerate(trials):
        places = {name: of[number] for name, (of, _) in axes.items()}
        ranges = {name: distribution for name, (_, distribution) in axes.items()}
        search.add_trial(optuna.trial.create_trial(value=trial.mae, params=places, distributions=ranges))
    try:
        shares = FanovaImportanceEvaluator(seed=0).evaluate(search)
    except RuntimeError:  # to the forest, all MAEs are equal
        return {}
    total = sum(shares.values())
    if not total > 0:
        return {}
    return {name: float(share / total) for name, share in sorted(shares.items(), key=lambda item: (-item[1], item[0]))}


def is_weight(name: str, values: Sequence[Value]) -> bool:
    """Whether a field is a number to be seen by its logarithm, 0 apart: a weight or another positive real."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    real = name.startswith("loss.") or any(isinstance(value, float) for value in values)
    return numbers and real and all(value >= 0 for value in values if not isinstance(value, str))


def _axis(name: str, values: Sequence[Value | None]) -> tuple[list[Any], BaseDistribution]:
    """A field's values in all trials as places on one axis, and the axis.

    Weights are seen by their logarithm; Optuna's fANOVA would take them as they are. A weight of 0, a dropped task,
    and a field that a trial has not lie before the lowest value, with as much room as all values together: by
    default a search drops a task in every second trial. Whole numbers have equal room each.
    """
    held = [value for value in values if value is not None]
    if any(isinstance(value, bool | str) for value in held):
        return list(values), CategoricalDistribution(sorted(set(values), key=lambda v: (type(v).__name__, v)))
    weight = is_weight(name, held)
    scale: Callable[[Any], float] = math.log10 if weight else float
    outside = (None, 0) if weight else (None,)
    inside = [scale(value) for value in held if value not in outside] or [0.0]
    low, high = min(inside), max(inside)
    room = (high - low) or 1.0
    places = [low - room if value in outside else scale(value) for value in values]
    if len(set(places)) == 1:
        return places, FloatDistribution(places[0], places[0])
    if any(value in outside for value in values):  # trees split half-way to it, at low - room / 2
        low -= 2 * room
    elif all(isinstance(value, int) for value in held):
        half = math.gcd(*(int(place - low) for place in inside)) / 2
        low, high = low - half, high + half
    return places, FloatDistribution(low, high)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna without its log lines."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _ratio(whole: float, part: float) -> float:
    return whole / part if part > 0 else math.inf if whole > 0 else 1.0
