"""The folder of a run in --storage: what it was started with, what it trained, what came out of it.

- run.json: the configuration, the data and the workers; a run under the same name has to have the same.
- config.json: the configuration alone, itself valid for --preset.
- checkpoint-*/: the last two checkpoints.
- trained/: weights and result of the finished training, result.json last.
- model/: the packaged counter.
- overview.png: what it sees.
- outcome.json: everything together; written last.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crowdray import storage
from crowdray.config import Config, from_json, result_fields, to_json
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.models.build import backbone_class
from crowdray.models.pretrained import pin_weights
from crowdray.stage_cache.keys import backbone_digest
from crowdray.training.checkpoint import load_checkpoint

IDENTITY = "run.json"
RESULT = "result.json"
"""The file that stands for a finished training: it is published last."""
OUTCOME = "outcome.json"
RAY_LIST = "checkpoint_manager_snapshot.json"
"""The list of checkpoints that Ray Train keeps."""

Workers = int | tuple[int, int]
"""How many train together, as Ray Train takes it: a number, or the fewest and the most, between which it follows the
cluster."""


@dataclass(frozen=True)
class Run:
    """One training: what is computed, from what, by how many workers, and where it is kept."""

    config: Config
    data: str
    """Absolute URI of the dataset."""
    digest: str
    """Its identity."""
    workers: Workers
    """Number of workers."""
    storage: str
    """Absolute URI of the folder that holds all runs."""
    name: str
    """Name of the run."""
    backbone: str = ""
    """Hash of the code that its backbone brings."""

    @property
    def fewest(self) -> int:
        """Workers without which it does not train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Workers that it has at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return self.fewest < self.most

    @property
    def uri(self) -> str:
        """The run's own folder."""
        return storage.join(self.storage, self.name)

    @property
    def identity(self) -> str:
        """File that says what the run is; it is there from the run's beginning."""
        return storage.join(self.uri, IDENTITY)

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

    def batch_there(self) -> int | None:
        """The batch with which a run in this folder was begun; None where none was."""
        if not storage.exists(self.identity):
            return None
        batch = _parse(self.identity).get("config", {}).get("sampling", {}).get("batch")
        return batch if isinstance(batch, int) else None

    def claim(self) -> None:
        """Write down what the run is, or check that its folder belongs to this very run.

        Raises UserError with what differs. The number of workers may differ: a training goes on with another
        one.
        """
        identity: dict[str, Any] = {"config": result_fields(self.config), "data": {"digest": self.digest}}
        if self.backbone:
            identity["backbone"] = self.backbone
        if not storage.exists(self.identity):
            storage.write_bytes(storage.join(self.uri, "config.json"), to_json(self.config).encode())
        data = {"uri": self.data, "digest": self.digest}
        claim_file(
            self.identity, identity, identity | {"config": asdict(self.config), "data": data, "workers": self.workers}
        )

    def mend(self) -> str | None:
        """Remove what a kill cut off, and give the newest whole checkpoint if Ray's list of them was among it.

        Ray writes its list in place, and refuses to start over half of one. Object stores only know whole files.
        """
        if not storage.is_local(self.uri):
            return None
        for half in Path(self.uri).glob(f"{storage.PARTIAL}*-checkpoint-*"):
            shutil.rmtree(half, ignore_errors=True)
        listed = storage.join(self.uri, RAY_LIST)
        if not storage.exists(listed):
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


def open_as_begun(data: str, digest: str, begun: str) -> Dataset:
    """The dataset of a training, opened on the node of one of its workers.

    begun: file that the driver has written. Raises UserError where this node sees another folder than the driver, or
    another dataset: Ray looks into that late, or never.
    """
    if not storage.exists(begun):
        raise UserError(
            f"{begun.rpartition('/')[0]} on this node is not the folder that the training was started with; give "
            "--storage one that all nodes share, or a URI such as s3://bucket/runs"
        )
    dataset = Dataset.open(data, verify=True)
    if dataset.digest != digest:
        raise UserError(
            f"the dataset {data} on this node is {dataset.digest[:12]}, the training was started with {digest[:12]}; "
            "give --data one that all nodes share, and give another --name if it was converted again"
        )
    return dataset


def workers_of(said: int | str) -> Workers:
    """What --workers says: N, or MIN:MAX. Raises UserError for what is neither."""
    if isinstance(said, int):
        return said
    ends = re.fullmatch(r"(\d+):(\d+)", said, re.ASCII)
    fewest, most = (int(ends[1]), int(ends[2])) if ends else (0, 0)
    if not 1 <= fewest <= most:
        raise UserError(f"--workers is {said!r}; give a number, or the fewest, at least 1, and the most, as in 1:4")
    return fewest if fewest == most else (fewest, most)


def plan(
    config: Config, data: str, workers: Workers, folder: str, name: str | None, preset: str, *, measured: bool = False
) -> Run:
    """The run of a command; without a name it is called after its preset and a hash of all that it computes.

    measured: whether its batch is still to be measured; the name has to be the same before and after.
    Raises UserError for data that is none, a name that is no name of a folder, a backbone that is none, and published
    weights that are not there.
    """
    check_name(name)
    source, config = backbone_digest(backbone_class(config)), pin_weights(config)
    dataset = Dataset.open(data)
    further = filter(None, [source, "batch auto" if measured else ""])
    chosen = name or default_name(preset, to_json(config), dataset.digest, workers, *further)
    return Run(config, dataset.uri, dataset.digest, workers, storage.resolve(folder), chosen, source)


def check_name(name: str | None) -> None:
    """Raise UserError for a name that is no name of a folder."""
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name is {name!r}; use letters, digits, - _ and .")


def default_name(preset: str, *computed: str | Workers) -> str:
    """The name of what was given none, from all that is computed: the same command gets the same one, and so goes
    on where it stopped."""
    key = json.dumps(computed).encode()
    stem = preset.rsplit("/", 1)[-1].removesuffix(".json")
    return f"{stem}-{hashlib.sha256(key).hexdigest()[:8]}"


def claim_file(place: str, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write down in a file what its folder belongs to, or check that what lies there agrees with `identity`.

    Raises UserError with all that differs.
    """
    if not storage.exists(place):
        storage.write_bytes(place, (json.dumps(content, indent=1) + "\n").encode())
    elif differences := list(_differences(_as_of_now(_parse(place), place), identity)):
        raise UserError(
            f"{place.rpartition('/')[0]} was started with something else; give another --name, or what it was started "
            "with:\n" + "\n".join(f"  {difference.removeprefix('config.')}" for difference in differences)
        )


def _as_of_now(content: dict[str, Any], place: str) -> dict[str, Any]:
    """What was written down, with the fields that a configuration has got since: until then all had their default."""
    return content | {"config": asdict(from_json(json.dumps(content.get("config", {})), place))}


def _parse(place: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read_bytes(place))
    except ValueError as error:
        raise UserError(f"{place} is damaged ({error}); train under another --name") from error
    return content if isinstance(content, dict) else {}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What is not as `here` asks; of a space also what is only there."""
    for name in {**here, **there} if prefix.startswith("space.") else here:
        before, now = there.get(name, "missing"), here.get(name, "missing")
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name} is {before} there, {now} here"
