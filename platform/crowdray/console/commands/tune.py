"""`crowdray tune`: search loss weights and stage lengths and register the best counter."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from crowdray.console.arguments import console, parse_with_config, tracking_uri, write_json
from crowdray.console.commands.train import TrainingOptions
from crowdray.console.study_display import StudyDisplay
from crowdray.console.tables import show_study
from crowdray.tune.driver import tune
from crowdray.tune.study import SearchOptions, plan_study


@dataclass(frozen=True, kw_only=True)
class TuneJob(TrainingOptions):
    """Search configurations with Optuna, reuse stages that trials have in common, and register the best counter.

    The same command resumes an interrupted study; a larger --trials extends it.
    """

    trials: int
    """Total number of trials, including those of earlier runs of the study."""
    concurrent: int | None = None
    """Maximum number of concurrent trials; by default as many as fit."""
    search: Annotated[SearchOptions, tyro.conf.arg(name="")] = field(default_factory=SearchOptions)
    """Search space and storage."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_with_config(TuneJob, arguments, "tune")
    study = plan_study(job.resolved_config, job.data, job.preset, job.search, tracking_uri())
    screen = console()
    with StudyDisplay(screen) as display:
        outcome = tune(
            study,
            display,
            trials=job.trials,
            concurrent=job.concurrent,
            tracking_uri=tracking_uri(),
            stage_cache=job.cache.config(study.identity.storage),
            device=job.device,
        )
    show_study(outcome, screen)
    write_json(job.json, dataclasses.asdict(outcome))
