"""A Ray Tune searcher over Optuna: shared prefixes are trained first, unpromising trials are stopped."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from crowdray import storage
from crowdray.cluster.runtime import MAX_RETRIES
from crowdray.config import Config
from crowdray.errors import RESUME_HINT, UserError
from crowdray.stage_cache.keys import StageKey, stage_keys
from crowdray.stage_cache.store import StageStore
from crowdray.tune.optuna_study import open_optuna_study, sampled_trials
from crowdray.tune.record import State
from crowdray.tune.report import REPORT, SPEC, TrialReport, TrialSpec
from crowdray.tune.space import first_points
from crowdray.tune.study import Study
from crowdray.tune.trial_tracker import RECORD, TrialTracker

STARTUP_TRIALS = 10
"""Trials that TPE samples at random before it uses results."""
REDUCTION_FACTOR = 3
"""One of this many trials continues after each rung of successive halving."""
FIRST_RUNG = 1 / 8
"""First rung, as a fraction of the shortest joint stage; each following rung is REDUCTION_FACTOR times as long."""
REFERENCE = "reference"
"""User attribute of the trials that others are compared with: they are never stopped."""

OUTAGE_S = 300.0
"""Seconds for which the stage cache may be unreachable."""

_NO_MORE = cast(dict[str, Any], Searcher.FINISHED)
"""Signals the end of the search to Tune."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A sampled trial, waiting to be scheduled or running."""

    trial: optuna.Trial
    values: Mapping[str, Any]
    """Sampled values by dotted field name."""
    config: Config
    keys: tuple[StageKey, ...]
    """The keys of its stages."""

    @property
    def number(self) -> int:
        """Its number in the study."""
        return self.trial.number

    def untrained(self, store: StageStore, stored: Mapping[str, Sequence[int]]) -> tuple[StageKey, ...]:
        """The keys of the stages that it would have to train, in order."""
        found = store.find(self.keys, stored)
        if found is None:
            return self.keys
        key, epoch = found
        return self.keys[self.keys.index(key) + (epoch >= key.epochs) :]


