"""Optuna's suggestions, started in the order in which their beginnings are shared, and stopped when they are poor."""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from crowdray import storage
from crowdray.cluster.train import RETRIES
from crowdray.config import Config, to_json
from crowdray.errors import UserError
from crowdray.stage_cache.keys import StageKey, stage_keys
from crowdray.stage_cache.store import StageStore, StateId
from crowdray.storage.lease import Keeper, Lease
from crowdray.tune.record import State
from crowdray.tune.space import first_points
from crowdray.tune.study import Study, drawn_trials
from crowdray.tune.trial_tracker import RECORD, TrialTracker

STARTUP = 10
"""Trials that TPE draws at random before it looks at results."""
REDUCTION = 3
"""Of so many trials at a rung one goes on."""
FIRST_RUNG = 1 / 8
"""Trials are first judged after this part of the shortest joint stage, again after REDUCTION times as long, ..."""
REFERENCE = "reference"
"""Mark of the trials that others are compared with: they are never stopped."""

PATIENCE_S = 300.0
"""Seconds for which a stage store may be out of reach."""

GOES_ON = ". The same command goes on with the trials that were under way"
"""What a message ends with after which nothing is lost."""

_log = logging.getLogger(__name__)

FINISHED = Searcher.FINISHED
"""What Tune takes for the end of a search."""


@dataclass(frozen=True)
class Candidate:
    """A trial that Optuna has drawn and nobody trains yet."""

    number: int
    values: Mapping[str, Any]
    config: Config
    chains: tuple[StageKey, ...]

    def missing(self, store: StageStore, stored: Mapping[str, Sequence[int]]) -> tuple[StageKey, ...]:
        """The chains that this trial would have to extend, the first one first."""
        found = store.find(self.chains, stored)
        if found is None:
            return self.chains
        place = [chain.key for chain in self.chains].index(found.chain)
        return self.chains[place + (found.epoch >= self.chains[place].epochs) :]


