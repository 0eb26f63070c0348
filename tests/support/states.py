"""Small checkpoints in a stage store."""

import torch

from crowdray.config import Config
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import StageStore
from crowdray.training.checkpoint import BestEpoch, Checkpoint, Progress, save_checkpoint

from .trainers import equal_tensors

UNLIMITED = 10**9
BASELINE = StageKey("a" * 32, "baseline", 10)
DECODERS = StageKey("b" * 32, "decoders", 4)


def checkpoint(number: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(number)
    weights = {"encoder.w": torch.randn(300, 4, generator=generator), "b": torch.full((5,), float(number))}
    progress = Progress(1.5, 2.5, "data", 1, stage_epochs=number, best={"baseline": BestEpoch(number, 1.0, 2.0)})
    moments = {"0.momentum": torch.randn(7, generator=generator)}
    return Checkpoint(Config(seed=number), progress, weights, weights, moments, {"baseline": weights})


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    def tensors(saved: Checkpoint) -> dict[str, torch.Tensor]:
        named = {"weights": saved.weights, "average": saved.ema, "optimizer": saved.optimizer, **saved.best_weights}
        return {f"{group} {name}": value for group, values in named.items() for name, value in values.items()}

    if one is None or (one.config, one.progress) != (other.config, other.progress):
        return False
    return equal_tensors(tensors(one), tensors(other))


def publish(store: StageStore, key: StageKey, epoch: int, number: int | None = None) -> tuple[StageKey, int]:
    """Store the checkpoint of a number, by default the epoch."""
    made = checkpoint(epoch if number is None else number)
    store.publish(key, epoch, lambda folder: save_checkpoint(made, folder))
    return key, epoch


def stored(store: StageStore, key: StageKey = BASELINE) -> dict[int, int]:
    """The number of the checkpoint of each stored epoch; fails unless all are whole."""
    numbers = {}
    for epoch in store.epochs(key):
        loaded = store.load(key, epoch)
        assert loaded is not None and same(loaded, checkpoint(loaded.config.seed)), f"epoch {epoch} is torn"
        numbers[epoch] = loaded.config.seed
    return numbers
