"""A training run's use of the stage cache: it resumes from the longest stored prefix and stores its own states."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crowdray.config import Config
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.stage_cache.keys import numerics_facts, stage_keys
from crowdray.stage_cache.store import StageStore
from crowdray.training.checkpoint import Checkpoint
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer


@dataclass(frozen=True)
class StageCacheConfig:
    """Location and content of the stage cache, as plain data."""

    uri: str
    """Absolute URI of the stage store."""
    limit_bytes: int
    """Size beyond which idle states are evicted."""
    snapshot_epochs: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Epochs of each stage, by name, after which a state is stored in addition to the stage's end."""

    def open(self) -> StageStore:
        """Open the store."""
        return StageStore(self.uri, self.limit_bytes)


class StageCacheSession:
    """The stage cache as seen by one rank of a training run."""

    def __init__(
        self,
        stage_cache: StageCacheConfig,
        config: Config,
        dataset: Dataset,
        *,
        world: World,
        device: torch.device,
        threads: int,
    ) -> None:
        self.stage_keys = stage_keys(config, dataset.digest, world.size, numerics_facts(config, device, threads))
        self._config, self._store, self._world = stage_cache, stage_cache.open(), world
        self._has_key = True

    def resume_from(self, own: Checkpoint) -> Checkpoint:
        """Resume from the run's own checkpoint; if other code or another number of workers wrote it, store no state."""
        self._has_key = own.progress.stage_key == self.stage_keys[own.progress.stage].key
        return own

    def restore(self) -> Checkpoint | None:
        """Load the longest stored prefix, the same on all ranks; None if there is none.

        Raises:
            UserError: The ranks see different stores.
        """
        missed = set()
        while (found := self._world.all_gather([self._store.find(self.stage_keys)])[0]) is not None:
            checkpoint = self._store.load(*found)
            loaded = self._world.all_gather([checkpoint is not None])
            if all(loaded):
                return checkpoint
            # It was evicted meanwhile, or was damaged and therefore removed: try the next longest.
            if any(loaded) and found in missed:
                raise UserError(
                    f"the stage cache {self._config.uri} is not the same folder for all workers; give --stage-cache "
                    "one that all nodes share, or a URI such as s3://bucket/stages"
                )
            missed.add(found)
        return None

    def save(self, trainer: Trainer, save: Callable[[Path], None]) -> None:
        """Store the state after an epoch, on rank 0, at the end of a stage and at the configured epochs.

        A state that no key describes is marked so, also in what `save` writes: whatever resumes from it is not stored.
        """
        progress = trainer.state.progress
        key, epoch = self.stage_keys[progress.stage], progress.stage_epochs
        progress.stage_key = key.key if self._has_key else ""
        wanted = trainer.stage_finished or epoch in self._config.snapshot_epochs.get(key.stage, ())
        if self._has_key and wanted:
            self._store.publish(key, epoch, save)
