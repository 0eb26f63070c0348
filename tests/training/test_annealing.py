"""The annealed end of a stage: its learning rates, its result, and resuming inside it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdray.config import Config, OptimizerConfig, StageConfig
from crowdray.data.shards import Dataset
from crowdray.evaluation.metrics import Metrics
from crowdray.training.checkpoint import load_checkpoint
from crowdray.training.result import final_result

from ..support.trainers import computed, debug_config, equal_tensors, save_epochs, trainer_of


def annealed_config(**optimizer: Any) -> Config:
    """The debug preset with four epochs in the joint stage, the last two of them annealed."""
    config = debug_config(optimizer=OptimizerConfig(name="adamw", **optimizer))
    joint = StageConfig(epochs=4, learning_rate=1e-3, anneal_epochs=2)
    return replace(config, stages=replace(config.stages, joint=joint))


def metrics(mae: float) -> Metrics:
    return Metrics(images=1, mae=mae, rmse=mae, bias=0.0, nae=0.0, mae_unmasked=mae)


def test_fit_with_annealing_lowers_the_rate_linearly_to_zero(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error never falls: a stage without annealing would halve its rate after each epoch."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *rest: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    trainer = trainer_of(discs, annealed_config(warmup=0, plateau_patience=0, plateau_factor=0.5))
    monkeypatch.setattr(trainer, "validate", lambda autocast: metrics(1.0))
    trainer.fit()
    steps = trainer.loader.steps()
    constant, falling = [1e-3] * 2 * steps, [1e-3 * left / (2 * steps) for left in range(2 * steps, 0, -1)]
    assert rates[-4 * steps :] == pytest.approx(constant + falling)


def test_fit_with_annealing_exports_the_last_epoch_although_others_were_better(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(discs, annealed_config(ema_decay=0.0))
    validate, errors = trainer.validate, iter(range(100))
    monkeypatch.setattr(trainer, "validate", lambda autocast: metrics(float(next(errors))))
    trainer.fit()
    exported = trainer.state.counter.strip().state_dict()
    assert equal_tensors(trainer.state.best_weights["joint"], exported)
    assert trainer.state.progress.best["baseline"].epoch == 1
    monkeypatch.setattr(trainer, "validate", validate)
    assert final_result(trainer).best_stage == "joint"


def test_fit_resumed_inside_annealing_equals_unbroken_run(discs: Dataset, tmp_path: Path) -> None:
    unbroken = trainer_of(discs, annealed_config())
    unbroken.fit(save_epochs(tmp_path))
    for epoch in (5, 6, 7):
        resumed = trainer_of(discs, annealed_config(), restored=load_checkpoint(tmp_path / str(epoch)))
        resumed.fit()
        assert computed(resumed.state.progress.history) == computed(unbroken.state.progress.history)
        assert equal_tensors(resumed.state.best_weights["joint"], unbroken.state.best_weights["joint"])
