"""Train the three stages on a dataset and register what came out: python jobs/train.py --preset NAME --data
URI."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "platform"))

from crowdray.cluster.batch_size import find_batch_size
from crowdray.cluster.train import train
from crowdray.config import Config, Device
from crowdray.console.arguments import console, parse_with_config, run_job, tracking_uri, write_json
from crowdray.console.progress import TrainingDisplay
from crowdray.console.summary import show_outcome
from crowdray.pipeline.run import plan, workers_of
from crowdray.stage_cache.session import StageCacheOptions
from crowdray.training.stages import stages_of


@dataclass(frozen=True)
class TrainJob:
    """Train a crowd counter in three stages and register it, stripped of its auxiliary decoders.

    The same command given again goes on where it was stopped. Options with a dot override the preset.
    """

    preset: str
    """demo, mall-cfcn, shb-cfcn, shb-csrnet, sha-csrnet, worldexpo-csrnet, cfcn, csrnet, debug, or the path of a
    config.json."""
    data: str
    """Path or URI of the dataset, as jobs/convert.py made it."""
    workers: Annotated[int | str, tyro.conf.arg(metavar="N|MIN:MAX")] = 1
    """Processes that train together, each with its share of the CPUs or a GPU of its own; MIN:MAX follows the cluster:
    as many as it has room for, fewer when nodes go, more when some come."""
    storage: str = "runs"
    """Folder or URI for checkpoints and results; on several nodes one that all of them reach."""
    name: str | None = None
    """Name of the run; without it the preset's, with a hash of all that decides what is computed."""
    device: Device = "auto"
    """Where workers train: auto takes GPUs where there are enough."""
    batch: Literal["given", "auto"] = "given"
    """auto takes, for --sampling.batch, what one worker was measured to take: the windows beyond which it gets hardly
    faster, or as many as fit into its memory. Learning rates are meant for their preset's batch."""
    json: str | None = None
    """File for the result as JSON."""
    store: Annotated[StageCacheOptions, tyro.conf.arg(name="")] = field(default_factory=StageCacheOptions)
    """Where trainings leave their states for each other."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """What the training computes."""


def main(arguments: list[str]) -> None:
    job = parse_with_config(TrainJob, arguments, "jobs/train.py")
    workers, measured = workers_of(job.workers), job.batch == "auto"
    run = plan(job.config, job.data, workers, job.storage, job.name, job.preset, measured=measured)
    screen = console()
    with TrainingDisplay(stages_of(run.config), screen) as display:
        if measured:
            run = find_batch_size(run, display, device=job.device)
        stage_cache = job.store.stage_cache(run.storage)
        outcome = train(run, display, tracking_uri=tracking_uri(ROOT), stage_cache=stage_cache, device=job.device)
    show_outcome(outcome, screen)
    write_json(job.json, dataclasses.asdict(outcome))


if __name__ == "__main__":
    run_job(main)
