"""Options of the stage cache; importing them does not import torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from crowdray import storage
from crowdray.errors import UserError

if TYPE_CHECKING:
    from crowdray.stage_cache.session import StageCacheConfig


@dataclass(frozen=True)
class StageCacheOptions:
    """Location and size of the stage cache, as command-line options."""

    stage_cache: str | None = None
    """Folder or URI of the stage cache, where runs reuse the stages that others trained; by default `stages` in
    --storage. With several nodes, shared by all of them."""
    stage_cache_gib: float = 20.0
    """Size of the stage cache in GiB beyond which the least recently used states are evicted; states used within the
    last hour are kept."""

    def config(self, folder: str) -> "StageCacheConfig":
        """Return the stage cache of the runs in `folder`."""
        from crowdray.stage_cache.session import StageCacheConfig

        if not self.stage_cache_gib >= 0:
            raise UserError(f"--stage-cache-gib is {self.stage_cache_gib}; give at least 0")
        uri = storage.resolve(self.stage_cache or storage.join(folder, "stages"))
        return StageCacheConfig(uri, int(self.stage_cache_gib * 2**30))
