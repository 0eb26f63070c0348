"""The folder of a study in --storage: what it searches, its journal, its figures, its best trial.

study.json         what is searched, on what; a study under the same name has to have the same
journal.log        Optuna's own record of all trials, unless a database keeps it
trial-NNNN/        the best trial, as a run of its own (pipeline/run.py)
leases/            who drives it
record.json        all trials, and *.png, the figures: written last
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crowdray import storage
from crowdray.config import Config, result_fields, to_json
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.models.build import backbone_class
from crowdray.models.pretrained import pin_weights
from crowdray.pipeline.run import Run, check_name, claim_file, default_name
from crowdray.stage_cache.keys import backbone_digest, code_digest
from crowdray.tune.space import Space, load_space

if TYPE_CHECKING:
    import optuna

IDENTITY = "study.json"
FOLDER = "folder"
"""Optuna's attribute of a study that says where its other half lies."""


@dataclass(frozen=True)
class SearchOptions:
    """What is searched, by whom, and where it is kept: options of a job."""

    space: str | None = None
    """JSON file that changes what is searched: {"target.sigma": {"low": 2, "high": 6}, "loss.count": null}."""
    vary: tuple[str, ...] = ()
    """The same for single fields, as in --vary 'target.sigma={"low": 2, "high": 6}' 'loss.count=null'."""
    objectives: Literal["mae", "mae+rmse"] = "mae"
    """Validation error that is to be small, or both; the trial with the lowest MAE ships in either case."""
    sampler: Literal["tpe", "random"] = "tpe"
    """Who draws the trials: the tree-structured Parzen estimator, which learns from earlier ones, or chance."""
    prune: bool = True
    """Stop trials that are poor at equal epochs of the joint stage; with two objectives none is stopped."""
    workers: int | str = 1
    """Processes that train one trial together, the same number in all trials."""
    storage: str = "runs"
    """Folder or URI for the study and its best trial; on several nodes one that all of them reach."""
    database: str | None = None
    """URL of a database for Optuna's record, such as postgresql://...; without it a journal in the study's folder."""
    name: str | None = None
    """Name of the study; without it the preset's, with a hash of all that decides what is searched."""


