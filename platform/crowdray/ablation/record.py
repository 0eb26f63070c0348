"""The published record of an ablation: its numbers, and what makes them repeatable.

A record is one JSON file of some kB in results/, written by jobs/ablate.py. Counts of single images remain in the
folder of the ablation.
"""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Self

from crowdray import storage
from crowdray.ablation.summary import ArmSummary
from crowdray.documents import parse_as, parse_document, to_document
from crowdray.errors import DataError

FORMAT = 1
"""Version of the record; a reader accepts its own and all lower ones."""
LIBRARIES = ("torch", "ray", "numpy", "scipy", "pytorch-optimizer", "pillow", "simplejpeg")
"""Distributions whose versions are recorded."""


@dataclass(frozen=True)
class Machine:
    """Where the runs were trained."""

    device: str
    """Name of the GPU, or of the processor."""
    cores: int
    """CPU cores of the driver's machine."""
    python: str
    """Version of Python."""
    packages: dict[str, str]
    """Versions of LIBRARIES."""

    @classmethod
    def current(cls, gpu: str = "") -> Self:
        """Describe this machine; `gpu` is the name of the GPU that was used, if any."""
        packages = {name: version(name) for name in LIBRARIES}
        return cls(gpu or _processor(), os.cpu_count() or 1, platform.python_version(), packages)


@dataclass(frozen=True)
class TestRead:
    """One read of the test split."""

    __test__ = False  # for pytest, not a test

    time: str
    """When it started, ISO 8601 in UTC."""
    revision: str
    """Git revision of the code."""
    cells: int
    """Number of training runs that it evaluated."""
    reason: str
    """Why the split was read again; empty for the first read."""


@dataclass(frozen=True)
class AblationRecord:
    """Result of an ablation."""

    name: str
    """Its name; that of the file."""
    dataset: str
    """Name of the dataset."""
    data_digest: str
    """Content digest of the dataset."""
    split: str
    """Split of the errors: test, or validation for a dataset without one."""
    block: int
    """Number of consecutive images that the bootstrap resampled together."""
    preset: str
    """Preset that the configuration started from."""
    config: dict[str, Any]
    """The base configuration; arms change its loss weights."""
    command: str
    """The command that wrote the record."""
    revision: str
    """Git revision of the code."""
    date: str
    """Date of the record, ISO 8601."""
    machine: Machine
    """Where it was trained."""
    test_reads: tuple[TestRead, ...]
    """Reads of the test split by this ablation."""
    other_reads: int
    """Number of other ablations in the same storage folder that had read the test split of this dataset."""
    arms: tuple[ArmSummary, ...]
    """Errors of each arm."""

    @property
    def has_sweep(self) -> bool:
        """Whether some arms are values of a sweep."""
        return any("=" in arm.arm for arm in self.arms)

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return to_document({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: bytes | str, uri: str) -> Self:
        """Parse the text of `to_json`.

        Raises:
            DataError: It is damaged, or was written by a later version; the message names `uri`.
        """
        try:
            content = parse_document(text)
            if (number := content.pop("format", None)) not in range(1, FORMAT + 1):
                raise ValueError(f"its format is {number}, this version of crowdray reads up to {FORMAT}")
            return parse_as(cls, content)
        except ValueError as error:
            raise DataError(f"{uri} is not a record of an ablation ({error}); write it with jobs/ablate.py") from error


def write_record(record: AblationRecord, folder: str) -> str:
    """Write a record into a folder and return its URI."""
    uri = storage.join(folder, f"{record.name}.json")
    storage.write_bytes(uri, record.to_json().encode())
    return uri


def read_records(folder: str) -> list[AblationRecord]:
    """Read all records of a folder, ordered by dataset and name; raise DataError for one that is damaged."""
    names = [file.name for file in storage.find_files(folder, depth=1) if file.name.endswith(".json")]
    uris = [storage.join(folder, name) for name in names]
    records = [AblationRecord.from_json(storage.read_bytes(uri), uri) for uri in uris]
    return sorted(records, key=lambda record: (record.dataset, record.name))


def _processor() -> str:
    """Name of the processor, where the system says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
