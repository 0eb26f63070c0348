"""Quarantine: items that cannot be used are left out of the dataset and listed in a file of their own.

One broken photo among thousands must neither prevent a dataset nor vanish silently; too many of them are an error.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

from crowdray import storage
from crowdray.datasets.statistics import MAX_LISTED, UnusableItem
from crowdray.datasets.validation import ValidationReport
from crowdray.errors import DataError

QUARANTINE = "quarantine.json"
"""File of unusable items, next to the index."""

MAX_UNUSABLE = 0.5
"""Fraction of a split above which the layout is at fault rather than single items: nothing is published."""


def check_quarantine(report: ValidationReport, *, strict: bool = False) -> None:
    """Raise DataError if most of a split is unusable, or any item if `strict`."""
    items = report.unusable
    worst = [
        f"{stats.unusable} of {stats.unusable + stats.images} in {split}"
        for split, stats in report.splits.items()
        if stats.unusable > MAX_UNUSABLE * (stats.unusable + stats.images)
    ]
    if worst:
        why = f"{worst[0]}: --source is not {report.source}, or it is damaged"
    elif strict and items:
        why = "fix them, or leave --strict out to skip them"
    else:
        return
    more = [f"... and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    head = f"{report.source}: {len(items)} items cannot be used, nothing was published ({why}):"
    raise DataError("\n  ".join([head, *map(str, items[:MAX_LISTED]), *more]))


def write_quarantine(dest: str, items: Sequence[UnusableItem], digest: str) -> None:
    """Write the unusable items of the dataset with this digest."""
    content = {"digest": digest, "items": [asdict(item) for item in items]}
    storage.write_bytes(storage.join(dest, QUARANTINE), (json.dumps(content, indent=1) + "\n").encode())


def read_quarantine(dest: str, digest: str) -> list[UnusableItem]:
    """Items left out of the dataset with this digest; empty if the file is missing or of another dataset."""
    uri = storage.join(dest, QUARANTINE)
    if (text := storage.read_bytes_or_none(uri)) is None:
        return []
    try:
        content = json.loads(text)
        return [UnusableItem(**item) for item in content["items"] if content["digest"] == digest]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{uri} is damaged ({type(error).__name__}: {error}); convert the dataset again") from error
