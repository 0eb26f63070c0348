"""Names and lists in dataset folders: natural order, text lines, requested splits."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from crowdray import storage
from crowdray.errors import DataError, UserError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp")
"""Suffixes of image files, case-insensitive."""


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that orders IMG_9 before IMG_10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def files_by_name(folder: str, suffixes: tuple[str, ...], *, prefix: str = "", suffix: str = "") -> dict[str, str]:
    """URIs of a folder's files with one of the suffixes, by name without extension, `prefix` and `suffix`."""
    stems = {PurePosixPath(uri).stem: uri for uri in storage.list_files(folder, suffixes)}
    return {stem.removeprefix(prefix).removesuffix(suffix): uri for stem, uri in stems.items()}


def text_lines(uri: str) -> list[str]:
    """Lines of a UTF-8 text file that are not blank; DataError for other files."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} is not a text file ({error}); copy it again") from error
    return [line for line in text.splitlines() if line.strip()]


def find_splits(source: str, paths: Mapping[str, str], dataset: str) -> tuple[str, list[str]]:
    """Root of a dataset, and the splits whose path below it exists; UserError if there is none."""
    root = storage.resolve(source)
    found = [split for split, path in paths.items() if storage.exists(storage.join(root, path))]
    if not found:
        raise UserError(f"{root} is not {dataset}: it contains neither {' nor '.join(paths.values())}; check --source")
    return root, found


def chosen_splits(source: str, available: Sequence[str], requested: Sequence[str]) -> list[str]:
    """Requested splits, or all if none is requested, in the source's order; UserError for a missing one."""
    missing = [split for split in requested if split not in available]
    if missing:
        raise UserError(f"{source} has no split {missing[0]!r}; choose from {', '.join(available)}")
    return [split for split in available if not requested or split in requested]
