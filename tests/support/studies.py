"""Studies for tests of the search."""

import dataclasses
from pathlib import Path
from typing import Any

from crowdray.config import StagesConfig
from crowdray.pipeline.identity import RunIdentity
from crowdray.presets import preset
from crowdray.tune.options import SearchOptions
from crowdray.tune.space import default_space
from crowdray.tune.study import Study


def make_study(
    folder: Path,
    *,
    joint: int = 4,
    workers: int = 1,
    data: str = "data",
    digest: str = "d" * 64,
    threads: int = 1,
    **options: Any,
) -> Study:
    """A study over the default space around the debug preset, whose stages have 4 epochs, the last one `joint`."""
    config, lengths = preset("debug"), {"joint": joint}
    stages = {
        name: dataclasses.replace(stage, epochs=lengths.get(name, 4)) for name, stage in vars(config.stages).items()
    }
    numerics = dataclasses.replace(config.numerics, threads=threads)
    config = dataclasses.replace(config, stages=StagesConfig(**stages), numerics=numerics)
    identity = RunIdentity(config, data, digest, workers, str(folder), "study")
    return Study(identity, default_space(config), SearchOptions(**options))
