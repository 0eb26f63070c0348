"""`crowdray train`: train the three stages on a dataset and register the counter."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from crowdray.config import Config, Device, with_init
from crowdray.console.arguments import console, parse_with_config, tracking_uri, write_json
from crowdray.console.help import Advanced
from crowdray.stage_cache.options import StageCacheOptions

EXAMPLES = (
    "--preset demo --data data/demo",
    "--preset mall-cfcn --data data/mall --workers 2",
    "--preset lite0 --data data/market --stages.joint.epochs 40 --name longer",
    "--preset adapt --init models:/crowdray-mall@candidate --data data/market",
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options that training and search have in common."""

    preset: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """One of the presets above, or the path of a config.json, such as that of a run."""
    data: Annotated[str, tyro.conf.arg(metavar="URI")]
    """Path or URI of a dataset written by jobs/convert.py."""
    init: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None
    """Start from the weights of a registered counter, such as models:/crowdray-mall@champion, or of the folder of a run
    or package: --model.init."""
    device: Device = "auto"
    """Device of the workers: auto uses GPUs if there are enough."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for the result as JSON."""
    ephemeral: bool = False
    """Run as a Ray job although its results are lost when it ends."""
    cache: Annotated[StageCacheOptions, tyro.conf.arg(name=""), Advanced] = field(default_factory=StageCacheOptions)
    """Cache of trained stages, shared by runs and trials."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff, Advanced] = field(
        default_factory=Config
    )
    """Configuration of the training run, or of what a search does not vary."""

    @property
    def resolved_config(self) -> Config:
        """The configuration with --init."""
        return self.config if self.init is None else with_init(self.config, self.init)


@dataclass(frozen=True, kw_only=True)
class TrainJob(TrainingOptions):
    """Train a crowd counter in three stages and register it without its auxiliary decoders.

    The same command resumes an interrupted run. Options with a dot override the preset.
    """

    workers: Annotated[int | str, tyro.conf.arg(metavar="N|MIN:MAX")] = 1
    """Number of worker processes, each with a GPU or an equal part of the CPUs; MIN:MAX is elastic: workers are added
    and removed with the nodes of the cluster."""
    storage: Annotated[str, tyro.conf.arg(metavar="URI")] = "runs"
    """Folder or URI for checkpoints and results; with several nodes, shared by all of them."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the run; by default the preset and a hash of everything that determines the result."""
    batch: Literal["given", "auto"] = "given"
    """auto replaces --sampling.batch by a measured one: the number of windows above which a worker hardly gets faster,
    or as many as fit into its memory. Learning rates are tuned for the batch of their preset."""


def parse_arguments(arguments: list[str]) -> TrainJob:
    """Parse the arguments of the command."""
    return parse_with_config(TrainJob, arguments, "train", examples=EXAMPLES)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)

    # Imported late: help and usage errors do not wait for torch and Ray.
    from crowdray.cluster.batch_size import find_batch_size
    from crowdray.cluster.train import train
    from crowdray.console.progress import TrainingDisplay
    from crowdray.console.tables import show_outcome
    from crowdray.pipeline.identity import parse_workers
    from crowdray.pipeline.run import plan_run
    from crowdray.training.stages import build_stages

    workers, measured = parse_workers(job.workers), job.batch == "auto"
    run = plan_run(
        job.resolved_config,
        job.data,
        workers,
        job.storage,
        job.name,
        job.preset,
        auto_batch=measured,
        tracking_uri=tracking_uri(),
    )
    screen = console()
    with TrainingDisplay(build_stages(run.identity.config), screen) as display:
        if measured:
            run = find_batch_size(run, display.on_status, device=job.device)
        stage_cache = job.cache.config(run.identity.storage)
        outcome = train(run, display, tracking_uri=tracking_uri(), stage_cache=stage_cache, device=job.device)
    show_outcome(outcome, job.data, screen)
    write_json(job.json, dataclasses.asdict(outcome))
