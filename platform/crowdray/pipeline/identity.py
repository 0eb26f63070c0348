"""What a run or a study computes, recorded in its folder and compared at every start.

A folder never mixes two different computations: `create_or_verify` refuses a start whose identity differs from the
recorded one. `run.json` (runs) and `study.json` (studies) hold the record.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from crowdray import storage
from crowdray.config import Config, from_json, result_fields
from crowdray.data.shards import Dataset
from crowdray.documents import parse_document, to_document
from crowdray.errors import UserError

Workers = int | tuple[int, int]
"""Number of workers as Ray Train takes it: fixed, or the minimum and maximum of an elastic group."""

_MAX_NAME_BYTES = 200
"""File systems allow 255, of which unfinished folders need some for their prefix."""


@dataclass(frozen=True)
class RunIdentity:
    """Configuration, data, workers and location of a training run, or of all trials of a study."""

    config: Config
    data: str
    """Absolute URI of the dataset."""
    data_digest: str
    """Content digest of the dataset."""
    workers: Workers
    """Number of workers, or (minimum, maximum) of an elastic group."""
    storage: str
    """Absolute URI of the parent folder."""
    name: str
    """Name of the folder in `storage`."""
    backbone_code: str = ""
    """Hash of the code of a user's own backbone; empty for a built-in one."""
    init_file: str = ""
    """URI of the initial weights (pipeline/warm_start.py); empty without model.init."""

    @property
    def uri(self) -> str:
        """The folder of the run or study."""
        return storage.join(self.storage, self.name)

    @property
    def min_workers(self) -> int:
        """Fewest workers that can train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers that train together."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return self.min_workers < self.max_workers

    def create_or_verify(self, path: str, **fixed: Any) -> None:
        """Record the identity at `path`, or check that the record there agrees with it.

        The number of workers and the dataset's location are recorded but may change between starts.

        Args:
            path: URI of the record.
            fixed: Further values to record that must not change.

        Raises:
            UserError: Some values differ; the message lists all of them.
        """
        compared: dict[str, Any] = {"config": result_fields(self.config), "data": {"digest": self.data_digest}} | fixed
        if self.backbone_code:
            compared["backbone"] = self.backbone_code
        if not storage.exists(path):
            data = {"uri": self.data, "digest": self.data_digest}
            content = {"workers": self.workers} | compared | {"config": asdict(self.config), "data": data}
            storage.write_bytes(path, to_document(content, indent=1).encode())
        elif differences := list(_differences(read_identity(path), compared)):
            raise UserError(
                f"{path.rpartition('/')[0]} was started with other values; give another --name, or the recorded "
                "values:\n" + "\n".join(f"  {difference.removeprefix('config.')}" for difference in differences)
            )


def read_identity(path: str) -> dict[str, Any]:
    """Read a recorded identity; fields that the configuration gained since have their defaults."""
    try:
        content = parse_document(storage.read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); start again under another --name") from error
    return content | {"config": asdict(from_json(json.dumps(content.get("config", {})), path))}


def open_verified(identity: RunIdentity, record: str) -> Dataset:
    """Open the dataset of a run on the node of one of its workers.

    Ray checks late, or never, that all nodes see the same folders.

    Args:
        record: File that the driver wrote before the workers started.

    Raises:
        UserError: This node sees another storage folder or another dataset than the driver.
    """
    if not storage.exists(record):
        raise UserError(
            f"{record.rpartition('/')[0]} on this node is not the folder that the run was started with; give "
            "--storage a folder that all nodes share, or a URI such as s3://bucket/runs"
        )
    dataset = Dataset.open(identity.data)
    if dataset.digest != identity.data_digest:
        raise UserError(
            f"the dataset {identity.data} on this node is {dataset.digest[:12]}, the run was started with "
            f"{identity.data_digest[:12]}; give --data a folder that all nodes share, and another --name if the "
            "dataset was converted again"
        )
    return dataset


def parse_workers(value: int | str) -> Workers:
    """Parse --workers, N or MIN:MAX; raises UserError for anything else."""
    if isinstance(value, int):
        return value
    bounds = re.fullmatch(r"(\d+):(\d+)", value, re.ASCII)
    low, high = (int(bounds[1]), int(bounds[2])) if bounds else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"--workers is {value!r}; give a number, or a minimum of at least 1 and a maximum, as in 1:4")
    return low if low == high else (low, high)


def check_name(name: str | None) -> None:
    """Raise UserError for a name that cannot name a folder inside another one."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name is {name!r}; use letters, digits, - _ and ., a letter or digit first")
    if name is not None and len(name.encode()) > _MAX_NAME_BYTES:
        raise UserError(f"--name has {len(name.encode())} bytes; use at most {_MAX_NAME_BYTES}")


def default_name(preset: str, *computed: str | Workers) -> str:
    """Name of a run without --name: the preset and a hash of everything that decides its result.

    The same command therefore gets the same name, and resumes.
    """
    key = json.dumps(computed).encode()
    stem = re.sub(r"[^\w.-]+", "-", preset.rsplit("/", 1)[-1].removesuffix(".json"))[:50].lstrip("-.") or "run"
    return f"{stem}-{hashlib.sha256(key).hexdigest()[:8]}"


def _differences(recorded: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """List values that differ from `given`; in a search space also recorded fields that are not given."""
    for name in {**given, **recorded} if prefix.startswith("space.") else given:
        before, now = recorded.get(name, "missing"), given.get(name, "missing")
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}: recorded {before}, given {now}"
