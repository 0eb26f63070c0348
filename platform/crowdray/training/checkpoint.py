"""Complete checkpoints made of tensors and JSON; loading one runs no code from it.

A checkpoint is a folder: state.json, config.json, weights.safetensors (every module trained so far),
average.safetensors (the weight average), optimizer.safetensors, and best-<stage>.safetensors, the best
exported weights of each stage. Random generators have no state: random numbers are functions of (seed,
stage, epoch, rank).
"""

import errno
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, Self

from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crowdray import storage
from crowdray.config import Config, from_json, to_json
from crowdray.documents import parse_as, parse_document, to_document
from crowdray.errors import DataError, UserError

EpochMetrics = dict[str, int | float | str]
"""Metrics of one epoch by name, and its stage's name."""

MEASURED_METRICS = ("images_per_s", "data_wait_fraction", "mfu", "memory_gib", "seconds")
"""Metrics of time and memory: they differ between runs that compute the same."""

FORMAT = 1
STATE = "state.json"

# Names in state.json and its history before version 0.2, still read.
_OLD_FIELDS = {
    "chain": "stage_key",
    "stale": "epochs_since_best",  # previous name
    "factors": "loss_weights",
    "norms": "gradient_norms",
    "average_updates": "ema_updates",
}
_OLD_METRICS = {"wait_share": "data_wait_fraction", "matrix_share": "mfu"}  # previous names


def rename_old_metrics(history: Iterable[EpochMetrics]) -> list[EpochMetrics]:
    """Return a stored history with the current names of its metrics."""
    return [{_OLD_METRICS.get(name, name): value for name, value in epoch.items()} for epoch in history]


@dataclass
class BestEpoch:
    """The best validated epoch of a stage; the latest one of an annealed stage."""

    epoch: int
    """Global epoch, counted from 1."""
    mae: float
    """Mean absolute error on whole validation images."""
    rmse: float
    """Root mean squared error on them."""


@dataclass
class Progress:
    """How far a training run is: all of its state except tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    density_scale: float
    """Unit of the density decoder's output."""
    count_scale: float
    """Unit of the count decoder's output: mean heads in a crop."""
    data_digest: str
    """Digest of the training dataset."""
    world_size: int
    """Latest number of workers. A run may resume with another number, but not to the same bits."""
    stage_key: str = ""
    """Stage cache key of this state (stage_cache/keys.py); empty once other code or another number of workers
    continued the run."""
    stage: int = 0
    """Index of the current stage; the number of stages when all are finished."""
    stage_epochs: int = 0
    """Finished epochs of the current stage."""
    epochs: int = 0
    """Finished epochs in total."""
    updates: int = 0
    """Optimizer steps in total."""
    epochs_since_best: int = 0
    """Epochs of the current stage since its best."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Loss weights of the current stage by task."""
    gradient_norms: dict[str, float] = field(default_factory=dict)
    """Gradient norms measured for loss balancing, by task."""
    learning_rate: float = 0.0
    """Current learning rate, without warmup."""
    plateau: dict[str, int | float | None] = field(default_factory=dict)
    """State of the plateau schedule."""
    ema_updates: int = 0
    """Updates of the weight average."""
    best: dict[str, BestEpoch] = field(default_factory=dict)
    """Best epoch by stage."""
    history: list[EpochMetrics] = field(default_factory=list)
    """Metrics of every epoch."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Parse the content of state.json, in its current or its previous form; raise ValueError for others."""
        fields = {_OLD_FIELDS.get(name, name): value for name, value in content.items()}
        return parse_as(cls, fields | {"history": rename_old_metrics(fields["history"])})


@dataclass
class Checkpoint:
    """Everything needed to resume a training run bit for bit."""

    config: Config
    progress: Progress
    weights: dict[str, Tensor]
    """Parameters and buffers of the modules trained so far."""
    ema: dict[str, Tensor] = field(default_factory=dict)
    """Exponential moving average of the exported weights."""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """State of the optimizer."""
    best_weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Best weights of encoder and density decoder by stage."""


@contextmanager
def disk_full_as_user_error(content: str, fix: str) -> Iterator[None]:
    """Turn a full disk into a UserError.

    Args:
        content: what is being written; it is staged in the folder for temporary files first.
        fix: what to do after freeing space.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise UserError(f"no space left for {content}, or in {tempfile.gettempdir()}; free some, {fix}") from error
        raise


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint into an empty folder, state.json last."""
    tensors = {
        "weights": checkpoint.weights,
        "average": checkpoint.ema,
        "optimizer": checkpoint.optimizer,
    }
    for name, content in (tensors | {f"best-{stage}": best for stage, best in checkpoint.best_weights.items()}).items():
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in content.items()},
            folder / f"{name}.safetensors",
        )
    (folder / "config.json").write_text(to_json(checkpoint.config))
    files = {file.name: storage.hash_file(file) for file in sorted(folder.iterdir())}
    state = {"format": FORMAT, "files": files, **asdict(checkpoint.progress)}
    (folder / STATE).write_text(to_document(state, indent=1))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint to the CPU.

    Raises:
        DataError: the folder does not contain a complete checkpoint.
    """
    fix = "choose another checkpoint, or train under a new --name"
    try:
        content = parse_document((folder / STATE).read_bytes())
        if (version := content.pop("format")) != FORMAT:
            raise DataError(f"{folder} contains a checkpoint of format {version}, not {FORMAT}; {fix}")
        for name, sha256 in content.pop("files", {}).items():  # absent before version 0.2
            if storage.hash_file(folder / PurePath(name).name) != sha256:
                raise ValueError(f"{name} is damaged: it does not have the sha256 {sha256}")
        progress = Progress.from_json(content)
        config = from_json((folder / "config.json").read_text(), str(folder / "config.json"))
        weights, ema, optimizer = (load_file(folder / f"{n}.safetensors") for n in ("weights", "average", "optimizer"))
        best_weights = {stage: load_file(folder / f"best-{stage}.safetensors") for stage in progress.best}
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        # torch raises RuntimeError for a file that disappears while safetensors opens it
        raise DataError(
            f"{folder} does not contain a complete checkpoint ({type(error).__name__}: {error}); {fix}"
        ) from error
    return Checkpoint(config, progress, weights, ema, optimizer, best_weights)
