"""A search over configurations as plain data: what each trial gave, what it cost, and what its beginnings
had in common with others'."""

import contextlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Self

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from pydantic import TypeAdapter

from crowdray.errors import DataError

Value = float | int | str | bool
State = Literal["complete", "pruned", "failed", "running"]
FEWEST = 4
"""Complete trials below which no importance is computed."""


@dataclass(frozen=True)
class Leg:
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
    legs: tuple[Leg, ...]
    """Its stages in order, as far as it came."""
    reason: str = ""
    """Why it failed."""

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
    """Share of each searched field in reaching the lowest MAEs, falling, with sum 1.

    PED-ANOVA (Watanabe et al., IJCAI 2023) over complete trials, after their best tenth, or best five where
    that is more, but never more than half. A weight that may be 0 counts by its value where it is kept and
    by whether it is: the two variances add up. Empty with fewer than FEWEST complete trials, and when their
    MAEs or all of their fields are equal.
    """
    trials = [trial for trial in study.trials if trial.state == "complete" and trial.scored]
    if len(trials) < FEWEST or len({trial.mae for trial in trials}) == 1:
        return {}
    space = {name: _distributions(name, trials) for name in study.fields()}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / len(trials))))
    with _quiet():
        search = optuna.create_study()
        for trial in trials:
            search.add_trial(_frozen(trial, space))
        parts = evaluator.evaluate(search)
    shares = {name: sum(parts.get(part, 0.0) for part in of) for name, of in space.items()}
    total = sum(shares.values())
    if not total > 0:
        return {}
    return {name: share / total for name, share in sorted(shares.items(), key=lambda item: (-item[1], item[0]))}


def is_weight(name: str, values: Sequence[Value]) -> bool:
    """Whether a field is a number to be seen by its logarithm, 0 apart: a weight or another positive real."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    real = name.startswith("loss.") or any(isinstance(value, float) for value in values)
    return numbers and real and all(value >= 0 for value in values if not isinstance(value, str))


def _distributions(name: str, trials: Sequence[TrialRecord]) -> dict[str, BaseDistribution]:
    """Parts of a field, as wide as its values; of a weight, its positive values and whether it is dropped."""
    values = [trial.values[name] for trial in trials if name in trial.values]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not values or len(numbers) < len(values):
        choices = sorted(set(values), key=lambda value: (type(value).__name__, value))
        return {name: CategoricalDistribution(choices)} if choices else {}
    if is_weight(name, values):
        kept = [float(number) for number in numbers if number > 0]
        if not kept:
            return {}
        weight: dict[str, BaseDistribution] = {name: FloatDistribution(min(kept), max(kept), log=True)}
        return weight if len(kept) == len(values) else weight | {f"{name}=0": CategoricalDistribution([False, True])}
    low, high = min(numbers), max(numbers)
    if any(isinstance(number, float) for number in numbers):
        return {name: FloatDistribution(low, high)}
    return {name: IntDistribution(int(low), int(high), step=math.gcd(*(int(n - low) for n in numbers)) or 1)}


def _frozen(trial: TrialRecord, space: Mapping[str, Mapping[str, BaseDistribution]]) -> optuna.trial.FrozenTrial:
    """A complete trial for Optuna, which holds those parts of its fields that apply."""
    params: dict[str, Value] = {}
    for name, value in trial.values.items():
        params |= {part: value == 0 for part in space[name] if part != name}
        if name in space[name] and (len(space[name]) == 1 or value != 0):
            params[name] = value
    flat = {part: distribution for parts in space.values() for part, distribution in parts.items()}
    return optuna.trial.create_trial(
        value=trial.mae, params=params, distributions={part: flat[part] for part in params}
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna without its log lines and its warnings of few trials."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _ratio(whole: float, part: float) -> float:
    return whole / part if part > 0 else math.inf if whole > 0 else 1.0
