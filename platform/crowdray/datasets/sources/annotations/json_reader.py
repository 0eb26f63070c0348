"""Read JSON annotation files into types that pydantic checks; errors name the file, JSON path and value."""

import json
import reprlib
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, PlainValidator, Strict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from crowdray import storage
from crowdray.errors import DataError

T = TypeVar("T")
_adapter = cache(TypeAdapter)


def _check_id(value: object) -> int | str:
    if isinstance(value, int | str) and not isinstance(value, bool):
        return value
    raise PydanticCustomError("id_type", "Input should be an integer or a string")


Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
"""A finite number; strings and booleans are rejected."""
Text = Annotated[str, Field(min_length=1)]
"""A non-empty string."""
Id = Annotated[int | str, PlainValidator(_check_id)]
"""An identifier that other parts of the file refer to."""
Point = tuple[Number, Number]
"""x and y."""


def read_json(uri: str) -> Any:
    """Return the parsed content of a JSON file; DataError if it is not valid JSON."""
    content = storage.read_bytes(uri)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also wrong encodings and integers of more than 4300 digits
        raise DataError(f"{uri} is not valid JSON ({error}); export it again") from error


def validate(expected: type[T], value: Any, uri: str, *path: str | int) -> T:
    """Validate the value at `path`, such as "annotations", 7, in a file; DataError with the first problem."""
    try:
        found: T = _adapter(expected).validate_python(value)  # type: ignore[arg-type]  # types are hashable
        return found
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path += first["loc"]
        if first["type"] == "missing":
            problem = f"{location(uri, *path[:-1])} has no {path[-1]!r}"
        else:
            message = "Input should be an object" if first["type"] == "model_type" else first["msg"]
            problem = f"{location(uri, *path)} is {reprlib.repr(first['input'])}: {message}"
        raise DataError(f"{problem}; export it again, or correct it") from error


def location(uri: str, *path: str | int) -> str:
    """Format a position in a JSON file, such as "heads.json: annotations[7].bbox"."""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    return f"{uri}: {steps}" if steps else uri
