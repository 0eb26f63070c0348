"""Arms of an ablation: what each trains besides the density loss."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from crowdray.config import LossConfig
from crowdray.errors import UserError

TASKS = ("depth", "segmentation", "count")
"""The auxiliary tasks, in the order of the paper's Table 2."""
NONE, ALL, PLACEBO = "none", "all", "placebo"
"""Arms with the density loss alone, with all tasks, and with all tasks on the targets of other images."""


@dataclass(frozen=True)
class Arm:
    """Loss weights of the auxiliary tasks."""

    name: str
    """none, all, placebo, the names of tasks joined by +, or TASK=WEIGHT in a sweep."""
    weights: dict[str, float] = field(hash=False)
    """Loss weight of each task; 0 leaves it out."""
    placebo: bool = False
    """Whether the tasks learn the targets of another image."""


def default_arms(loss: LossConfig) -> list[str]:
    """Return the names of the arms for the tasks that have a weight: none, every subset, all, placebo."""
    tasks = [task for task in TASKS if getattr(loss, task) > 0]
    subsets = ("+".join(names) for size in range(1, len(tasks)) for names in combinations(tasks, size))
    return [NONE, *subsets, ALL, PLACEBO]


def parse_arms(names: Sequence[str], sweeps: Sequence[str], loss: LossConfig) -> tuple[Arm, ...]:
    """Build arms from their names and from sweeps of one weight, in order and without duplicates.

    Args:
        names: Names of arms; their tasks have the weights of `loss`.
        sweeps: Such as "loss.depth=0,0.1,0.2": an arm for each value, in which the other weights are 0.
        loss: Loss weights of the base configuration.

    Raises:
        UserError: An unknown arm or task, or a weight that is not a number from 0 up.
    """
    arms = [_named(name, loss) for name in names] + [arm for sweep in sweeps for arm in _sweep(sweep)]
    return tuple({arm.name: arm for arm in arms}.values())


def _named(name: str, loss: LossConfig) -> Arm:
    tasks = () if name == NONE else TASKS if name in (ALL, PLACEBO) else tuple(name.split("+"))
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(
            f"--arms has {name!r}, and {unknown[0]!r} is not a task; give {NONE}, {ALL}, {PLACEBO}, or tasks joined by "
            f"+ from {', '.join(TASKS)}"
        )
    weights = {task: getattr(loss, task) if task in tasks else 0.0 for task in TASKS}
    named = () if name in (ALL, PLACEBO) else tasks
    if weightless := [task for task in named if not weights[task]]:
        raise UserError(f"--arms has {name!r}, but loss.{weightless[0]} is 0; give --loss.{weightless[0]} a weight")
    if name != NONE and not any(weights.values()):
        raise UserError(f"--arms has {name!r}, but the weights of all tasks are 0; give --loss.depth a weight")
    ordered = name if name in (NONE, ALL, PLACEBO) else "+".join(task for task in TASKS if task in tasks)
    return Arm(ordered, weights, placebo=name == PLACEBO)


def _sweep(option: str) -> Iterator[Arm]:
    field, _, values = option.partition("=")
    task = field.removeprefix("loss.")
    if task not in TASKS:
        raise UserError(f"--sweep is {option!r}; give a loss weight and its values, such as loss.depth=0,0.1,0.2")
    for text in values.split(","):
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(f"--sweep {option} has the value {text!r}; give numbers from 0 up, separated by commas")
        yield Arm(f"{task}={weight:g}" if weight else NONE, dict.fromkeys(TASKS, 0.0) | {task: weight})
