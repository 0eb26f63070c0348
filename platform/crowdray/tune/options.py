"""Options of a search; importing them does not import torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SearchOptions:
    """What to search, and where to store it: options of a job."""

    space: str | None = None
    """JSON file that changes the search space: {"target.sigma": {"low": 2, "high": 6}, "loss.count": null}."""
    vary: tuple[str, ...] = ()
    """The same for single fields, as in --vary 'target.sigma={"low": 2, "high": 6}' 'loss.count=null'."""
    objectives: Literal["mae", "mae+rmse"] = "mae"
    """Validation error to minimize, or both; in either case the trial with the lowest MAE is published."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: tree-structured Parzen estimator, which learns from earlier trials; random: random search."""
    prune: bool = True
    """Stop unpromising trials at equal epochs of the joint stage; with two objectives none is stopped."""
    workers: int | str = 1
    """Workers that train one trial together, the same number in all trials."""
    storage: str = "runs"
    """Folder or URI for the study and its best trial; on several nodes one that all of them reach."""
    database: str | None = None
    """URL of a database for Optuna's record, such as postgresql://...; default: a journal in the study's folder."""
    name: str | None = None
    """Name of the study; default: the preset's, with a hash of everything that decides the search."""
