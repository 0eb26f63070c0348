"""A study: what it searches, and its folder in --storage.

- study.json: the identity; a start under the same name must have the same.
- journal.log: Optuna's record of all trials, unless a database holds it.
- trial-NNNN/: the best trial, as a run of its own (pipeline/run.py).
- record.json: all trials; written last, with the figures *.png.
"""

import json
from dataclasses import dataclass, replace

from crowdray import storage
from crowdray.config import Config, to_json
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.pipeline.identity import RunIdentity, default_name
from crowdray.pipeline.run import Run, plan_run
from crowdray.stage_cache.keys import code_digest
from crowdray.tune.options import SearchOptions
from crowdray.tune.space import Space, load_space

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Study:
    """A hyperparameter search."""

    identity: RunIdentity
    """Base configuration with resolved threads, data, workers per trial, and location."""
    space: Space
    """Fields that vary, and how."""
    options: SearchOptions
    """Objectives, sampler, pruning and database."""

    @property
    def uri(self) -> str:
        """The study's folder."""
        return self.identity.uri

    @property
    def config(self) -> Config:
        """The base configuration."""
        return self.identity.config

    @property
    def identity_file(self) -> str:
        """File with the recorded identity; it exists before the first trial starts."""
        return storage.join(self.uri, STUDY_FILE)

    @property
    def objectives(self) -> list[str]:
        """Validation errors of the joint stage to minimize: mae, or mae and rmse."""
        return self.options.objectives.split("+")

    @property
    def prunes(self) -> bool:
        """Whether trials are stopped early; Optuna's pruners support a single objective."""
        return self.options.prune and len(self.objectives) == 1

    def run_of(self, number: int, config: Config) -> Run:
        """A trial as a run of its own in the study's folder."""
        identity = self.identity
        trial = replace(identity, config=config, storage=self.uri, name=f"trial-{number:04d}", backbone_code="")
        return Run(trial)

    def create_or_verify(self) -> None:
        """Record what is searched, or check that the folder belongs to this very study; see RunIdentity."""
        self.identity.create_or_verify(
            self.identity_file,
            space=json.loads(self.space.to_json()),
            objectives=self.objectives,
            sampler=self.options.sampler,
            prune=self.options.prune,
            workers=self.identity.workers,
            code=code_digest() + self.identity.backbone_code,  # results of different code are not comparable
        )


def plan_study(
    config: Config, data: str, preset: str, options: SearchOptions, tracking_uri: str | None = None
) -> Study:
    """Resolve a command's options into a study; its default name depends on what is searched.

    A worker has one CPU unless the configuration says otherwise: more concurrent trials beat faster ones.

    Raises:
        UserError: The options, the space or the dataset cannot be used.
    """
    if not isinstance(options.workers, int):
        raise UserError(
            f"--workers is {options.workers!r}; all trials of a study need the same number of workers, to be "
            "comparable and to share states: give one number"
        )
    identity = plan_run(
        config, data, options.workers, options.storage, options.name, preset, tracking_uri=tracking_uri
    ).identity
    dataset, config = Dataset.open(data), identity.config
    without_depth = dataset.index.depth_teacher == "none"
    space = load_space(options.space, (*["loss.depth=null"] * without_depth, *options.vary), config)
    for name, unused, reason in (
        ("loss.depth", without_depth, "the dataset has no depth: it was converted with --depth none"),
        ("numerics.grad_allreduce_dtype", options.workers == 1, "a single worker reduces no gradients"),
    ):
        if unused and name in space.dimensions:
            raise UserError(f"the search space varies {name}, which changes nothing: {reason}; leave it out of --vary")
    if config.stages.joint.epochs == 0 or 0 in space.stage_lengths("joint"):
        raise UserError(
            "trials are compared in their joint stage, and stages.joint.epochs can be 0; give at least 1, in the "
            "preset and in the space"
        )
    resolved = replace(config, numerics=replace(config.numerics, threads=config.numerics.threads or 1))
    computed = (
        code_digest() + identity.backbone_code,
        to_json(resolved),
        space.to_json(),
        options.objectives,
        options.sampler,
        options.prune,
        dataset.digest,
        options.workers,
    )
    name = options.name or f"tune-{default_name(preset, *computed)}"
    return Study(replace(identity, config=resolved, name=name), space, options)
