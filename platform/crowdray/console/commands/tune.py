"""`crowdray tune`: search loss weights and stage lengths and register the best counter."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from crowdray.console.arguments import console, parse_with_config, tracking_uri, write_json
from crowdray.console.commands.train import TrainingOptions
from crowdray.tune.options import SearchOptions

EXAMPLES = (
    "--preset mall-cfcn --data data/mall --trials 32",
    """--preset demo --data data/demo --trials 8 --vary 'loss.depth={"low": 0.1, "high": 2}'""",
)


@dataclass(frozen=True, kw_only=True)
class TuneJob(TrainingOptions):
    """Search configurations with Optuna, reuse stages that trials have in common, and register the best counter.

    The same command resumes an interrupted study; a larger --trials extends it.
    """

    trials: int
    """Total number of trials, including those of earlier runs of the study."""
    concurrent: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Maximum number of concurrent trials; by default as many as fit."""
    search: Annotated[SearchOptions, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(
        default_factory=SearchOptions
    )
    """Search space and storage."""


def parse_arguments(arguments: list[str]) -> TuneJob:
    """Parse the arguments of the command."""
    return parse_with_config(TuneJob, arguments, "tune", examples=EXAMPLES)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)

    # Imported late: help and usage errors do not wait for torch and Ray.
    from crowdray.console.study_display import StudyDisplay
    from crowdray.console.tables import show_study
    from crowdray.tune.driver import tune
    from crowdray.tune.study import plan_study

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
    show_study(outcome, job.data, screen)
    write_json(job.json, dataclasses.asdict(outcome))
