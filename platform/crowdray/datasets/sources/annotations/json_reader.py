"""Parsed JSON whose values know their place, so that what is wrong in a file can be found in it."""

import json
import reprlib
from collections.abc import Iterator
from typing import Any

from crowdray import storage
from crowdray.errors import DataError


class Node:
    """A value of a JSON file; asking it for what it is not raises a DataError with its place and content."""

    __slots__ = ("_parent", "key", "value")

    def __init__(self, value: Any, key: str | int, parent: "Node | None" = None) -> None:
        self.value = value
        self.key = key
        self._parent = parent

    @property
    def place(self) -> str:
        """The file and the path in it, such as heads.json: annotations[7].bbox."""
        if self._parent is None:
            return str(self.key)
        step = f"[{self.key}]" if isinstance(self.key, int) else f".{self.key}"
        return f"{self._parent.place}{step}" if self._parent._parent else f"{self._parent.place}: {step.lstrip('.')}"

    def find(self, key: str) -> "Node | None":
        """The member of an object, None when it is missing or null."""
        value = self.object().get(key)
        return None if value is None else Node(value, key, self)

    def need(self, key: str) -> "Node":
        """The member of an object that must be there."""
        found = self.find(key)
        if found is None:
            raise DataError(f"{self.place} has no {key!r}; export it again, or correct it")
        return found

    def object(self) -> dict[str, Any]:
        """The members of an object by name."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.value

    def elements(self) -> Iterator["Node"]:
        """The elements of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return (Node(value, number, self) for number, value in enumerate(self.value))

    def text(self) -> str:
        """A string that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            raise self.wrong("a text")
        return self.value

    def number(self) -> float:
        """A finite number."""
        if isinstance(self.value, int | float) and not isinstance(self.value, bool) and abs(self.value) < 1e300:
            return float(self.value)
        raise self.wrong("a finite number")

    def identity(self) -> int | str:
        """A number or text by which other parts of the file refer to this one."""
        if isinstance(self.value, int | str) and not isinstance(self.value, bool):
            return self.value
        raise self.wrong("a whole number or a text")

    def pairs(self) -> list[tuple[float, float]]:
        """A list of pairs of numbers, such as the corners of a polygon."""
        found = []
        for node in self.elements():
            numbers = [number.number() for number in node.elements()]
            if len(numbers) != 2:
                raise node.wrong("x and y")
            found.append((numbers[0], numbers[1]))
        return found

    def wrong(self, expected: str) -> DataError:
        """The error that this value is not what was expected."""
        return DataError(
            f"{self.place} is {reprlib.repr(self.value)}, expected {expected}; export it again, or correct it"
        )


def read_json(uri: str) -> Node:
    """The content of a JSON file; a DataError when it cannot be parsed."""
    content = storage.read_bytes(uri)
    try:
        return Node(json.loads(content), uri)
    except (ValueError, RecursionError) as error:  # also text in another encoding, and numbers of 5,000 digits
        raise DataError(f"{uri} is no JSON ({error}); export it again") from error


def size_of(node: Node, height: str = "height", width: str = "width") -> tuple[int, int] | None:
    """An image's size (H, W) as an object tells it, None when it does not: some tools write 0."""
    sides = [node.find(key) for key in (height, width)]
    numbers = [0.0 if side is None else side.number() for side in sides]
    return (round(numbers[0]), round(numbers[1])) if all(number >= 1 for number in numbers) else None
