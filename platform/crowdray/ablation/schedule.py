"""Order of the cells of an ablation: a stage that several cells share is trained by one of them first."""

from collections.abc import Mapping, Sequence


def next_cell(waiting: Sequence[str], running: Mapping[str, int], stages: Mapping[str, Sequence[str]]) -> str | None:
    """Choose the next cell to start: the first that shares no unfinished stage with a running one.

    Args:
        waiting: Names of the cells to start, in order of preference.
        running: Number of finished stages of each running cell.
        stages: Stage keys of each cell, in order.

    Returns:
        The name of a cell; None if all have to wait, or none is left.
    """
    in_progress = {key for name, finished in running.items() for key in stages[name][finished:]}
    return next((name for name in waiting if in_progress.isdisjoint(stages[name])), None)
