"""The record of reads of the test split: a protocol reads it once, at its end."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Self

from crowdray import storage
from crowdray.documents import parse_as, parse_document, to_document
from crowdray.errors import DataError, UserError

TEST_READ_FILE = "test-read.json"


@dataclass(frozen=True)
class Read:
    """One read of the test split."""

    time: str
    """When it started, ISO 8601 in UTC."""
    revision: str
    """Git revision of the code."""
    command: str
    """The command that read it."""
    cells: tuple[str, ...]
    """Names of the cells that it evaluates."""
    reason: str = ""
    """Why it was read again; empty for the first read."""


@dataclass(frozen=True)
class ReadLog:
    """All reads of the test split by one protocol, stored before each of them."""

    digest: str
    """Digest of the dataset."""
    reads: tuple[Read, ...] = field(default=())

    @classmethod
    def load(cls, uri: str, digest: str) -> Self:
        """Load the record; without one, the test split was not read yet."""
        content = storage.read_bytes_or_none(uri)
        if content is None:
            return cls(digest)
        try:
            return parse_as(cls, parse_document(content))
        except ValueError as error:
            raise DataError(f"{uri} is damaged ({error}); start again under another --name") from error

    def save(self, uri: str) -> None:
        """Store the record."""
        storage.write_bytes(uri, to_document(asdict(self), indent=1).encode())

    def check(self, cells: Sequence[str], reason: str, uri: str) -> bool:
        """Check whether these cells may be evaluated on the test split.

        Args:
            cells: Names of all cells of the protocol.
            reason: Why the test split is read again; empty unless the user gave one.
            uri: The protocol's folder, for the message.

        Returns:
            Whether that is a read to record; a read that was interrupted is completed.

        Raises:
            UserError: The test split was read for other cells, and no reason was given.
        """
        if not self.reads:
            return True
        last = self.reads[-1]
        if missing := sorted(set(last.cells) - set(cells)):
            raise UserError(
                f"the test split was read for {len(last.cells)} cells of {uri}, which has {missing[0]} too; give all "
                "of their --seeds, since a result of some seeds would be selected on the test split"
            )
        added = sorted(set(cells) - set(last.cells))
        if added and not reason:
            raise UserError(
                f"the test split was already read for {uri} ({last.time}, {len(last.cells)} cells) and would be read "
                f"again for {len(added)} more, such as {added[0]}: a protocol reads it once. Give another --name and "
                'all seeds from the start, or --read-test-again "REASON", which the result will state'
            )
        return bool(added)


def reads_by_others(folder: str, own: str, digest: str) -> int:
    """Count the other protocols in a storage folder that read the test split of a dataset.

    Args:
        folder: The storage folder.
        own: Name of the protocol that is not counted.
        digest: Digest of the dataset.
    """
    records = [
        file.name
        for file in storage.find_files(folder, depth=2)
        if file.name.endswith(f"/{TEST_READ_FILE}") and not file.name.startswith(f"{own}/")
    ]
    return sum(ReadLog.load(storage.join(folder, name), digest).digest == digest for name in records)
