"""Items that cannot be used: listed beside the index, told, and too many of them are an error.

A broken photo among a million is no reason to have no dataset, and none to lose it without a word.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from crowdray import storage
from crowdray.errors import DataError

QUARANTINE = "quarantine.json"

MOST_SET_ASIDE = 0.5
"""Share of a split above which the layout is to blame and not its items: nothing is published."""

MOST_LISTED = 20
"""How many problems or names a message lists before it only counts."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An item that was left out, and why."""

    split: str
    """The part of the dataset it would belong to."""
    name: str
    """Its name, unique in the split."""
    file: str
    """URI of its image, or of its annotation where that is all there is."""
    reason: str
    """What is wrong with it, and the mend."""

    def __str__(self) -> str:
        return f"{self.split}/{self.name}: {self.reason}"


def check_quarantine(
    source: str, items: Sequence[Quarantined], used: Mapping[str, int], *, strict: bool = False
) -> None:
    """A DataError that lists the items together: with `strict` for any, else when a split loses most of its items.

    used: items of each split that can be used.
    """
    lost = Counter(item.split for item in items)
    worst = [split for split, n in lost.items() if n > MOST_SET_ASIDE * (n + used.get(split, 0))]
    if worst:
        total = lost[worst[0]] + used.get(worst[0], 0)
        why = f"of {worst[0]} {lost[worst[0]]} of {total}, so --source is no {source} or is damaged"
    elif strict and items:
        why = "mend them, or set them aside by leaving --strict out"
    else:
        return
    more = [f"... and {len(items) - MOST_LISTED} more"] if len(items) > MOST_LISTED else []
    head = f"{source}: {len(items)} items cannot be used, nothing was published ({why}):"
    raise DataError("\n  ".join([head, *map(str, items[:MOST_LISTED]), *more]))


def write_quarantine(dest: str, items: Sequence[Quarantined], digest: str) -> None:
    """Write the list for the dataset with this digest."""
    content = {"digest": digest, "items": [asdict(item) for item in items]}
    storage.write_bytes(storage.join(dest, QUARANTINE), (json.dumps(content, indent=1) + "\n").encode())


def read_quarantine(dest: str, digest: str) -> list[Quarantined]:
    """The items that the conversion into the dataset with this digest left out; none when it has no such list."""
    place = storage.join(dest, QUARANTINE)
    if (text := storage.read_bytes_or_none(place)) is None:
        return []
    try:
        content = json.loads(text)
        return [Quarantined(**item) for item in content["items"] if content["digest"] == digest]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is damaged ({type(error).__name__}: {error}); convert the dataset again") from error
