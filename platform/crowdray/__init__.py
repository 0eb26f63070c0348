"""Train, tune and publish crowd counters on a Ray cluster.

`crowdray.load`, `count`, `predict`, `train` and `convert` are the Python interface, see `crowdray.api`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crowdray.api import convert, count, load, predict, train

__version__ = "0.1.0"

__all__ = ["__version__", "convert", "count", "load", "predict", "train"]


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is used first."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("crowdray.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
