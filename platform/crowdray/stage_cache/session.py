"""How a training shares its beginning: it starts from the longest stored one, and leaves its states for others."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crowdray import storage
from crowdray.config import Config
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.stage_cache.keys import StageKey, numerics_facts, stage_keys
from crowdray.stage_cache.store import StageStore
from crowdray.storage.lease import Keeper, Lease
from crowdray.training.checkpoint import Checkpoint
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageCacheConfig:
    """Where trainings leave their states for each other, as plain data."""

    uri: str
    """Absolute URI of the stage store."""
    limit_bytes: int
    """How large it may grow."""
    quanta: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Epochs of each stage, by its name, after which a state is kept besides the stage's end."""

    def open(self) -> StageStore:
        """The store itself."""
        return StageStore(self.uri, self.limit_bytes)


@dataclass(frozen=True)
class StageCacheOptions:
    """Location and size of the stage cache, as command-line options."""

    stage_cache: str | None = None
    """Folder or URI of the stage cache, where runs reuse the stages that others trained; by default `stages` in
    --storage. With several nodes, shared by all of them."""
    stage_cache_gib: float = 20.0
    """Maximum size of the stage cache in GiB; the least recently used states are evicted first."""

    def config(self, folder: str) -> StageCacheConfig:
        """Return the stage cache of the runs in `folder`."""
        if not self.stage_cache_gib >= 0:
            raise UserError(f"--stage-cache-gib is {self.stage_cache_gib}; give at least 0")
        uri = storage.resolve(self.stage_cache or storage.join(folder, "stages"))
        return StageCacheConfig(uri, int(self.stage_cache_gib * 2**30))


class StageCacheSession:
    """The stored beginnings of one training."""

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
        self.chains: tuple[StageKey, ...] = stage_keys(
            config, dataset.digest, world.size, numerics_facts(config, device, threads)
        )
        self._shelf, self._world = stage_cache, world
        self._pure = True
        self._store = stage_cache.open()
        self._claims: dict[str, Lease] = {}

    def resume_from(self, own: Checkpoint) -> Checkpoint:
        """A training's own checkpoint, which it goes on from; what other code or other workers began is not shared."""
        self._pure = own.progress.stage_key == self.chains[own.progress.stage].key
        return own

    def restore(self) -> Checkpoint | None:
        """The longest stored beginning, the same on all ranks; None when the training has to start anew.

        Raises UserError where some ranks do not find what others do.
        """
        missed = set()
        while (found := self._world.all_gather([self._store.find(self.chains)])[0]) is not None:
            checkpoint = self._store.load(found)
            loaded = self._world.all_gather([checkpoint is not None])
            if all(loaded):
                return checkpoint
            # It was evicted meanwhile, or damaged and therefore removed: the next longest, then.
            if any(loaded) and found in missed:
                raise UserError(
                    f"the stage store {self._shelf.uri} is not the same folder for all workers; give --stage-cache "
                    "one that all nodes share, or a URI such as s3://bucket/stages"
                )
            missed.add(found)
        return None

    @contextmanager
    def advertise(self, owner: str) -> Iterator[None]:
        """Tell searches that use the store what is trained here, so that their trials wait for it; on rank 0.

        They wait for each stage until its end. Nobody is kept from training: what another trains already is trained
        here too, to the same states. Where the store cannot keep claims apart, nothing is announced.
        """
        with Keeper() as keeper:
            try:
                for chain in self.chains if self._world.rank == 0 and self._pure else ():
                    if (lease := self._store.claim(chain, owner)) is not None:
                        self._claims[chain.stage] = lease
                        keeper.add(lease)
            except UserError as error:
                _log.warning("no search will wait for this training: %s", error)
            yield

    def keep(self, training: Trainer, save: Callable[[Path], None]) -> None:
        """After an epoch, on rank 0: publish the state if the stage ends here or another training may want it.

        A state that is on no chain says so, in what `save` writes too: whoever goes on with it does not share it, were
        it the code or the number of workers that began.
        """
        progress = training.state.progress
        chain, epoch = self.chains[progress.stage], progress.stage_epochs
        progress.stage_key = chain.key if self._pure else ""
        if not self._pure:
            return
        if training.stage_finished or epoch in self._shelf.quanta.get(chain.stage, ()):
            self._store.publish(chain, epoch, save)
        begun = self.chains[: progress.stage + training.stage_finished]
        for lease in [self._claims.pop(ended.stage) for ended in begun if ended.stage in self._claims]:
            lease.release()
