"""BatchNorm's statistics belong to the averaged weights that are validated and exported."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from crowdray.config import ModelConfig, NumericsConfig, StageConfig, StagesConfig
from crowdray.data.shards import Dataset

from ..support.backbones import SMALL
from ..support.trainers import debug_config, equal_tensors, trainer_of


@pytest.mark.parametrize("anneal_epochs", [0, 1])
def test_exported_batch_norm_statistics_are_those_of_the_exported_weights(discs: Dataset, anneal_epochs: int) -> None:
    """The first layer's: mean and variance of its input over the windows of the next epoch, without augmentation."""
    stages = StagesConfig(StageConfig(2, 1e-3, anneal_epochs=anneal_epochs), StageConfig(0, 1e-3), StageConfig(0, 1e-3))
    config = debug_config(stages=stages, model=ModelConfig(SMALL, "pooled"), numerics=NumericsConfig(precision="fp32"))
    trainer = trainer_of(
        discs, replace(config, sampling=replace(config.sampling, scale=0.5, brightness=0.2, colour=0.2))
    )
    trainer.fit()
    epoch = trainer.state.progress.best["baseline"].epoch
    counter = trainer.best_counter("baseline")
    convolution, norm = counter.encoder.get_submodule("blocks.0.0"), counter.encoder.get_submodule("blocks.0.1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    means, variances = [], []
    with torch.no_grad():
        for batch in trainer_of(discs, config).loader.epoch(epoch + 1):
            values = convolution((batch.augmented_images() - counter.mean) / counter.std)
            means.append(values.mean((0, 2, 3)))
            variances.append(values.var((0, 2, 3)))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))


def test_annealed_decoders_stage_changes_no_statistics_of_the_frozen_encoder(discs: Dataset) -> None:
    stages = StagesConfig(StageConfig(1, 1e-3), StageConfig(2, 1e-3, anneal_epochs=1), StageConfig(0, 1e-3))
    trainer = trainer_of(discs, debug_config(stages=stages, model=ModelConfig(SMALL, "pooled")))
    trainer.fit()
    assert equal_tensors(trainer.state.counter.strip().state_dict(), trainer.state.best_weights["baseline"])
