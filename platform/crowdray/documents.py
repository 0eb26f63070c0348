"""JSON documents in storage: parsed within limits, checked against types, protected by a hash of their content."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from crowdray.errors import escaped

MAX_BYTES = 256 * 2**20
"""Largest document. pydantic_core refuses more than 200 nested arrays and objects by itself."""

T = TypeVar("T")

HASH = "sha256"
"""Field that holds the hash of all others."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for invalid, too large and too deeply nested text."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text)} bytes, more than {MAX_BYTES}")
    return pydantic_core.from_json(text)


def parse_as(kind: type[T], content: object) -> T:
    """Convert parsed JSON to a dataclass. Raises ValueError, with the first problem in one line."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a validation in one line: where it is, and what was expected."""
    problem = error.errors(include_url=False, include_context=False)[0]
    position = ".".join(str(part)[:80] for part in problem["loc"][-4:])
    return escaped(f"{position}: {problem['msg'].removeprefix('Value error, ')}, not {str(problem['input'])[:80]!r}")


def to_document(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return JSON text of a document with a hash of its content."""
    stored = json.loads(json.dumps(content))  # as it will be parsed: lists for tuples, strings for keys
    return json.dumps({**stored, HASH: _hash(stored)}, indent=indent) + "\n"


def parse_document(text: str | bytes) -> dict[str, Any]:
    """Parse the text of `to_document`, or of a version that wrote no hash.

    Raises:
        ValueError: It is not a JSON object, or was changed after it was written.
    """
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    expected = content.pop(HASH, None)
    if expected is not None and expected != _hash(content):
        raise ValueError("its content does not have the hash that it was written with")
    return content


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
