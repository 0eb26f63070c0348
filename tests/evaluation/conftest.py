"""What tests of pictures share."""

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure

from crowdray.evaluation import canvas


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved while the test ran."""
    seen: list[Figure] = []
    real: Callable[..., None] = canvas.save_figure

    def save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        seen.append(figure)
        real(figure, *args, **kwargs)

    monkeypatch.setattr(canvas, "save_figure", save)
    monkeypatch.setattr("crowdray.evaluation.overlay.save_figure", save)
    return seen
