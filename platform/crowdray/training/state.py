"""The state of a training run on one rank, handed down from the trainer to its stages."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crowdray.config import Config
from crowdray.data.shards import Dataset
from crowdray.errors import DataError
from crowdray.models.build import backbone_class, build_counter
from crowdray.models.counter import Counter
from crowdray.models.initial import InitialWeights
from crowdray.models.pretrained import load_pretrained
from crowdray.training.checkpoint import Checkpoint, Progress
from crowdray.training.distributed import World
from crowdray.training.losses import Scales, measure_scales
from crowdray.training.precision import require_compiler, set_tf32


@dataclass(frozen=True)
class StepProgress:
    """How far the current epoch, its validation or the final evaluation is."""

    phase: Literal["training", "validation", "evaluation"]
    stage: str
    epoch: int
    """Epoch of the stage, from 1."""
    done: int
    """Steps of training, else images."""
    total: int


def ignore_step(step: StepProgress) -> None:
    """Do nothing: the default callback."""


@dataclass
class TrainState:
    """What all stages of a training run share."""

    config: Config
    counter: Counter
    device: torch.device
    world: World
    progress: Progress
    best_weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Exported weights of the best epoch by stage, on the CPU."""
    on_step: Callable[[StepProgress], None] = ignore_step
    """Called after every step of training, and every image of an evaluation."""

    @property
    def scales(self) -> Scales:
        """Units of the regressed quantities."""
        return Scales(self.progress.density_scale, self.progress.count_scale)

    @cached_property
    def copy_stream(self) -> torch.cuda.Stream | None:
        """The stream that copies batches to a GPU; one for all stages, as each stream keeps memory of its own."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def load(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of some or all modules into the counter."""
        self.counter.load_state_dict(weights, strict=False)


def create_state(
    config: Config,
    dataset: Dataset,
    train_rows: NDArray[np.int64],
    *,
    world: World,
    device: torch.device,
    restored: Checkpoint | None = None,
    initial: InitialWeights | None = None,
) -> TrainState:
    """Build the counter on its device, with initial or restored weights and progress.

    Args:
        initial: Weights to start from; their unit of density stays that of the run.

    Raises:
        DataError: the checkpoint was trained on another dataset.
        InfeasibleConfigError: torch.compile has no compiler.
    """
    require_compiler(config.numerics.compile)
    if restored:
        progress = restored.progress
        if progress.data_digest != dataset.digest:
            raise DataError(
                f"the checkpoint was trained on data {progress.data_digest[:12]}, but {dataset.uri} is "
                f"{dataset.digest[:12]}; train under a new --name"
            )
    else:
        scales = measure_scales(config, dataset, train_rows, backbone_class(config).output_stride)
        density_scale = initial.density_scale if initial else scales.density
        progress = Progress(density_scale, scales.count, dataset.digest, world.size)
    progress.world_size = world.size
    counter = build_counter(config, progress.density_scale)
    if not restored:
        load_pretrained(counter, config)
        if initial:
            initial.load_into(counter, config.model.init_sha256)
    if device.type == "cuda":
        if world.size > 1:
            counter = nn.SyncBatchNorm.convert_sync_batchnorm(counter)  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)  # an earlier run of this process has its own peak
    counter.to(device)
    counter.activation_checkpointing = config.numerics.activation_checkpointing
    set_tf32(config.numerics.tf32, device)
    state = TrainState(config, counter, device, world, progress)
    if restored:
        state.best_weights = restored.best_weights
        state.load(restored.weights)
    return state
