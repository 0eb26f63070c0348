"""What tests of pictures share."""

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure

from crowdray.plots import style


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved while the test ran."""
    seen: list[Figure] = []
    real: Callable[..., None] = style.save_figure

    def save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        seen.append(figure)
        real(figure, *args, **kwargs)

    monkeypatch.setattr(style, "save_figure", save)
    monkeypatch.setattr("crowdray.plots.overlay.save_figure", save)
    return seen