class StageTreeSearch(OptunaSearch):
    """Optuna's search over a study's space, for Ray Tune.

    A drawn trial waits, holding no worker, while somebody else trains a beginning that it needs. Of those that could
    start, the one whose beginning most others wait for goes first, the longest before shorter ones, which find their
    states on its way. Optuna's own record is the only memory: a trial that was under way when its driver died is taken
    up again, under its number. Poor trials are stopped on the best validation MAE at equal epochs of the joint stage,
    and told to Optuna as pruned.
    """

    def __init__(
        self,
        study: Study,
        book: TrialTracker,
        *,
        places: int,
        trials: int,
        store: StageStore,
        keeper: Keeper,
        numerics: Mapping[str, str | int],
        driver: Lease | None = None,
    ) -> None:
        self._study, self._book = study, book
        self._places, self._wanted = places, trials
        self._store, self._keeper, self._numerics, self._driver = store, keeper, numerics, driver
        self._prunes = study.prune and len(study.objectives) == 1
        shortest = min(study.space.quanta("joint"), default=study.config.stages.joint.epochs)
        first = max(1, int(shortest * FIRST_RUNG))
        self._pruner = SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)
        self._pool: dict[str, Candidate] = {}
        self._live: dict[str, Candidate] = {}
        self._leases: dict[str, dict[str, Lease]] = {}
        self._pinned: Lease | None = None
        self._errors: dict[str, str] = {}
        self._unbegun: Counter[int] = Counter()
        self._away: float | None = None
        self.mistake: str | None = None
        single = len(study.objectives) == 1
        self._record = study.optuna_study()
        # Trials that look at no result may be drawn, and ordered, all at once.
        self._blind = STARTUP if study.sampler == "tpe" else trials
        super().__init__(
            space=study.space.suggest,
            metric=study.objectives[0] if single else list(study.objectives),
            mode="min" if single else ["min"] * len(study.objectives),
            sampler=_sampler(study, len(drawn_trials(self._record))),
            study_name=study.name,
            storage=self._record._storage,
        )
        self._pin()
        for point in first_points(study.space, study.config):
            self._record.enqueue_trial(point, user_attrs={REFERENCE: True}, skip_if_exists=True)
        assert self._ot_study is not None
        self._asked: optuna.Study = self._ot_study  # the one with the sampler

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray writes copies of the search beside its results, and Optuna's record is what counts."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Write nothing, likewise."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial to start; None while all that are drawn have to wait, and the end when all are told."""
        if self._driver is not None and self._driver.ended:
            self.mistake = "this driver was suspended so long that another one may have taken the study; start it again"
        suggested = None
        with self._mistakes_noted(), self._patience():
            if self.mistake is None and len(self._live) < self._places:
                suggested = self._suggest(trial_id)
        return suggested if self.mistake is None else cast(None, FINISHED)

    def _suggest(self, trial_id: str) -> dict[str, Any] | None:
        self._adopt()
        self._draw(self._blind)
        chosen = self._choose()
        if chosen is None and len(self._pool) < self._places:
            self._draw(None)
            chosen = self._choose()
        if chosen is None:
            over = not (self._pool or self._live or self._left())
            return cast(None, FINISHED) if over else None
        candidate = self._live[trial_id] = self._pool.pop(chosen)
        self._ot_trials[trial_id] = self._ot_trials.pop(chosen)
        self._leases[trial_id] = self._leases.pop(chosen)
        self._book.started(candidate.number, candidate.values, candidate.config)
        return {
            "name": self._study.trial(candidate.number, candidate.config).name,
            "config": to_json(candidate.config),
            "chains": candidate.chains,
        }

    def heard(self, trial_id: str, report: Mapping[str, Any]) -> bool:
        """Take in a trial's report; says whether the trial is to stop here."""
        poor = False
        with self._mistakes_noted():
            if "mistake" in report:
                raise UserError(report["mistake"])
            if self.mistake is None and "settings" in report:
                self._judge_settings(trial_id, report["failed"])
            if self.mistake is None and "rows" in report:
                candidate, trial = self._live[trial_id], self._ot_trials[trial_id]
                trial.set_user_attr(RECORD, self._book.heard(candidate.number, report))
                if report["rows"]:
                    self._release(trial_id, before=str(report["rows"][-1]["stage"]))
                poor = self._prunes and self._is_poor(candidate, trial, report)
        return poor or self.mistake is not None  # after one all stop, and go on when the study is started again

    def _judge_settings(self, trial_id: str, reason: str) -> None:
        """End the search where what it starts from cannot be trained: neither could the others."""
        if self._book.record.best() is None and self._is_reference(self._live[trial_id].number):
            self.mistake = f"{reason}. No trial has ended yet, and this one is what the search starts from"

    @contextmanager
    def _mistakes_noted(self) -> Iterator[None]:
        """Tune would repeat a trial whose end could not be written down, or end with a traceback."""
        try:
            yield
        except UserError as error:
            self.mistake = f"{error}{GOES_ON}"
        except (OSError, StorageInternalError) as error:
            place = "--database" if self._study.database else self._study.uri  # a URL may hold a password
            mend = "free space there, or bring the database back"
            self.mistake = f"the trials' record in {place} cannot be kept ({error}); {mend}{GOES_ON}"

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """A store that is out of reach for a while is asked again, at Tune's next question."""
        try:
            yield
        except UserError as error:
            self._away = time.monotonic() if self._away is None else self._away
            if not storage.is_transient(error) or time.monotonic() - self._away > PATIENCE_S:
                raise
            _log.warning("%s; it will be asked again", error)
        else:
            self._away = None

    def _is_poor(self, candidate: Candidate, trial: optuna.Trial, report: Mapping[str, Any]) -> bool:
        """Report the errors of new joint epochs, those found in the store too, and let the pruner judge each.

        References are judged for the others' sake alone; a trial at its end has nothing left to stop.
        """
        poor = False
        for epoch, mae in report["curve"]:
            frozen = self._frozen(candidate.number)
            if epoch not in frozen.intermediate_values and math.isfinite(mae):
                trial.report(float(mae), epoch)
                judged = self._pruner.prune(self._record, self._frozen(candidate.number))
                poor = poor or (judged and epoch < candidate.chains[-1].epochs)
        return poor and not report.get("finished") and not self._is_reference(candidate.number)

    def _is_reference(self, number: int) -> bool:
        return REFERENCE in self._frozen(number).user_attrs

    def unbegun(self, trial_id: str) -> bool:
        """Whether a trial whose process died before it began is to be suggested again: Tune starts anew only what
        ran."""
        number = self._live[trial_id].number
        self._unbegun[number] += 1
        if self._unbegun[number] > RETRIES:
            return False
        self._release(trial_id)
        del self._live[trial_id]  # Optuna's record has it as running, so that it is adopted
        return True

    def lost(self, trial_id: str, error: str) -> None:
        """Remember why a trial's process was lost for the last time."""
        self._errors[trial_id] = error

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: `heard` was told before, by the scheduler."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended: complete with its values, pruned or failed without any."""
        if trial_id in self._live:
            with self._mistakes_noted():
                self._complete(trial_id, result or {}, error)

    def _complete(self, trial_id: str, result: dict[str, Any], error: bool) -> None:
        candidate = self._live[trial_id]
        self._release(trial_id)
        if self.mistake is not None:
            del self._live[trial_id]  # at the next start it is taken up again
            return
        state, reason = self._end_of(trial_id, result, error)
        record = self._book.ended(candidate.number, state, reason)
        self._ot_trials[trial_id].set_user_attr(RECORD, record)
        super().on_trial_complete(trial_id, result if state == "complete" else None, error=state == "failed")
        del self._live[trial_id]
        with self._patience():
            self._pin()

    def _end_of(self, trial_id: str, result: Mapping[str, Any], error: bool) -> tuple[State, str]:
        """How a trial ended, and why if it failed."""
        if error:
            return "failed", f"its process was lost again and again: {self._errors.get(trial_id, 'no reason is known')}"
        if "failed" in result:
            return "failed", str(result["failed"])
        if not result.get("finished"):
            return "pruned", ""
        if "mae" not in result:
            return "failed", "its validation errors are no finite numbers"
        return "complete", ""

    def _adopt(self) -> None:
        """Take up the trials that were under way when an earlier driver died."""
        known = {candidate.number for candidate in [*self._pool.values(), *self._live.values()]}
        for frozen in self._record.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if frozen.number not in known:
                self._take(optuna.trial.Trial(self._asked, frozen._trial_id))

    def _draw(self, until: int | None) -> None:
        """Ask Optuna for one trial, or for all of the first ones, which depend on no result."""
        while self._left() and (until is None or len(drawn_trials(self._record)) < until):
            self._take(self._asked.ask())
            if until is None:
                return

    def _left(self) -> int:
        return max(0, self._wanted - len(drawn_trials(self._record)))

    def _take(self, trial: optuna.Trial) -> None:
        key = f"waiting-{trial.number}"
        self._ot_trials[key] = trial
        drawn = super().suggest(key) or {}
        values = {name: drawn[name] for name in self._study.space.dimensions}
        config = self._study.space.configure(self._study.config, values)
        chains = stage_keys(config, self._study.digest, self._study.workers, self._numerics)
        self._pool[key] = Candidate(trial.number, values, config, chains)

    def _choose(self) -> str | None:
        """Of those in the pool that could start now the one to start, with the leases that it needs."""
        stored, claims = self._store.stored(), self._store.claims()
        missing = {key: candidate.missing(self._store, stored) for key, candidate in self._pool.items()}
        waiting: dict[str, int] = {}
        for chains in missing.values():
            if chains:
                waiting[chains[0].key] = waiting.get(chains[0].key, 0) + 1

        def urgency(key: str) -> tuple[int, int, int]:
            first = missing[key][:1]
            shared = waiting[first[0].key] if first else 0
            return (-shared, -first[0].epochs if first else 0, self._pool[key].number)

        for key in sorted(self._pool, key=urgency):
            if not claims.isdisjoint(chain.key for chain in missing[key]):
                continue
            if (leases := self._claim(missing[key])) is not None:
                self._leases[key] = leases
                return key
        return None

    def _claim(self, chains: Sequence[StageKey]) -> dict[str, Lease] | None:
        """Leases on all chains by stage, or None where somebody has one of them."""
        leases: dict[str, Lease] = {}
        for chain in chains:
            if (lease := self._store.claim(chain, self._study.uri)) is None:
                for claimed in leases.values():
                    claimed.release()
                return None
            leases[chain.stage] = lease
        for lease in leases.values():
            self._keeper.add(lease)
        return leases

    def _release(self, trial_id: str, before: str | None = None) -> None:
        """Give back a trial's leases: all, or those of the stages before the one under way."""
        leases = self._leases.get(trial_id, {})
        stages = [chain.stage for chain in self._live[trial_id].chains]
        for stage in stages[: stages.index(before)] if before else stages:
            if (lease := leases.pop(stage, None)) is not None:
                self._keeper.discard(lease)
                lease.release()

    def _pin(self) -> None:
        """Keep the end of the best trial from eviction: it is what ships."""
        best = self._book.record.best()
        if best is not None and best.legs:
            last, before = best.legs[-1], self._pinned
            self._pinned = self._store.hold(StateId(last.chain, last.stage, last.epochs))
            self._keeper.add(self._pinned)
            if before is not None:
                self._keeper.discard(before)
                before.release()

    def _frozen(self, number: int) -> FrozenTrial:
        return self._record.get_trials(deepcopy=False)[number]


def _sampler(study: Study, drawn: int) -> BaseSampler:
    """A study's sampler after so many trials: seeded alike at every start, it would draw the same points again."""
    seed = study.config.seed + drawn
    return RandomSampler(seed) if study.sampler == "random" else TPESampler(seed=seed, n_startup_trials=STARTUP)


class StudyScheduler(FIFOScheduler):
    """Starts trials as they come, and asks the search whether they go on."""

    def __init__(self, search: StageTreeSearch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._search = search

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: see the search."""
        return {}

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Hand on why a trial's process was lost; the last time counts."""
        if trial.status == Trial.PENDING and self._search.unbegun(trial.trial_id):
            return
        error = trial.get_error()
        self._search.lost(trial.trial_id, str(error).strip().splitlines()[-1] if error else "no reason is known")

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Hand on a report, and stop the trial if it is poor."""
        if self._search.heard(trial.trial_id, result):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)
