"""Images of a folder: lookup by the names that annotations use, and EXIF orientation."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from crowdray.data.decoding import SIDEWAYS, SUFFIXES, content_size, decode_image, orientation, turn_upright
from crowdray.data.sample import points_outside
from crowdray.datasets.sources.layout import NAME_FORMS
from crowdray.errors import DataError

JPEG_QUALITY = 95
"""Quality of rotated images; all others keep their original bytes."""

_SPLIT = re.compile(r"(train|val|test)(?:ing|id|idation)?(?:\d{4})?", re.IGNORECASE)
_GENERIC_FOLDERS = ("images",)
"""Folder names that do not identify a scene."""


class ImageIndex:
    """Image paths below a folder, found by a full path, the end of a path, or a name without suffix.

    Names may be spelled in another Unicode form or another case, see NAME_FORMS.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        self._by_letters: dict[str, list[str]] = {}
        for path in paths:
            name = PurePosixPath(path)
            self._by_name.setdefault(NAME_FORMS[-1](name.name), []).append(path)
            self._by_stem.setdefault(NAME_FORMS[-1](name.stem), []).append(path)
            self._by_letters.setdefault(_letters(name.name), []).append(path)

    def find(self, name: str, location: str) -> str | None:
        """Return the path with the longest common end with `name`, if any; DataError if several match equally well.

        A name as written comes before one in another form. Of paths with equally long common ends, such as
        a/images/1.jpg and b/images/1.jpg for a/labels/1, the one with the longest common start is chosen.
        """
        parts = _parts(name)
        if not parts:
            return None
        by_name, part = self._by_name, "name"
        if (last := NAME_FORMS[-1](parts[-1])) not in by_name and not last.endswith(SUFFIXES):
            by_name, part = self._by_stem, "stem"

        def rank(path: str) -> list[Any]:
            folders, same_name = PurePosixPath(path).parts[:-1], getattr(PurePosixPath(path), part)
            full = [form(path) == form("/".join(parts)) for form in NAME_FORMS]
            ends = [
                (form(same_name) == form(parts[-1]), _common_ends([*map(form, parts[:-1])], [*map(form, folders)]))
                for form in NAME_FORMS
            ]
            return [*full, *ends]

        ranks = {path: rank(path) for path in by_name.get(last, [])}
        best = [path for path in ranks if ranks[path] == max(ranks.values())]
        if len(best) > 1:
            wanted, *others = _distinct(name, *best[:2])
            raise DataError(
                f"{location}: {wanted!r} matches both {' and '.join(others)}; include its folder, or rename one of them"
            )
        return best[0] if best else None

    def similar(self, name: str) -> str:
        """Return a remark on an image whose name has the same letters and digits as `name`; "" if there is none."""
        parts = _parts(name)
        found = self._by_letters.get(_letters(parts[-1]), []) if parts else []
        return f", but {_distinct(found[0], name)[0]}" if found else ""


def url_path(text: str, where: str) -> str:
    """Extract the path of a URL: /data/upload/1/a.jpg, /data/local-files/?d=b/a.jpg, s3://bucket/b/a.jpg?X=1."""
    try:
        address = urlsplit(text)
        return parse_qs(address.query).get("d", [unquote(address.path)])[0]
    except ValueError as error:
        raise DataError(f"{where}: {text!r} is not a valid URL ({error}); correct it") from error


def parse_split(word: str) -> str:
    """Return train, val or test for one of its usual spellings, else ""."""
    match = _SPLIT.fullmatch(word.strip())
    return match.group(1).lower() if match else ""


def split_in_path(path: str) -> str:
    """Return the first split named in a path, such as person_keypoints_train2017.json, else ""."""
    return next((split for word in re.split(r"[^A-Za-z0-9]+", path) if (split := parse_split(word))), "")


def split_and_scene(path: str) -> tuple[str, str]:
    """Return the split and the scene named by an image's folders; "" where there is none."""
    folders = PurePosixPath(path).parts[:-1]
    splits = [split for folder in folders if (split := parse_split(folder))]
    scenes = [folder for folder in folders if not parse_split(folder) and folder.lower() not in _GENERIC_FOLDERS]
    return splits[0] if splits else "", "/".join(scenes)


def upright(content: bytes, size: tuple[int, int] | None, heads: NDArray[np.float64], location: str) -> bytes:
    """Turn an encoded image as its annotation sees it; an image that stays as stored keeps its bytes.

    Tools show images upright, as an EXIF orientation asks, but some write the stored size next to upright coordinates,
    and others annotate stored pixels: where the size contradicts the orientation, all heads must lie inside the image
    in exactly one of the two ways.

    Args:
        content: The encoded image.
        size: Size (H, W) in the annotation; None if it is unknown.
        heads: (N, 2) annotated x y.
        location: Position of the annotation in its file, for messages.

    Raises:
        DataError: The image cannot be decoded, has another size, or cannot be reconciled with its annotation.
    """
    turn, stored = orientation(content), content_size(content)
    turned = stored[::-1] if turn in SIDEWAYS else stored
    if size and size not in (stored, turned):
        raise DataError(
            f"it is {turned[1]}x{turned[0]}, but was annotated at {size[1]}x{size[0]} ({location}); "
            "replace it by the annotated image"
        )
    if stored != turned and size != turned:
        possible = [way for way in (stored, turned) if not points_outside(heads.astype(np.float32), *way)]
        if size and (len(heads) == 0 or possible == [stored]):
            return content
        if possible == [stored] or (size and possible != [turned]):
            ways = {0: "in neither way", 1: "only as stored", 2: "in both ways"}[len(possible)]
            raise DataError(
                f"its annotation ({location}) contradicts its EXIF orientation, which turns {stored[1]}x{stored[0]} "
                f"pixels to {turned[1]}x{turned[0]}: the heads lie inside it {ways}; turn the photo upright, remove "
                "the tag and correct the annotation"
            )
    if turn == 1:
        return content
    rotated = turn_upright(decode_image(content), turn)
    encoded: bytes = simplejpeg.encode_jpeg(rotated, quality=JPEG_QUALITY, colorsubsampling="444")
    return encoded


def _parts(name: str) -> list[str]:
    return [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")]


def _letters(name: str) -> str:
    """Return what a reader sees of a name: its letters and digits, without case and in one form."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))


def _distinct(*names: str) -> list[str]:
    """Return names for a message, with escaped code points where they would look alike."""
    alike = len({_letters(name) for name in names}) < len(names)
    return [name.encode("ascii", "backslashreplace").decode() if alike else name for name in names]


def _common_ends(left: Sequence[str], right: Sequence[str]) -> tuple[int, int]:
    """Return the lengths of the common end and of the common start."""

    def length(pairs: Iterable[tuple[str, str]]) -> int:
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    return length(zip(reversed(left), reversed(right), strict=False)), length(zip(left, right, strict=False))
