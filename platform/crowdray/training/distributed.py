"""The processes that train together, as plain data, and what they have to agree on."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among those that train together. With size 1 no process group is needed."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """Number of processes."""

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Mean of a tensor over all processes, the same on each."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def all_gather(self, items: list[T]) -> list[T]:
        """All processes' items, the same list on each."""
        if self.size == 1:
            return items
        gathered: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]


def local_world() -> World:
    """The world of torch's process group, where one was started."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def pick_device() -> torch.device:
    """The device of this process when nobody assigned one: the first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
