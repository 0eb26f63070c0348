"""Trainers of the debug preset in this process, and what their tests compare and save."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdray.config import Config
from crowdray.data.shards import Dataset
from crowdray.models.counter import Counter
from crowdray.models.initial import InitialWeights
from crowdray.presets import preset
from crowdray.training.checkpoint import MEASURED_METRICS, Checkpoint, EpochMetrics
from crowdray.training.distributed import World
from crowdray.training.trainer import EpochCallback, Trainer

CPU = torch.device("cpu")


def debug_config(**sections: Any) -> Config:
    """The debug preset with other sections; a dict changes the named fields of one."""
    config = preset("debug")
    config = replace(config, sampling=replace(config.sampling, context=16, validation_fraction=0.25))
    changes = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return replace(config, **changes)


def trainer_of(
    dataset: Dataset,
    config: Config | None = None,
    *,
    world: World | None = None,
    restored: Checkpoint | None = None,
    initial: InitialWeights | None = None,
) -> Trainer:
    config = config or debug_config()
    return Trainer(config, dataset, world=world or World(), device=CPU, restored=restored, initial=initial)


def limit_windows(monkeypatch: pytest.MonkeyPatch, limit: int, error: RuntimeError | None = None) -> list[int]:
    """Let forward passes of training fail above `limit` windows; returns the list of all sizes tried."""
    forward, seen = Counter.forward, list[int]()

    def limited(self: Counter, image: torch.Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled():  # validation counts whole images one by one
            seen.append(len(image))
            if len(image) > limit:
                raise error or torch.OutOfMemoryError
        return forward(self, image, *rest)

    monkeypatch.setattr(Counter, "forward", limited)
    return seen


class Interrupted(Exception):
    """The training run has reached the requested epoch."""


def save_epochs(
    folder: Path, on_epoch: Callable[[Callable[[Path], None]], Any] = lambda save: None, last: int | None = None
) -> EpochCallback:
    """A callback that ends every epoch with `on_epoch` and a checkpoint in `folder`/<epoch>, and stops after `last`."""

    def end_epoch(metrics: EpochMetrics, save: Callable[[Path], None]) -> None:
        on_epoch(save)
        path = folder / f"{metrics['epoch']}"
        path.mkdir(parents=True)
        save(path)
        if metrics["epoch"] == last:
            raise Interrupted

    return end_epoch


def computed(history: Sequence[EpochMetrics]) -> list[EpochMetrics]:
    """The history without measured times and memory."""
    return [{name: value for name, value in epoch.items() if name not in MEASURED_METRICS} for epoch in history]


def equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same tensors, to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
