"""What `--depth` says after a teacher's colon: a place, then options after commas."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

from crowdray.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arguments:
    """A place and its options, such as `s3://bucket/maps,inverse,range=20`; the place ends at the first comma."""

    teacher: str
    """The word before the colon."""
    place: str
    """Path, URI or name."""
    options: Mapping[str, str]
    """Option -> value, "" for a flag."""
    examples: Mapping[str, str]
    """Every option that the teacher knows -> an example of its value, "" for a flag."""

    @classmethod
    def parse(cls, teacher: str, text: str, examples: Mapping[str, str]) -> Self:
        """Split what follows the colon; a UserError for no place, unknown options, and values too many or too few."""
        place, *parts = text.split(",")
        known = ", ".join(f"{option}={value}" if value else option for option, value in examples.items())
        if not place:
            raise UserError(f"--depth {teacher} needs a place after a colon: {teacher}:PLACE[,OPTION...]")
        options: dict[str, str] = {}
        for part in parts:
            option, equals, value = part.partition("=")
            if option in options or not (bool(value) if examples.get(option) else option in examples and not equals):
                raise UserError(
                    f"--depth {teacher}:{text}: {part!r} is unknown, repeated, or lacks its value; after the first "
                    f"comma may follow {known}, and a place cannot hold a comma"
                )
            options[option] = value
        return cls(teacher, place, options, examples)

    def flag(self, option: str) -> bool:
        """Whether a flag is given."""
        return option in self.options

    def inverse(self) -> bool | None:
        """Whether larger is nearer, from the flags inverse and metric; None without either, a UserError with both."""
        if self.flag("inverse") and self.flag("metric"):
            raise UserError(f"--depth {self.teacher}: inverse and metric exclude each other; give one")
        return self.flag("inverse") if self.flag("inverse") or self.flag("metric") else None

    def value(self, option: str, parse: Callable[[str], T], default: T) -> T:
        """An option's value; a UserError shows an example when `parse` raises ValueError."""
        if option not in self.options:
            return default
        try:
            return parse(self.options[option])
        except ValueError as error:
            given = f"{option}={self.options[option]}"
            raise UserError(
                f"--depth {self.teacher}: {given} is not like {option}={self.examples[option]} ({error})"
            ) from error

    def identity(self, version: int, sha256: str) -> str:
        """The teacher's name: `onnx-1:0123456789ab:inverse,range=20`, options in alphabetic order."""
        options = ",".join(f"{key}={value}" if value else key for key, value in sorted(self.options.items()))
        return ":".join(filter(None, (f"{self.teacher}-{version}", sha256[:12], options)))


def number_from(least: float) -> Callable[[str], float]:
    """A parser of finite numbers that are larger than `least`."""

    def parse(text: str) -> float:
        number = float(text)
        if not least < number < float("inf"):
            raise ValueError(f"it must be larger than {least:g}")
        return number

    return parse


def whole_number(text: str) -> int:
    """A whole number from 1 on; a ValueError for anything else."""
    number = int(text)
    if number < 1:
        raise ValueError("it must be at least 1")
    return number
