"""Log of a run: train.log in its folder, with a line for each step, epoch and failure, over all starts."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from crowdray import storage
from crowdray.credentials import redacted
from crowdray.errors import UserError

LOG = "train.log"


class RunLog:
    """Appends lines to the log of a run: at once to a local file, at the end of the block to an object store."""

    def __init__(self, run: str) -> None:
        self._uri = storage.join(run, LOG)
        self._lines: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.write(f"{kind.__name__ if kind else 'error'}: {error}")
        self._store()

    def write(self, text: str) -> None:
        """Append a line with the time."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lines.append(f"{now} {redacted(' '.join(text.split()))}")
        if storage.is_local(self._uri):
            self._store()

    def write_epoch(self, row: Mapping[str, float | int | str]) -> None:
        """Append a line with the metrics of an epoch."""
        cells = (
            f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        self.write(" ".join(cells))

    def _store(self) -> None:
        content = "".join(f"{line}\n" for line in self._lines).encode()
        try:
            if storage.is_local(self._uri):
                with open(storage.resolve(self._uri), "ab") as file:
                    file.write(content)
            elif content:
                storage.write_bytes(self._uri, (storage.read_bytes_or_none(self._uri) or b"") + content)
        except (OSError, UserError):  # a full disk ends the run in a message of its own
            return
        self._lines.clear()