@dataclass(frozen=True)
class Study:
    """One search: over what, from which configuration, on what data, by whom, and where it is kept."""

    config: Config
    """What the space leaves as it is; threads are settled."""
    space: Space
    """What varies, and how."""
    objectives: tuple[str, ...]
    """mae, rmse or both: validation errors of the joint stage that are to be small."""
    sampler: Literal["tpe", "random"]
    """Who draws the trials."""
    prune: bool
    """Whether poor trials are stopped."""
    data: str
    """Absolute URI of the dataset."""
    digest: str
    """Its identity."""
    workers: int
    """Processes that train one trial together."""
    storage: str
    """Absolute URI of the folder that holds all runs and studies."""
    name: str
    """Name of the study."""
    backbone: str = ""
    """Hash of the code that its backbone brings."""
    database: str | None = None
    """URL of the database that holds Optuna's record; None: a journal in the study's folder."""

    @property
    def uri(self) -> str:
        """The study's own folder."""
        return storage.join(self.storage, self.name)

    @property
    def identity(self) -> str:
        """File that says what the study is; it is there from the study's beginning."""
        return storage.join(self.uri, IDENTITY)

    def trial(self, number: int, config: Config) -> Run:
        """A trial as a run of its own."""
        return Run(config, self.data, self.digest, self.workers, self.uri, f"trial-{number:04d}")

    def claim(self) -> None:
        """Write down what the study is, or check that its folder belongs to this very study."""
        identity = {
            "config": result_fields(self.config),
            "space": json.loads(self.space.to_json()),
            "objectives": list(self.objectives),
            "sampler": self.sampler,
            "prune": self.prune,
            "workers": self.workers,
            "code": code_digest() + self.backbone,  # trials of two codes cannot be compared
            "data": {"digest": self.digest},
        }
        data = {"uri": self.data, "digest": self.digest}
        content = identity | {"config": asdict(self.config), "data": data}
        claim_file(self.identity, identity, content)

    def optuna_study(self) -> "optuna.Study":
        """Optuna's record of the trials: a journal in the study's folder, or the database that was named.

        Raises UserError for a database in which a study of another folder has this name.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        record = optuna.create_study(
            storage=self._optuna_storage(),
            study_name=self.name,
            directions=["minimize"] * len(self.objectives),
            load_if_exists=True,
        )
        if self.database is not None:
            if (folder := record.user_attrs.get(FOLDER, self.uri)) != self.uri:
                raise UserError(
                    f"the study {self.name} in --database belongs to {folder}, this one is {self.uri}; give another "
                    "--name, or the --storage it was begun with"
                )
            record.set_user_attr(FOLDER, self.uri)
        return record

    def _optuna_storage(self) -> "optuna.storages.BaseStorage":
        from optuna.storages import JournalStorage, RDBStorage
        from sqlalchemy.exc import SQLAlchemyError

        if self.database is not None:
            try:
                return RDBStorage(self.database)
            except (ImportError, SQLAlchemyError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"--database cannot be used: {reason}; give a URL such as postgresql://user@host/optuna, and "
                    "install the database's driver"
                ) from error
        if not storage.is_local(self.uri):
            raise UserError(
                f"Optuna's journal cannot lie in {self.uri}: it grows line by line, and objects there are written "
                "whole; name a database with --database, such as postgresql://..., or a --storage that is a path"
            )
        journal = Path(self.uri) / "journal.log"
        journal.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_line(journal)
        return JournalStorage(_journal_at(journal))


def _journal_at(place: Path) -> "optuna.storages.journal.BaseJournalBackend":
    """Optuna's journal in a file, without what a full disk leaves of a line: it would write on behind that, and read
    neither line again."""
    from optuna.storages.journal import JournalFileBackend

    class Whole(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            before = place.stat().st_size
            try:
                super().append_logs(logs)
            except OSError:
                os.truncate(place, before)
                raise

    return Whole(str(place))


def _cut_half_line(journal: Path) -> None:
    """Take from a journal what a power cut left of its last line, likewise."""
    if journal.exists() and (written := journal.read_bytes()) and not written.endswith(b"\n"):
        os.truncate(journal, written.rfind(b"\n") + 1)


def drawn_trials(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """The trials that have their parameters: all but those that only wait for theirs."""
    from optuna.trial import TrialState

    return [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]


def plan_study(config: Config, data: str, preset: str, options: SearchOptions) -> Study:
    """The study of a command; without a name it is called after its preset and a hash of all that it searches.

    A worker of a trial has one CPU unless the configuration says otherwise: more trials at once beat faster ones.
    """
    check_name(options.name)
    if not isinstance(options.workers, int):
        raise UserError(
            f"--workers is {options.workers!r}; all trials of a study have the same number of workers, for what they "
            "share and to be compared: give one number"
        )
    dataset = Dataset.open(data)
    source, config = backbone_digest(backbone_class(config)), pin_weights(config)
    without_depth = dataset.index.depth_teacher == "none"
    space = load_space(options.space, (*["loss.depth=null"] * without_depth, *options.vary), config)
    for name, idle, reason in (
        ("loss.depth", without_depth, "the dataset has no depth: it was converted with --depth none"),
        ("numerics.grad_allreduce_dtype", options.workers == 1, "one worker exchanges nothing"),
    ):
        if idle and name in space.dimensions:
            raise UserError(f"the search space varies {name}, which changes nothing: {reason}; leave it out of --vary")
    if config.stages.joint.epochs == 0 or 0 in space.quanta("joint"):
        raise UserError(
            "a trial is judged by its joint stage, and stages.joint.epochs can be 0; give at least 1, in the preset "
            "and in the space"
        )
    settled = replace(config, numerics=replace(config.numerics, threads=config.numerics.threads or 1))
    searched = (
        code_digest() + source,
        to_json(settled),
        space.to_json(),
        options.objectives,
        options.sampler,
        options.prune,
        dataset.digest,
        options.workers,
    )
    return Study(
        config=settled,
        space=space,
        objectives=tuple(options.objectives.split("+")),
        sampler=options.sampler,
        prune=options.prune,
        data=dataset.uri,
        digest=dataset.digest,
        workers=options.workers,
        backbone=source,
        storage=storage.resolve(options.storage),
        name=options.name or f"tune-{default_name(preset, *searched)}",
        database=options.database,
    )
