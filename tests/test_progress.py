"""What a training's display warns of."""

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from crowdray.cluster.progress import TrainingDisplay
from crowdray.config import StageConfig, StagesConfig
from crowdray.data.shards import Dataset
from crowdray.models.counter import DENSITY
from crowdray.presets import preset
from crowdray.training.loop import Training
from crowdray.training.world import World


@pytest.mark.parametrize("dead", [False, True])
def test_a_dead_density_map_is_warned_of(discs: Dataset, dead: bool) -> None:
    stages = StagesConfig(StageConfig(1, 1e-9), StageConfig(0, 1e-3), StageConfig(0, 1e-3))
    config = preset("debug")
    sampling = dataclasses.replace(config.sampling, validation_fraction=0.25)
    config = dataclasses.replace(config, sampling=sampling, stages=stages)
    run = Training(config, discs, world=World(), device=torch.device("cpu"))
    if dead:
        torch.nn.init.constant_(run.counter.get_parameter(f"decoders.{DENSITY}.conv.bias"), -1e4)
    run.run()
    said = io.StringIO()
    TrainingDisplay(run.stages, Console(file=said)).history(run.progress.history)
    assert ("the density map is dead" in said.getvalue()) == dead
