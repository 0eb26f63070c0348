"""`crowdray ablate`: compare what the auxiliary tasks contribute, over seeds and with a placebo."""

import dataclasses
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from crowdray.console.arguments import console, parse_with_config, tracking_uri, write_json
from crowdray.console.commands.train import TrainingOptions
from crowdray.errors import UserError

Number = TypeVar("Number", int, float)

_FOLDERS = ("--storage", "--stage-cache", "--results", "--json")
"""Options that a record does not mention."""

EXAMPLES = (
    "--preset mall-cfcn --data data/mall --seeds 1,2,3",
    "--preset mall-cfcn --data data/mall --seeds 1,2,3 --arms none --sweep loss.depth=0.1,0.3,1",
    "--preset shb-csrnet --data data/shb --arms none,all,placebo --fractions 0.1,1 --gpus-per-run 0.25",
)


@dataclass(frozen=True, kw_only=True)
class AblateJob(TrainingOptions):
    """Train a counter with no, some and all auxiliary tasks and compare the arms over seeds.

    All arms of a seed have the same initial weights, data and number of updates. The last epoch is the result, and the
    test split is read once, at the end. The same command resumes an interrupted ablation.
    """

    seeds: Annotated[str, tyro.conf.arg(metavar="N,N,...")] = "1,2,3"
    """Seeds of each arm."""
    arms: Annotated[str | None, tyro.conf.arg(metavar="ARM,ARM,...")] = None
    """none, all, placebo (all tasks, on the targets of other images), or tasks joined by +, of depth, segmentation and
    count; by default none, every combination, all and placebo."""
    sweep: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=X,X,...")] = ()
    """Further arms, one for each value of a loss weight with the other weights 0: loss.depth=0.1,0.3,1."""
    fractions: Annotated[str, tyro.conf.arg(metavar="X,X,...")] = "1"
    """Fractions of the training images to train on, for as many updates."""
    backbones: Annotated[str | None, tyro.conf.arg(metavar="NAME,NAME,...")] = None
    """Backbones; by default that of the configuration."""
    storage: Annotated[str, tyro.conf.arg(metavar="URI")] = "runs"
    """Folder or URI for the ablation; with several nodes, shared by all of them."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the ablation; by default the preset and a hash of everything but the seeds."""
    cpus_per_run: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """CPU threads of each training run."""
    gpus_per_run: Annotated[float, tyro.conf.arg(metavar="X")] = 1.0
    """GPUs of each training run, where there are any; 0.25 runs four on one GPU."""
    concurrent: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Maximum number of concurrent training runs; by default as many as fit."""
    results: Annotated[str, tyro.conf.arg(metavar="URI")] = "results"
    """Folder for the record of the result."""
    read_test_again: Annotated[str, tyro.conf.arg(metavar="REASON")] = ""
    """Read the test split again, for seeds that were added after it was read; the result states the reason."""


def parse_arguments(arguments: list[str]) -> AblateJob:
    """Parse the arguments of the command."""
    return parse_with_config(AblateJob, arguments, "ablate", examples=EXAMPLES)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)
    seeds, fractions = _numbers("--seeds", job.seeds, int), _numbers("--fractions", job.fractions, float)

    # Imported late: help and usage errors do not wait for torch and Ray.
    from crowdray.ablation.protocol import plan_ablation
    from crowdray.cluster.ablate import Placement, ablate
    from crowdray.console.ablation_display import AblationDisplay, show_ablation

    config = job.resolved_config
    ablation = plan_ablation(
        config,
        job.data,
        job.preset,
        arms=None if job.arms is None else job.arms.split(","),
        sweeps=job.sweep,
        fractions=fractions,
        backbones=job.backbones.split(",") if job.backbones else (),
        seeds=seeds,
        threads=job.cpus_per_run,
        folder=job.storage,
        name=job.name,
        tracking_uri=tracking_uri(),
    )
    screen = console()
    with AblationDisplay(screen) as display:
        annealed = ablation.identity.config.stages.joint
        if not config.stages.joint.anneal_epochs:
            display.on_status(
                f"the last {annealed.anneal_epochs} of {annealed.epochs} joint epochs are annealed, so that the last "
                "one is the result (--stages.joint.anneal-epochs)"
            )
        outcome = ablate(
            ablation,
            display,
            placement=Placement(job.cpus_per_run, job.gpus_per_run, job.device, job.concurrent),
            command=shlex.join(["jobs/ablate.py", *repeatable(arguments)]),
            read_again=job.read_test_again,
            results=job.results,
            tracking_uri=tracking_uri(),
            stage_cache=job.cache.config(ablation.identity.storage),
        )
    show_ablation(outcome, screen)
    write_json(job.json, dataclasses.asdict(outcome))


def repeatable(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments that decide the result: without the folders of this machine."""
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in _FOLDERS:
            if not equals:
                next(words, "")
        elif os.path.isabs(value or word):
            yield f"{name}=" * bool(equals) + os.path.basename(value or word)
        else:
            yield word


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give numbers separated by commas") from None
