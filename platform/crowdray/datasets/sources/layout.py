"""Files of dataset folders: where a dataset lies below a folder, its files by name, text lines, requested splits.

Archives of one dataset unpack into different folders: below another folder, each archive into a folder of its own name,
images in several parts. So files are found by the end of their path.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from crowdray import storage
from crowdray.data.decoding import SUFFIXES
from crowdray.errors import DataError, UserError

IMAGE = rf"(?P<name>[^/]+)(?:{'|'.join(map(re.escape, SUFFIXES))})"
"""Pattern of an image file and its name."""

_ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz")


def _normal_form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


NAME_FORMS: tuple[Callable[[str], str], ...] = (
    str,
    _normal_form,
    lambda name: _normal_form(_normal_form(name).casefold()),
)
"""Spellings under which two names are compared, in this order: as written, in one Unicode form, without case.

macOS decomposes the letters of names, and Windows ignores their case.
"""


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that orders IMG_9 before IMG_10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def visible_files(source: str) -> list[str]:
    """URIs of all files below a folder that are not hidden, sorted."""
    root = storage.resolve(source)
    names = sorted(file.name for file in storage.find_files(root))
    return [storage.join(root, name) for name in names if not storage.is_hidden(name)]


def find_roots(source: str, dataset: str, example: str, name: str, *folders: str) -> dict[str, list[str]]:
    """Folders that contain a dataset, with its files: those in which patterns match a path, see `files_by_name`.

    A root lies at `source`, anywhere below it, or above it if `source` is the folder of a split; only files below
    `source` are listed. UserError with the `example` of a path if there is none.
    """
    files, pattern = visible_files(source), _path_pattern(name, *folders)
    roots = {uri[: match.start()] for uri in files if (match := pattern.search(uri))}
    if not roots:
        raise not_found(source, dataset, example, files)
    return {root: [uri for uri in files if uri.startswith(f"{root}/")] for root in sorted(roots)}


def find_root(source: str, dataset: str, example: str, name: str, *folders: str) -> tuple[str, list[str]]:
    """The only root of `find_roots`, and its files; UserError if there are several."""
    roots = find_roots(source, dataset, example, name, *folders)
    if len(roots) > 1:
        raise UserError(
            f"{source} contains {dataset} in several folders: {', '.join(roots)}; set --source to one, or, if they are "
            "parts of one copy, move their content together"
        )
    return next(iter(roots.items()))


def not_found(source: str, dataset: str, example: str, files: Iterable[str]) -> UserError:
    """The error of a folder that does not contain a dataset."""
    archives = [uri for uri in (*files, source) if uri.lower().endswith(_ARCHIVES)]
    fix = f"unpack {archives[0]} first" if archives else "check --source"
    return UserError(f"{storage.resolve(source)} is not {dataset}: there is no file such as {example}; {fix}")


def files_by_name(files: Iterable[str], name: str, *folders: str, lower: bool = False) -> dict[str, str]:
    """URIs of the files that patterns match, by the group `name` of the pattern.

    Args:
        name: Pattern of the end of a path.
        folders: Patterns of the folders above, each of which may be repeated, as where an archive is unpacked into a
            folder of its own name.
        lower: Return the names in lower case, for files whose names are part of the layout.

    Raises:
        DataError: Two files have the same name.
    """
    found: dict[str, str] = {}
    pattern = _path_pattern(name, *folders)
    for uri in files:
        if match := pattern.search(uri):
            key = match["name"].lower() if lower else match["name"]
            if found.setdefault(key, uri) != uri:
                raise DataError(f"{found[key]} and {uri} have the same name; remove one of them, or change --source")
    return found


@functools.cache
def _path_pattern(name: str, *folders: str) -> re.Pattern[str]:
    above = "".join(f"(?:{folder}/)+" for folder in folders)
    return re.compile(f"(?:^|/){above}{name}$", re.IGNORECASE)


def paired(images: Iterable[str], annotations: dict[str, str]) -> dict[str, str]:
    """Annotations by the names of their images, which are spelled differently where only one fits, see NAME_FORMS."""
    names, renamed = set(images), dict(annotations)
    for form in NAME_FORMS[1:]:
        groups: dict[str, tuple[list[str], list[str]]] = {}
        for side, lone in enumerate((names - renamed.keys(), renamed.keys() - names)):
            for name in lone:
                groups.setdefault(form(name), ([], []))[side].append(name)
        for image, annotation in groups.values():
            if len(image) == len(annotation) == 1:
                renamed[image[0]] = renamed.pop(annotation[0])
    return renamed


def text_lines(uri: str) -> list[str]:
    """Lines of a UTF-8 text file that are not blank; DataError for other files."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} is not a text file ({error}); copy it again") from error
    return [line for line in text.splitlines() if line.strip()]


def chosen_splits(source: str, available: Sequence[str], requested: Sequence[str]) -> list[str]:
    """Requested splits, or all if none is requested, in the source's order; UserError for a missing one."""
    missing = [split for split in requested if split not in available]
    if missing:
        raise UserError(f"{source} has no split {missing[0]!r}; choose from {', '.join(available)}")
    return [split for split in available if not requested or split in requested]
