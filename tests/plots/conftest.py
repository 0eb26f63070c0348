"""Fixtures for tests of figures."""

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure

from crowdray.plots import style


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures saved during the test."""
    figures: list[Figure] = []
    real: Callable[..., None] = style.save_figure

    def save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        real(figure, *args, **kwargs)

    monkeypatch.setattr(style, "save_figure", save)
    monkeypatch.setattr("crowdray.plots.overlay.save_figure", save)
    return figures
