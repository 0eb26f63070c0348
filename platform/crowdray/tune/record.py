"""A search as plain data: the result and cost of each trial, and what the stage cache saved."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from crowdray.pipeline.outcome import Outcome

Value = float | int | str | bool
State = Literal["complete", "pruned", "failed", "running"]


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage of one trial."""

    key: Annotated[str, Field(validation_alias=AliasChoices("key", "chain"))]  # previous name
    """Stage key: identifies this stage after one fixed prefix."""
    stage: str
    """baseline, decoders or joint."""
    epochs: int
    """Epochs of the stage in this trial, reused ones included."""
    reused: int
    """How many of them were loaded from the stage cache; always the first ones."""
    seconds: float
    """Worker-seconds that this trial spent in the stage."""
    saved: float
    """Worker-seconds that the reused epochs had cost."""

    def __post_init__(self) -> None:
        if not 0 <= self.reused <= self.epochs:
            raise ValueError(f"{self.stage}: {self.reused} reused epochs of {self.epochs}; give 0 to {self.epochs}")
        if not (0 <= self.seconds < math.inf and 0 <= self.saved < math.inf):
            raise ValueError(f"{self.stage}: {self.seconds} s spent, {self.saved} s saved; give numbers from 0 on")


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a search."""

    number: int
    """Its number in the study, from 0."""
    state: State
    """Its current or final state."""
    values: Mapping[str, Value]
    """Sampled values by dotted field name."""
    mae: float | None
    """Best validation MAE of the joint stage so far, in heads; None before its first validation."""
    rmse: float | None
    """The same for the RMSE."""
    curve: Mapping[int, float]
    """Best validation MAE so far, by epoch of the joint stage."""
    stage_costs: Annotated[
        tuple[StageCost, ...],
        Field(validation_alias=AliasChoices("stage_costs", "legs")),  # previous name
    ]
    """Its stages in order, as far as it got."""
    reason: str = ""
    """Why it failed."""
    ended: float | None = None
    """When it ended, in seconds since 1970."""

    @property
    def spent(self) -> float:
        """Worker-seconds that it took."""
        return math.fsum(cost.seconds for cost in self.stage_costs)

    @property
    def saved(self) -> float:
        """Worker-seconds that it would have taken in addition without the stage cache."""
        return math.fsum(cost.saved for cost in self.stage_costs)

    @property
    def is_scored(self) -> bool:
        """Whether it has a finite MAE."""
        return self.mae is not None and math.isfinite(self.mae)


@dataclass(frozen=True)
class StudyRecord:
    """A search, finished or running; record.json in the study's folder."""

    name: str
    """Name of the study."""
    trials: tuple[TrialRecord, ...]
    """Its trials by number."""

    def best(self) -> TrialRecord | None:
        """The complete trial with the lowest validation MAE, the first of equals; None before there is one."""
        complete = [trial for trial in self.trials if trial.state == "complete" and trial.is_scored]
        return min(complete, key=lambda trial: (trial.mae, trial.number), default=None)

    def by_end(self) -> list[TrialRecord]:
        """The trials in the order in which they ended, running ones last."""
        return sorted(self.trials, key=lambda trial: (math.inf if trial.ended is None else trial.ended, trial.number))

    def fields(self) -> list[str]:
        """Dotted names of the searched fields."""
        return list(self.trials[0].values) if self.trials else []

    @property
    def spent(self) -> float:
        """Worker-seconds of all trials."""
        return math.fsum(trial.spent for trial in self.trials)

    @property
    def saved(self) -> float:
        """Worker-seconds that all trials would have taken in addition without the stage cache."""
        return math.fsum(trial.saved for trial in self.trials)

    @property
    def speedup(self) -> float:
        """Worker-seconds without the stage cache over those spent, (spent + saved) / spent; 1 before any were."""
        whole = self.spent + self.saved
        return whole / self.spent if self.spent > 0 else math.inf if whole > 0 else 1.0

    def to_json(self) -> str:
        """The search as JSON text."""
        return json.dumps(asdict(self)) + "\n"


@dataclass(frozen=True)
class StudyOutcome:
    """Result of a study, and where everything is stored."""

    study: str
    """The study's folder."""
    record: StudyRecord
    """All trials."""
    best: int
    """Number of the best trial."""
    outcome: Outcome
    """The best trial, published."""
    figures: tuple[str, ...]
    """Paths of the figures of the search."""
    run_url: str | None = None
    """Web page of the study's MLflow run; None without tracking."""


def is_weight(name: str, values: Sequence[Value]) -> bool:
    """Whether a field needs a log scale with 0 apart: a loss weight or another positive real number."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    real = name.startswith("loss.") or any(isinstance(value, float) for value in values)
    return numbers and real and all(value >= 0 for value in values if not isinstance(value, str))
