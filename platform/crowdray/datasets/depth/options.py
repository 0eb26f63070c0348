"""Options of a depth teacher: the text of `--depth` after the colon."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

from crowdray.datasets.depth.inverse import RANGE
from crowdray.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TeacherOptions:
    """A location and comma-separated options, such as `s3://bucket/maps,inverse,range=20`."""

    teacher: str
    """The word before the colon."""
    location: str
    """Path, URI or model name."""
    options: Mapping[str, str]
    """Option -> value, "" for a flag."""
    examples: Mapping[str, str]
    """Every option of the teacher -> an example of its value, "" for a flag."""

    @classmethod
    def parse(cls, teacher: str, text: str, examples: Mapping[str, str]) -> Self:
        """Parse the text after the colon; UserError for a missing location and unknown or malformed options."""
        location, *parts = text.split(",")
        known = ", ".join(f"{option}={value}" if value else option for option, value in examples.items())
        if not location:
            raise UserError(f"--depth {teacher} needs a location: give {teacher}:LOCATION[,OPTION...]")
        options: dict[str, str] = {}
        for part in parts:
            option, equals, value = part.partition("=")
            if option in options or not (bool(value) if examples.get(option) else option in examples and not equals):
                raise UserError(
                    f"--depth {teacher}:{text}: {part!r} is unknown, repeated, or lacks its value; options after the "
                    f"first comma are {known}, and the location cannot contain a comma"
                )
            options[option] = value
        return cls(teacher, location, options, examples)

    def flag(self, option: str) -> bool:
        """Whether an option is given."""
        return option in self.options

    def inverse(self, known: bool | None, model: str) -> bool:
        """Whether larger is nearer, from the flags inverse and metric, else as `known` for the model."""
        if self.flag("inverse") and self.flag("metric"):
            raise UserError(f"--depth {self.teacher}: inverse and metric exclude each other; give one")
        if self.flag("inverse") or self.flag("metric"):
            return self.flag("inverse")
        if known is None:
            raise UserError(
                f"{model} does not define its kind of depth; add ,inverse if larger is nearer (MiDaS, Depth Anything) "
                "or ,metric if larger is farther"
            )
        return known

    def value(self, option: str, parse: Callable[[str], T], default: T) -> T:
        """Value of an option; UserError with an example if `parse` raises ValueError."""
        if option not in self.options:
            return default
        try:
            return parse(self.options[option])
        except ValueError as error:
            given = f"{option}={self.options[option]}"
            raise UserError(
                f"--depth {self.teacher}: {given} is not like {option}={self.examples[option]} ({error})"
            ) from error

    def ratio(self) -> float:
        """Ratio of farthest to nearest depth for inverse depth, from the option range."""
        return self.value("range", _ratio, RANGE)

    def identity(self, version: int, sha256: str) -> str:
        """Name of the teacher, such as `onnx-1:0123456789ab:inverse,range=20`; options in alphabetic order."""
        options = ",".join(f"{key}={value}" if value else key for key, value in sorted(self.options.items()))
        return ":".join(filter(None, (f"{self.teacher}-{version}", sha256[:12], options)))


IS_INVERSE = {"relative": True, "metric": False}
"""Whether larger is nearer, by `depth_estimation_type`."""


def _ratio(text: str) -> float:
    ratio = float(text)
    if not 1 < ratio < float("inf"):
        raise ValueError("it must be larger than 1")
    return ratio


def positive_int(text: str) -> int:
    """Parse an integer from 1; ValueError for anything else."""
    number = int(text)
    if number < 1:
        raise ValueError("it must be at least 1")
    return number
