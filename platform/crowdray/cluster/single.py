"""A training run in this very process, which resumes from the stage cache and stores its states there."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from crowdray.config import Config
from crowdray.models.counter import COUNT
from crowdray.pipeline.identity import RunIdentity, open_verified
from crowdray.pipeline.warm_start import read_init
from crowdray.stage_cache.session import StageCacheConfig, StageCacheSession
from crowdray.training.checkpoint import Checkpoint, EpochMetrics
from crowdray.training.distributed import World, pick_device
from crowdray.training.trainer import Trainer

HistoryCallback = Callable[[Sequence[EpochMetrics]], None]


def train_single(
    config: Config,
    identity: RunIdentity,
    identity_file: str,
    stage_cache: StageCacheConfig,
    *,
    use_gpu: bool,
    on_start: HistoryCallback,
    on_epoch: HistoryCallback,
) -> Trainer:
    """Train a run to its end with one worker: this process, with config.numerics.threads threads.

    Args:
        config: The configuration.
        identity: Dataset, location and initial weights of the study or ablation that the run belongs to.
        identity_file: Its record.
        stage_cache: Where runs share the states of their stages.
        use_gpu: Whether this process has a GPU.
        on_start: Receives the epochs that the stage cache held, before training starts.
        on_epoch: Receives all epochs so far, after each.

    Returns:
        The trainer of the finished run.
    """
    threads = config.numerics.threads
    torch.set_num_threads(threads)
    dataset, device = open_verified(identity, identity_file), single_device(use_gpu)
    session = StageCacheSession(stage_cache, config, dataset, world=World(), device=device, threads=threads)
    restored = session.restore()
    initial = read_init(identity.init_file) if restored is None and config.model.init else None
    trainer = Trainer(config, dataset, world=World(), device=device, restored=restored, initial=initial)
    on_start(trainer.state.progress.history)

    def report(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        session.save(trainer, save)
        on_epoch(trainer.state.progress.history)

    trainer.fit(report)
    return trainer


def single_device(use_gpu: bool) -> torch.device:
    """Device of a run in this process; a GPU may be visible that it did not reserve."""
    return pick_device() if use_gpu else torch.device("cpu")


def final_checkpoint(trainer: Trainer) -> Checkpoint:
    """Return the weights that a finished run publishes: the best ones of each stage, and for the figures the maps of
    the auxiliary decoders. The count decoder, often the largest, has none."""
    state, exported = trainer.state, trainer.state.counter.strip().state_dict()
    maps = {
        name: tensor
        for name, tensor in state.counter.state_dict().items()
        if name not in exported and not name.startswith(f"decoders.{COUNT}.")
    }
    return Checkpoint(state.config, state.progress, maps, best_weights=state.best_weights)
