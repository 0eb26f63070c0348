"""`crowdray tune`: search loss weights and stage lengths and register the best counter."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from crowdray.config import Config, Device
from crowdray.console.arguments import console, parse_with_config, tracking_uri, write_json
from crowdray.console.study_display import StudyDisplay
from crowdray.console.tables import show_study
from crowdray.stage_cache.session import StageCacheOptions
from crowdray.tune.driver import tune
from crowdray.tune.study import SearchOptions, plan_study


@dataclass(frozen=True)
class TuneJob:
    """Search configurations with Optuna, reuse stages that trials have in common, and register the best counter.

    The same command resumes an interrupted study; a larger --trials extends it.
    """

    preset: str
    """demo, mall-cfcn, shb-cfcn, shb-csrnet, sha-csrnet, worldexpo-csrnet, cfcn, csrnet, debug, or the path of a
    config.json: values of the fields that are not searched."""
    data: str
    """Path or URI of a dataset written by jobs/convert.py."""
    trials: int
    """Total number of trials, including those of earlier runs of the study."""
    concurrent: int | None = None
    """Maximum number of concurrent trials; by default as many as fit."""
    device: Device = "auto"
    """Device of the workers: auto uses GPUs if there are enough."""
    json: str | None = None
    """Path or URI for the result as JSON."""
    search: Annotated[SearchOptions, tyro.conf.arg(name="")] = field(default_factory=SearchOptions)
    """Search space and storage."""
    cache: Annotated[StageCacheOptions, tyro.conf.arg(name="")] = field(default_factory=StageCacheOptions)
    """Cache of trained stages, shared by trials."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """Base configuration of every trial."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_with_config(TuneJob, arguments, "tune")
    study, screen = plan_study(job.config, job.data, job.preset, job.search), console()
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
