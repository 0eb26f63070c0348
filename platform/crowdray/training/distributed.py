"""Rank and size of a process group, and its collectives."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process of a data-parallel group; size 1 needs no process group."""

    rank: int = 0
    """Index of this process."""
    size: int = 1
    """Number of processes."""

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks, on each of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def all_gather(self, items: list[T]) -> list[T]:
        """Return the items of all ranks, in order of rank, on each of them."""
        if self.size == 1:
            return items
        gathered: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]


def pick_device() -> torch.device:
    """Return the first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
