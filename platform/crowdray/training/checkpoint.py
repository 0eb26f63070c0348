"""Complete checkpoints made of tensors and JSON: nothing in them runs code when it is loaded.

A checkpoint is a folder: state.json, config.json, weights.safetensors (every module trained so far),
average.safetensors, optimizer.safetensors, and best-<stage>.safetensors, the best shipped weights of each
stage. Random numbers need no state: they are functions of (seed, stage, epoch, rank).
"""

import errno
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crowdray.config import Config, from_json, to_json
from crowdray.errors import DataError, UserError

Row = dict[str, float | str]
"""What is told of an epoch: numbers by name, and the stage's name."""

CLOCKED = ("images_per_s", "data_wait_fraction", "mfu", "memory_gib", "seconds")
"""Names of a row's numbers that are measured: they differ between trainings that compute the same."""

FORMAT = 1
STATE = "state.json"


@dataclass
class Best:
    """The best validation of a stage."""

    epoch: int
    """Global epoch, counted from 1."""
    mae: float
    """Mean absolute error on whole validation images."""
    rmse: float
    """Root mean squared error there."""


@dataclass
class Progress:
    """Where a training stands: everything but tensors."""

    density_scale: float
    """Unit of the density decoder's output."""
    count_scale: float
    """Unit of the count decoder's output: mean heads in a crop."""
    data_digest: str
    """The dataset it trains on."""
    world_size: int
    """Number of workers, the latest; other numbers continue too, but not to the same bits."""
    chain: str = ""
    """Key of the chain of states that it is on (stage_cache/keys.py); of none once something else went on with it,
    such as other code or another number of workers."""
    stage: int = 0
    """Index of the stage under way; the number of stages when all are done."""
    stage_epochs: int = 0
    """Epochs done in that stage."""
    epochs: int = 0
    """Epochs done in all."""
    updates: int = 0
    """Updates done in all."""
    epochs_since_best: int = 0
    """Epochs of this stage since its best."""
    factors: dict[str, float] = field(default_factory=dict)
    """Loss factors of this stage."""
    norms: dict[str, float] = field(default_factory=dict)
    """Gradient norms that the calibration measured."""
    learning_rate: float = 0.0
    """Learning rate in use."""
    plateau: dict[str, float | None] = field(default_factory=dict)
    """Memory of the plateau rule."""
    average_updates: int = 0
    """Updates that the weight average has seen."""
    best: dict[str, Best] = field(default_factory=dict)
    """Best validation per stage."""
    history: list[Row] = field(default_factory=list)
    """One row per epoch."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Parse what asdict gave."""
        progress = cls(**content)
        progress.best = {stage: Best(**best) for stage, best in content["best"].items()}
        return progress


@dataclass
class Checkpoint:
    """A training that can go on as if it had never stopped."""

    config: Config
    """The configuration."""
    progress: Progress
    """Where it stands."""
    weights: dict[str, Tensor]
    """Parameters of the modules trained so far."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Running average of what ships."""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """State of the optimizer."""
    best: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Best weights of encoder and density decoder per stage."""


@contextmanager
def room(what: str, mend: str) -> Iterator[None]:
    """Turn a full disk into a UserError: there was no space for `what`, which is made in the folder for temporary
    files first."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise UserError(f"no space left for {what}, or in {tempfile.gettempdir()}; free some, {mend}") from error
        raise


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint into an empty folder, state.json last."""
    tensors = {
        "weights": checkpoint.weights,
        "average": checkpoint.average,
        "optimizer": checkpoint.optimizer,
    }
    for name, content in (tensors | {f"best-{stage}": best for stage, best in checkpoint.best.items()}).items():
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in content.items()},
            folder / f"{name}.safetensors",
        )
    (folder / "config.json").write_text(to_json(checkpoint.config))
    state = {"format": FORMAT, **asdict(checkpoint.progress)}
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises DataError when the folder holds none, or a damaged one."""
    mend = "give another checkpoint, or train under a new --name"
    try:
        content = json.loads((folder / STATE).read_text())
        if content.pop("format") != FORMAT:
            raise DataError(f"{folder} holds a checkpoint of another format, not {FORMAT}; {mend}")
        progress = Progress.from_json(content)
        config = from_json((folder / "config.json").read_text(), str(folder / "config.json"))
        weights, average, optimizer = (
            load_file(folder / f"{n}.safetensors") for n in ("weights", "average", "optimizer")
        )
        best = {stage: load_file(folder / f"best-{stage}.safetensors") for stage in progress.best}
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise DataError(f"{folder} holds no whole checkpoint ({type(error).__name__}: {error}); {mend}") from error
    return Checkpoint(config, progress, weights, average, optimizer, best)
