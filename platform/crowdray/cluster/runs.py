"""The folder of a run in --storage: what it was started with, what it trained, what came out of it.

run.json           the configuration, the data and the workers; a run under the same name has to have the
same config.json        the configuration alone, itself valid for --preset checkpoint-*/      the last two
checkpoints (Ray Train's) trained/           weights and result of the finished training, result.json last
model/             the packaged counter overview.png       what it sees outcome.json       everything
together; written last
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crowdray import storage
from crowdray.config import Config, to_json
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.training.checkpoint import load_checkpoint

IDENTITY = "run.json"
RESULT = "result.json"
"""The file that stands for a finished training: it is published last."""
OUTCOME = "outcome.json"
RAY_LIST = "checkpoint_manager_snapshot.json"
"""The list of checkpoints that Ray Train keeps."""


@dataclass(frozen=True)
class Run:
    """One training: what is computed, from what, by how many workers, and where it is kept."""

    config: Config
    data: str
    """Absolute URI of the dataset."""
    digest: str
    """Its identity."""
    workers: int
    """Number of workers."""
    storage: str
    """Absolute URI of the folder that holds all runs."""
    name: str
    """Name of the run."""

    @property
    def uri(self) -> str:
        """The run's own folder."""
        return storage.join(self.storage, self.name)

    @property
    def trained(self) -> str:
        """Folder of the finished training."""
        return storage.join(self.uri, "trained")

    @property
    def model(self) -> str:
        """Folder of the packaged counter."""
        return storage.join(self.uri, "model")

    @property
    def outcome(self) -> str:
        """File that says what came out; it is there when everything is done."""
        return storage.join(self.uri, OUTCOME)

    def claim(self) -> None:
        """Write down what the run is, or check that its folder belongs to this very run.

        Raises UserError with what differs. The number of workers may differ: a training goes on with another
        one.
        """
        place = storage.join(self.uri, IDENTITY)
        identity = {"config": asdict(self.config), "data": {"uri": self.data, "digest": self.digest}}
        if storage.exists(place):
            there = _parse(place)
            differences = list(_differences(there.get("config", {}), identity["config"]))
            if (digest := there.get("data", {}).get("digest")) != self.digest:
                differences.append(f"the data's digest is {str(digest)[:12]} there, {self.digest[:12]} here")
            if differences:
                raise UserError(
                    f"the run {self.uri} was started with something else; train under another --name, or give what it "
                    "was started with:\n" + "\n".join(f"  {difference}" for difference in differences)
                )
            return
        storage.write_bytes(storage.join(self.uri, "config.json"), to_json(self.config).encode())
        storage.write_bytes(place, (json.dumps(identity | {"workers": self.workers}, indent=1) + "\n").encode())

    def mend(self) -> str | None:
        """Remove Ray's list of checkpoints if a kill cut it off, and give the newest whole one that is there.

        Ray writes its list in place, and refuses to start over half of one. Object stores only know whole files.
        """
        listed = storage.join(self.uri, RAY_LIST)
        if not storage.is_local(self.uri) or not storage.exists(listed):
            return None
        with suppress(ValueError):
            json.loads(storage.read_bytes(listed))
            return None
        storage.remove(listed)
        for folder in sorted(Path(self.uri).glob("checkpoint-*"), reverse=True):
            with suppress(DataError):
                load_checkpoint(folder)
                return str(folder)
        return None


def plan(config: Config, data: str, workers: int, folder: str, name: str | None, preset: str) -> Run:
    """The run of a command; without a name it is called after its preset and a hash of all that it computes.

    Raises UserError for data that is none, and for a name that is no name of a folder.
    """
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name is {name!r}; use letters, digits, - _ and .")
    dataset = Dataset.open(data)
    chosen = name or default_name(preset, config, dataset.digest, workers)
    return Run(config, dataset.uri, dataset.digest, workers, storage.resolve(folder), chosen)


def default_name(preset: str, config: Config, digest: str, workers: int) -> str:
    """The name of a run that was given none: the same command gets the same one, and so goes on where it
    stopped."""
    key = json.dumps([to_json(config), digest, workers]).encode()
    stem = preset.rsplit("/", 1)[-1].removesuffix(".json")
    return f"{stem}-{hashlib.sha256(key).hexdigest()[:8]}"


def _parse(place: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read_bytes(place))
    except ValueError as error:
        raise UserError(f"{place} is damaged ({error}); train under another --name") from error
    return content if isinstance(content, dict) else {}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in here:
        if isinstance(here[name], Mapping):
            yield from _differences(there.get(name, {}), here[name], f"{prefix}{name}.")
        elif there.get(name, dataclasses.MISSING) != here[name]:
            yield f"{prefix}{name} is {there.get(name, 'missing')} there, {here[name]} here"
