"""Names and lists in a dataset's folders: natural order, lines of text, which splits were asked for."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from crowdray import storage
from crowdray.errors import DataError, UserError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp")
"""Endings of image files, in any case."""


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts IMG_9 before IMG_10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def stem(uri: str) -> str:
    """The file name of a URI without its ending."""
    return PurePosixPath(uri).stem


def by_stem(uris: Iterable[str]) -> dict[str, str]:
    """URIs by their file names without ending."""
    return {stem(uri): uri for uri in uris}


def text_lines(uri: str) -> list[str]:
    """The lines of a text file that are not blank; a DataError for a file that is no text."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} is no text ({error}); copy it again") from error
    return [line for line in text.splitlines() if line.strip()]


def chosen_splits(source: str, there: Sequence[str], asked: Sequence[str]) -> list[str]:
    """The splits to convert, in the order in which the source has them; asking for a missing one is a
    UserError."""
    missing = [split for split in asked if split not in there]
    if missing:
        raise UserError(f"{source} has no split {missing[0]!r}; it has {', '.join(there)}")
    return [split for split in there if not asked or split in asked]
