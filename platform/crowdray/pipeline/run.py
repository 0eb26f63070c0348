"""The folder of a run in --storage.

- run.json: the identity (configuration, data, workers), compared at every start.
- config.json: the configuration alone, itself valid for --preset.
- train.log: steps, epochs and failures of all starts.
- checkpoint-*/: the last two checkpoints, until the run is finished.
- trained/: weights and result of the finished run, from which it is published again; result.json last.
- model/: the exported counter; weights.pt: its weights alone, as a state dict.
- overview.png: predictions on a few images; curves.png, calibration.png, levels.png: its errors.
- results.csv: metrics of each epoch.
- card.md: the model card.
- outcome.json: summary of everything; written last.
"""

import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from crowdray import storage
from crowdray.config import Config, to_json
from crowdray.data.shards import Dataset
from crowdray.documents import parse_json
from crowdray.errors import DataError, UserError
from crowdray.models.build import backbone_class
from crowdray.models.pretrained import pin_weights
from crowdray.pipeline.identity import RunIdentity, Workers, check_name, default_name, read_identity
from crowdray.pipeline.warm_start import pin_init
from crowdray.stage_cache.keys import backbone_digest
from crowdray.training.checkpoint import STATE, load_checkpoint

RUN_FILE = "run.json"
CONFIG = "config.json"
TRAINED = "trained"
"""Folder of the weights and the result of a finished run."""
RESULT = "result.json"
"""File that marks a finished run: it is published last."""
CARD = "card.md"
OUTCOME = "outcome.json"
RAY_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""The list of checkpoints that Ray Train keeps."""
_RAY_MARKER = ".validate_storage_marker"
_CHECKPOINT = "checkpoint-"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A training run and the paths of its folder."""

    identity: RunIdentity
    study_file: str | None = None
    """The study's identity file if this run is a trial: its states live in the stage cache alone, and the test split
    is not evaluated. None for a run of its own."""

    @property
    def uri(self) -> str:
        """The run's folder."""
        return self.identity.uri

    @property
    def identity_file(self) -> str:
        """File with the recorded identity; it exists before the first worker starts."""
        return self.study_file or storage.join(self.uri, RUN_FILE)

    @property
    def trained(self) -> str:
        """Folder of the finished run's weights."""
        return storage.join(self.uri, TRAINED)

    @property
    def is_trained(self) -> bool:
        """Whether training has finished."""
        return storage.exists(storage.join(self.trained, RESULT))

    @property
    def model(self) -> str:
        """Folder of the exported counter."""
        return storage.join(self.uri, "model")

    @property
    def outcome(self) -> str:
        """File with the summary; it exists once everything is done."""
        return storage.join(self.uri, OUTCOME)

    def with_config(self, config: Config) -> "Run":
        """The same run with another configuration."""
        return replace(self, identity=replace(self.identity, config=config))

    def recorded_batch(self) -> int | None:
        """Batch size that this run was started with; None before its first start."""
        if not storage.exists(self.identity_file):
            return None
        batch: int = read_identity(self.identity_file)["config"]["sampling"]["batch"]
        return batch

    def create_or_verify(self) -> None:
        """Record what the run computes, or check that its folder belongs to this very run; see RunIdentity."""
        if not storage.exists(self.identity_file):
            storage.write_bytes(storage.join(self.uri, CONFIG), to_json(self.identity.config).encode())
        self.identity.create_or_verify(self.identity_file)

    def repair(self) -> str | None:
        """Remove files that a killed process left incomplete.

        Ray writes its list of checkpoints in place and refuses to start from half of one. Object stores only hold
        complete files.

        Returns:
            The newest complete checkpoint if Ray's list had to be removed.
        """
        if not storage.is_local(self.uri):
            return None
        for partial in Path(self.uri).glob(f"{storage.PARTIAL}*"):
            if partial.is_dir():  # a file may belong to the lock of this very process
                shutil.rmtree(partial, ignore_errors=True)
        checkpoints = storage.join(self.uri, RAY_CHECKPOINT_LIST)
        if not storage.exists(checkpoints):
            return None
        with suppress(ValueError):
            parse_json(storage.read_bytes(checkpoints))
            return None
        storage.remove(checkpoints)
        for folder in sorted(Path(self.uri).glob("checkpoint-*"), reverse=True):
            with suppress(DataError):
                load_checkpoint(folder)
                return str(folder)
        return None


def remove_checkpoints(run: str) -> None:
    """Remove the checkpoints of a run that is finished and published; safe to interrupt and to repeat.

    A failure costs a warning: nothing needs them any more, and the same command tries again.
    """
    try:
        names = {file.name.partition("/")[0] for file in storage.find_files(run, depth=2)}
        for name in sorted(names):
            if name.startswith(_CHECKPOINT) or (name.startswith(storage.PARTIAL) and _CHECKPOINT in name):
                storage.unpublish_directory(storage.join(run, name), last=STATE)
        for name in names & {RAY_CHECKPOINT_LIST, _RAY_MARKER}:
            storage.remove(storage.join(run, name))
    except UserError as error:
        _log.warning("the checkpoints of the finished run are still there: %s", error)


def plan_run(
    config: Config,
    data: str,
    workers: Workers,
    folder: str,
    name: str | None,
    preset: str,
    *,
    auto_batch: bool = False,
    tracking_uri: str | None = None,
) -> Run:
    """Resolve a command's options into a run; its default name depends on all that it computes.

    Args:
        auto_batch: Whether the batch size is still to be measured; the name is the same before and after.
        tracking_uri: MLflow server or database of a registered model.init.

    Raises:
        UserError: The dataset, name, backbone, pretrained weights or initial counter cannot be used.
    """
    check_name(name)
    code, config = backbone_digest(backbone_class(config)), pin_weights(config)
    dataset = Dataset.open(data)
    config, init_file = pin_init(config, folder, tracking_uri)
    extra = filter(None, [code, "batch auto" if auto_batch else ""])
    name = name or default_name(preset, to_json(config), dataset.digest, workers, *extra)
    return Run(
        RunIdentity(config, dataset.uri, dataset.digest, workers, storage.resolve(folder), name, code, init_file)
    )
