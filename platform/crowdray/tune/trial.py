"""One trial of a study: a training run that reports every epoch to Ray Tune."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import tune

from crowdray.cluster.failures import is_worker_loss
from crowdray.cluster.runtime import Resources
from crowdray.cluster.single import train_single
from crowdray.cluster.train import run_training
from crowdray.config import Device
from crowdray.credentials import redacted
from crowdray.errors import InfeasibleConfigError, UserError
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.errors import DivergedError
from crowdray.tune.report import REPORT, SPEC, TrialReport, TrialReporter, TrialSpec
from crowdray.tune.study import Study


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a study have in common."""

    study: Study
    """The study; its folder holds the runs of trials with several workers."""
    resources: Resources
    """The cluster."""
    device: Device
    """Where the workers of a group train."""
    use_gpu: bool
    """Whether a trial of one worker has a GPU."""
    stage_cache: StageCacheConfig
    """Where trials share the states of their stages."""


def run_trial(task: TrialTask, tune_config: Mapping[str, Any]) -> None:
    """Train one trial and report each epoch; a single worker trains in this very process.

    Failures that would repeat are reported, not raised: Tune would restart the trial.
    """
    spec: TrialSpec = tune_config[SPEC]
    try:
        (_train_here if task.study.identity.max_workers == 1 else _train_group)(task, spec)
    except InfeasibleConfigError as error:
        _send(TrialReport("infeasible", str(error)))
    except UserError as error:
        _send(TrialReport("user_error", str(error)))
    except Exception as error:
        if is_worker_loss(error):
            raise
        kind = "" if isinstance(error, DivergedError) else f"{type(error).__name__}: "
        _send(TrialReport("failed", redacted(f"{kind}{error}")))


def _send(report: TrialReport) -> None:
    tune.report({REPORT: report})


def _train_here(task: TrialTask, spec: TrialSpec) -> None:
    reporter = TrialReporter(spec.keys, 1, annealed=spec.config.stages.joint.anneal_epochs > 0)
    trainer = train_single(
        spec.config,
        task.study.identity,
        task.study.identity_file,
        task.stage_cache,
        use_gpu=task.use_gpu,
        on_start=reporter.start,
        on_epoch=lambda history: _send(reporter.after_epoch(history)),
    )
    _send(reporter.at_end(trainer.state.progress.history))


def _train_group(task: TrialTask, spec: TrialSpec) -> None:
    run = replace(task.study.run_of(spec.number, spec.config), study_file=task.study.identity_file)
    annealed = spec.config.stages.joint.anneal_epochs > 0
    reporter = TrialReporter(spec.keys, run.identity.max_workers, annealed=annealed)
    last, found = spec.keys[-1], task.stage_cache.open().find(spec.keys)
    seen: list[EpochMetrics] = []

    def on_history(history: Sequence[EpochMetrics]) -> None:
        epochs = sum(row["stage"] == last.stage for row in history)
        complete = not seen and found == (last, epochs)  # nothing was left to train
        if not seen:
            reporter.start(history if complete else history[:-1])
        seen[:] = history
        if not complete:
            _send(reporter.after_epoch(history))

    run_training(run, task.resources, device=task.device, on_history=on_history, stage_cache=task.stage_cache)
    _send(reporter.at_end(seen))
