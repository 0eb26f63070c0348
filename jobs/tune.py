"""Search loss weights and stage lengths: python jobs/tune.py --preset NAME --data URI --trials N."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "platform"))

from crowdray.config import Config, Device
from crowdray.console.arguments import console, parse_with_config, run_job, tracking_uri, write_json
from crowdray.console.study_display import StudyDisplay
from crowdray.console.summary import show_study
from crowdray.stage_cache.session import StageCacheOptions
from crowdray.tune.driver import tune
from crowdray.tune.study import SearchOptions, plan_study


@dataclass(frozen=True)
class TuneJob:
    """Search configurations with Optuna, train what trials share once, and register the best counter.

    The same command given again goes on where it was stopped; more --trials continue the study.
    """

    preset: str
    """demo, mall-cfcn, shb-cfcn, shb-csrnet, sha-csrnet, worldexpo-csrnet, cfcn, csrnet, debug, or the path of a
    config.json: what the search does not vary."""
    data: str
    """Path or URI of the dataset, as jobs/convert.py made it."""
    trials: int
    """Trials in all, those of earlier starts included."""
    concurrent: int | None = None
    """Trials at once at most; without it as many as fit."""
    device: Device = "auto"
    """Where workers train: auto takes GPUs where there are enough."""
    json: str | None = None
    """File for the result as JSON."""
    search: Annotated[SearchOptions, tyro.conf.arg(name="")] = field(default_factory=SearchOptions)
    """What is searched, and where it is kept."""
    store: Annotated[StageCacheOptions, tyro.conf.arg(name="")] = field(default_factory=StageCacheOptions)
    """Where trainings leave their states for each other."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """What each trial starts from."""


def main(arguments: list[str]) -> None:
    job = parse_with_config(TuneJob, arguments, "jobs/tune.py")
    study, screen = plan_study(job.config, job.data, job.preset, job.search), console()
    with StudyDisplay(screen) as display:
        outcome = tune(
            study,
            display,
            trials=job.trials,
            concurrent=job.concurrent,
            tracking_uri=tracking_uri(ROOT),
            stage_cache=job.store.stage_cache(study.storage),
            device=job.device,
        )
    show_study(outcome, screen)
    write_json(job.json, dataclasses.asdict(outcome))


if __name__ == "__main__":
    run_job(main)
