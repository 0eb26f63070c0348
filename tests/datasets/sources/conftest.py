"""Public datasets in small: their tiny copies have fewer and smaller frames than the real ones."""

import pytest

from crowdray.datasets.sources import mall, ucsd, worldexpo

from ...support.builders import HEIGHT, WIDTH

SMALL = [
    (mall, "TRAIN_FRAMES", 4),
    (worldexpo, "SIZE", (HEIGHT, WIDTH)),
    (ucsd, "CLIP_FRAMES", 2),
    (ucsd, "TRAIN_FRAMES", range(7, 15)),
]


@pytest.fixture(autouse=True)
def small_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of 24x32, four training frames of Mall, and clips of two frames of which some are for training."""
    for module, name, value in SMALL:
        monkeypatch.setattr(module, name, value)