class StageTreeSearch(Searcher):
    """Optuna as a Ray Tune searcher.

    A sampled trial waits, without workers, while a running trial trains a stage that it needs as well. Of the trials
    that can start, the one whose next stage most others wait for goes first, the longest before shorter ones, which
    then find their states in the stage cache. Optuna's record is the only state: a trial that was running when its
    driver died is resumed under its number. Unpromising trials are pruned on the best validation MAE at equal epochs
    of the joint stage.
    """

    def __init__(
        self,
        study: Study,
        tracker: TrialTracker,
        opened: BaseStorage,
        *,
        max_concurrent: int,
        num_trials: int,
        store: StageStore,
        numerics: Mapping[str, str | int],
        lock_is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        """Enqueue the points that every study starts with.

        Args:
            study: What to search.
            tracker: Records of the trials.
            opened: Optuna's storage of the study.
            max_concurrent: Trials that run at once.
            num_trials: Trials in total, including those of earlier starts.
            store: The stage cache.
            numerics: What `numerics_facts` returns in a trial's process.
            lock_is_lost: Whether another driver may have taken over the study.
        """
        super().__init__()
        self._study, self._tracker, self._store, self._numerics = study, tracker, store, numerics
        self._max_concurrent, self._num_trials = max_concurrent, num_trials
        self._lock_is_lost = lock_is_lost
        self._waiting: dict[int, Candidate] = {}
        self._running: dict[str, Candidate] = {}
        self._training: dict[str, dict[str, str]] = {}
        """Stage keys that each running trial has still to finish, by stage."""
        self._losses: dict[str, str] = {}
        self._unstarted: Counter[int] = Counter()
        self._unreachable_since: float | None = None
        self.stop_reason: str | None = None
        """Why the search stops early; None while it runs."""
        # Trials that depend on no result can be sampled, and ordered, all at once.
        self._independent = STARTUP_TRIALS if study.options.sampler == "tpe" else num_trials
        self._storage, self._trials = opened, open_optuna_study(study, opened)
        self._trials.sampler = _sampler(study, len(sampled_trials(self._trials)))
        shortest = min(study.space.stage_lengths("joint"), default=study.config.stages.joint.epochs)
        first_rung = max(1, int(shortest * FIRST_RUNG))
        self._trials.pruner = SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=REDUCTION_FACTOR)
        for point in first_points(study.space, study.config):
            self._trials.enqueue_trial(point, user_attrs={REFERENCE: True}, skip_if_exists=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray stores copies of the search next to its results, but Optuna's record counts."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Write nothing, for the same reason."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing, for the same reason."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next trial to start; None while all have to wait, FINISHED after the last one."""
        if self._lock_is_lost():
            self.stop_reason = (
                "this driver was suspended for so long that another one may have taken over the study; " + RESUME_HINT
            )
        suggested = None
        with self._stopping_on_errors(), self._tolerating_outages():
            if self.stop_reason is None and len(self._running) < self._max_concurrent:
                suggested = self._suggest(trial_id)
        return suggested if self.stop_reason is None else _NO_MORE

    def _suggest(self, trial_id: str) -> dict[str, Any] | None:
        self._adopt()
        while self._remaining() and len(sampled_trials(self._trials)) < self._independent:
            self._add(self._trials.ask())
        chosen = self._choose()
        if chosen is None and len(self._waiting) < self._max_concurrent and self._remaining():
            self._add(self._trials.ask())
            chosen = self._choose()
        if chosen is None:
            return None if self._waiting or self._running or self._remaining() else _NO_MORE
        self._protect_best()
        candidate, untrained = chosen
        del self._waiting[candidate.number]
        self._running[trial_id] = candidate
        self._training[trial_id] = {key.stage: key.key for key in untrained}
        self._tracker.on_start(candidate.number, candidate.values, candidate.config)
        return {SPEC: TrialSpec(candidate.number, candidate.config, candidate.keys)}

    def on_report(self, trial_id: str, report: TrialReport) -> bool:
        """Record a trial's report; returns whether the trial has to stop."""
        prune = False
        with self._stopping_on_errors():
            if report.status == "user_error":
                raise UserError(report.message)
            first = self._tracker.record.best() is None and self.stop_reason is None
            if (
                report.status == "infeasible" and first and _is_reference(self._running[trial_id])
            ):  # others would be too
                self.stop_reason = f"{report.message}. No trial has finished yet, and the search starts from this one"
            if self.stop_reason is None and report.status in ("running", "finished"):
                candidate = self._running[trial_id]
                candidate.trial.set_user_attr(RECORD, self._tracker.on_report(candidate.number, report))
                if report.rows:
                    self._finish_stages(trial_id, before=str(report.rows[-1]["stage"]))
                prune = self._study.prunes and self._should_prune(candidate, report)
        return prune or self.stop_reason is not None  # all trials stop, and resume at the next start

    @contextmanager
    def _stopping_on_errors(self) -> Iterator[None]:
        """Turn errors into a stop: Tune would repeat a trial whose end was not recorded, or show a traceback."""
        try:
            yield
        except UserError as error:
            self.stop_reason = str(error) if RESUME_HINT in str(error) else f"{error}; then {RESUME_HINT}"
        except (OSError, StorageInternalError) as error:
            location = "--database" if self._study.options.database else self._study.uri  # a URL may contain a password
            self.stop_reason = (
                f"the record of the trials in {location} cannot be written ({error}); free space there, or restart "
                f"the database, then {RESUME_HINT}"
            )

    @contextmanager
    def _tolerating_outages(self) -> Iterator[None]:
        """Ignore a temporary outage of the stage cache; Tune asks again soon."""
        try:
            yield
        except UserError as error:
            now = time.monotonic()
            self._unreachable_since = self._unreachable_since or now
            if not storage.is_transient(error) or now - self._unreachable_since > OUTAGE_S:
                raise
            _log.warning("%s; trying again", error)
        else:
            self._unreachable_since = None

    def _should_prune(self, candidate: Candidate, report: TrialReport) -> bool:
        """Report new epochs of the joint stage, also restored ones, and ask the pruner about each.

        References are reported for the comparison alone. A trial in its last epoch has nothing left to stop.
        """
        known = self._trials.get_trials(deepcopy=False)[candidate.number].intermediate_values
        prune = False
        for epoch, mae in report.curve.items():
            if epoch not in known and math.isfinite(mae):
                candidate.trial.report(mae, epoch)
                prune |= candidate.trial.should_prune() and epoch < candidate.keys[-1].epochs
        return prune and report.status == "running" and not _is_reference(candidate)

    def retry_unstarted(self, trial_id: str) -> bool:
        """Whether to retry a trial whose process died before it started; Tune only retries started ones."""
        number = self._running[trial_id].number
        self._unstarted[number] += 1
        if self._unstarted[number] > MAX_RETRIES:
            return False
        del self._running[trial_id], self._training[trial_id]  # it is still running in Optuna, and will be adopted
        return True

    def on_process_loss(self, trial_id: str, error: str) -> None:
        """Remember why a trial's process was lost; the last reason is reported."""
        self._losses[trial_id] = error

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: the scheduler has already called `on_report`."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record in Optuna how a trial ended: complete with its values, pruned, or failed."""
        if trial_id in self._running:
            with self._stopping_on_errors():
                self._complete(trial_id, (result or {}).get(REPORT), error)

    def _complete(self, trial_id: str, report: TrialReport | None, error: bool) -> None:
        candidate = self._running[trial_id]
        self._training.pop(trial_id, None)
        if self.stop_reason is None:
            state, reason = self._final_state(trial_id, report, error)
            candidate.trial.set_user_attr(RECORD, self._tracker.on_end(candidate.number, state, reason))
            if state == "complete":
                self._trials.tell(candidate.trial, [getattr(report, name) for name in self._study.objectives])
            else:
                self._trials.tell(candidate.trial, state=TrialState.PRUNED if state == "pruned" else TrialState.FAIL)
        del self._running[trial_id]  # after a stop, the next start resumes it

    def _final_state(self, trial_id: str, report: TrialReport | None, error: bool) -> tuple[State, str]:
        """How a trial ended, and why if it failed."""
        if error:
            return "failed", f"its process was lost repeatedly: {self._losses.get(trial_id, 'unknown reason')}"
        if report is None or report.status == "running":
            return "pruned", ""
        if report.status != "finished":
            return "failed", report.message
        if report.mae is None:
            return "failed", "its validation errors are not finite"
        return "complete", ""

    def _adopt(self) -> None:
        """Resume the trials that were running when an earlier driver died."""
        known = {candidate.number for candidate in [*self._waiting.values(), *self._running.values()]}
        for frozen in self._trials.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if frozen.number not in known:
                study_id = self._storage.get_study_id_from_name(self._trials.study_name)
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, frozen.number)
                self._add(optuna.Trial(self._trials, trial_id))

    def _add(self, trial: optuna.Trial) -> None:
        """Sample a trial's values, or read those that it has, and let it wait."""
        study = self._study
        values = study.space.suggest(trial)
        config = study.space.configure(study.config, values)
        keys = stage_keys(config, study.identity.data_digest, study.identity.max_workers, self._numerics)
        self._waiting[trial.number] = Candidate(trial, values, config, keys)

    def _remaining(self) -> int:
        return max(0, self._num_trials - len(sampled_trials(self._trials)))

    def _choose(self) -> tuple[Candidate, tuple[StageKey, ...]] | None:
        """The waiting trial to start and the stage keys that it will train; None if all have to wait."""
        stored = self._store.stored()
        untrained = {number: candidate.untrained(self._store, stored) for number, candidate in self._waiting.items()}
        demand = Counter(keys[0].key for keys in untrained.values() if keys)
        busy = {key for training in self._training.values() for key in training.values()}

        def priority(number: int) -> tuple[int, int, int]:
            first = untrained[number][:1]
            return (-demand[first[0].key] if first else 0, -first[0].epochs if first else 0, number)

        for number in sorted(self._waiting, key=priority):
            if busy.isdisjoint(key.key for key in untrained[number]):
                return self._waiting[number], untrained[number]
        return None

    def _finish_stages(self, trial_id: str, before: str) -> None:
        """Let other trials use the stages that a running trial has finished: all before the stage `before`."""
        stages = [key.stage for key in self._running[trial_id].keys]
        for stage in stages[: stages.index(before)]:
            self._training[trial_id].pop(stage, None)

    def _protect_best(self) -> None:
        """Mark the best trial's final state, which is published at the end, as used before others fill the cache."""
        best = self._tracker.record.best()
        if best is not None and best.stage_costs:
            last = best.stage_costs[-1]
            self._store.touch(StageKey(last.key, last.stage, last.epochs), last.epochs)


def _is_reference(candidate: Candidate) -> bool:
    return REFERENCE in candidate.trial.user_attrs


def _sampler(study: Study, sampled: int) -> BaseSampler:
    """The study's sampler, seeded by the trials so far: otherwise each start samples the same points."""
    seed = study.config.seed + sampled
    return (
        RandomSampler(seed)
        if study.options.sampler == "random"
        else TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    )


class StudyScheduler(FIFOScheduler):
    """Starts trials in the order of the search, and asks it whether to stop them."""

    def __init__(self, search: StageTreeSearch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._search = search

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing, as the search does."""
        return {}

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass on why a trial's process was lost."""
        if trial.status == Trial.PENDING and self._search.retry_unstarted(trial.trial_id):
            return
        error = trial.get_error()
        reason = str(error).strip().splitlines()[-1] if error else "unknown reason"
        self._search.on_process_loss(trial.trial_id, reason)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Pass on a report, and stop the trial if the search says so."""
        stop = self._search.on_report(trial.trial_id, result[REPORT])
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)
