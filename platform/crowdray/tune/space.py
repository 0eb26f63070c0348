"""The search space of a study: which fields of the configuration vary and how, and its JSON form."""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from crowdray import storage
from crowdray.config import FIELDS, PAPER_WEIGHTS, Config, ConfigError
from crowdray.documents import parse_json
from crowdray.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

PAPER_POINT = {f"loss.{task}": weight for task, weight in PAPER_WEIGHTS.items()}
"""The paper's loss weights by field."""

LENGTHS = ("stages.baseline.epochs", "stages.decoders.epochs", "stages.joint.epochs")

SWITCH = ".on"
"""Suffix of the Optuna parameter that says whether a field with `zero` is not 0."""

_SHARED = "it decides which trials can share states; set it by its flag, for all trials"
_NO_RESULT = "it changes memory and time, not results; set it by its flag, for all trials"

FIXED = {
    "seed": "the best trial would be the luckiest, not the best configuration; keep one seed per study: --seed 0",
    "numerics.threads": "each trial reserves as many CPUs as its flag says; set --numerics.threads, for all trials",
    "sampling.validation": "trials would be validated on different images; choose once: --sampling.validation run",
    "sampling.validation_fraction": "trials would be validated on different images; set it by its flag, for all trials",
    "sampling.images": "trials would be validated on different images; set it by its flag, for all trials",
    "sampling.downsample": "errors at different resolutions are not comparable; set it by its flag, for all trials",
    "sampling.roi": "errors inside different regions are not comparable; set it by its flag, for all trials",
    "model.backbone": "backbones need different settings; search each in a study of its own",
    "model.weights": "their hash belongs to one file; search each in a study of its own",
    "model.weights_sha256": "it belongs to one file; search each in a study of its own",
    "model.init": "its hash belongs to one counter; search from each in a study of its own",
    "model.init_sha256": "it belongs to one counter; search from each in a study of its own",
    **dict.fromkeys(("numerics.precision", "numerics.tf32", "numerics.compile"), _SHARED),
    **dict.fromkeys(("numerics.activation_checkpointing", "sampling.cache_gib", "sampling.gpu_cache_gib"), _NO_RESULT),
}
"""Fields that must not vary within a study, and why."""


class SpaceError(UserError):
    """All problems of a search space together: each with name, value, source and fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("the search space cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = problems


def _of_field_type(value: Any, info: ValidationInfo) -> Any:
    """Check a value against its field's type, the context; only integers are converted, to float."""
    if info.context is None:
        return value
    try:
        return TypeAdapter(info.context).validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(error.errors(include_url=False)[0]["msg"].lower()) from None


_Value = Annotated[Any, AfterValidator(_of_field_type)]


class _Dimension(BaseModel):
    """How one field varies."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Choice(_Dimension):
    """A list of values."""

    choices: Annotated[tuple[_Value, ...], AfterValidator(lambda values: tuple(sorted(values)))]
    """Its values, ascending."""

    def nearest(self, value: Any) -> Any:
        """The nearest choice to a number; for other values the first one."""
        if value in self.choices:
            return value
        is_number = not isinstance(value, (str, bool))
        return min(self.choices, key=lambda choice: abs(choice - value)) if is_number else self.choices[0]

    def extremes(self, kind: Any) -> Iterator[tuple[str, Any]]:
        """Yield the values to try in a configuration, each with the start of its message."""
        yield from (("a choice of {} is", choice) for choice in self.choices)

    def suggest(self, trial: "BaseTrial", name: str, kind: Any) -> Any:
        """Ask Optuna for a value."""
        return trial.suggest_categorical(name, self.choices)

    def integers(self) -> tuple[int, ...]:
        """All values of an integer field, ascending."""
        return self.choices

    def problems(self, where: str, kind: Any) -> Iterator[str]:
        """Yield what cannot be used, one sentence each; `where` names the field and its source."""
        if not self.choices:
            yield f"choices of {where} are empty; give at least one value"
        for value in [value for index, value in enumerate(self.choices) if self.choices.index(value) < index]:
            yield f"choices of {where} contain {value!r} twice; give each value once"


class Range(_Dimension):
    """Numbers from `low` to `high`."""

    low: _Value
    high: _Value
    log: StrictBool = False
    """Whether the scale is logarithmic."""
    zero: StrictBool = False
    """Whether 0 is possible as well: it drops a task."""
    step: Annotated[StrictInt, Field(ge=1)] | None = None
    """Distance between neighbors of an integer range; 1 if left out."""

    def nearest(self, value: Any) -> Any:
        """The nearest value of the range."""
        if self.zero and value == 0:
            return value
        inside = min(max(value, self.low), self.high)
        return self.low + round((inside - self.low) / self.step) * self.step if self.step else inside

    def extremes(self, kind: Any) -> Iterator[tuple[str, Any]]:
        """Yield the values to try in a configuration, each with the start of its message."""
        yield from (("low of {} is", self.low), ("high of {} is", self.high))
        if kind is int:
            yield "step of {} leads to", self.low + (self.step or 1)
        if self.zero:
            yield "zero of {} allows", kind(0)

    def suggest(self, trial: "BaseTrial", name: str, kind: Any) -> Any:
        """Ask Optuna for a value: with `zero` first for the switch `<name>.on`, then for one in the range.

        A random search is on in every second trial: each of the eight subsets of three tasks, the paper's Table 2, is
        equally likely.
        """
        if self.zero and not trial.suggest_categorical(name + SWITCH, (True, False)):
            return kind(0)
        if kind is int:
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def integers(self) -> tuple[int, ...]:
        """All values of an integer field, ascending."""
        return tuple(sorted({*range(self.low, self.high + 1, self.step or 1), *([0] if self.zero else [])}))

    def problems(self, where: str, kind: Any) -> Iterator[str]:
        """Yield what cannot be used, one sentence each; `where` names the field and its source."""
        if self.low >= self.high:
            yield f"low of {where} is {self.low} and high is {self.high}; give a low below high, or null to fix it"
        elif self.step and kind is int and (self.high - self.low) % self.step:
            last = self.low + max(1, (self.high - self.low) // self.step) * self.step
            yield f"step of {where} is {self.step} and does not lead from {self.low} to {self.high}; give high {last}"
        if self.step and (kind is float or self.log):
            yield f"step of {where} is {self.step}; only integers on a linear scale have a step: leave it out"
        if self.log and self.low <= 0:
            yield f'low of {where} is {self.low}, but a log scale has no 0; raise low and add "zero": true, or drop log'


Dimension = Choice | Range
_RANGE = '{"low": 0.06, "high": 6}'


@dataclass(frozen=True)
class Space:
    """The fields that vary in a study, in the configuration's order. Raises SpaceError if nothing varies."""

    dimensions: Mapping[str, Dimension]
    """How each field varies, by its dotted name: loss.depth, stages.baseline.epochs."""

    def __post_init__(self) -> None:
        if not self.dimensions:
            raise SpaceError([f"it is empty; let a field vary: --vary 'loss.depth={_RANGE}'"])
        points = {name: item.choices for name, item in self.dimensions.items() if isinstance(item, Choice)}
        if all(len(points.get(name, ())) == 1 for name in self.dimensions):
            raise SpaceError(
                [f"{name} has the single value {value}; add a choice" for name, (value,) in points.items()]
            )
        ordered = {name: self.dimensions[name] for name in FIELDS if name in self.dimensions}
        object.__setattr__(self, "dimensions", ordered)

    def suggest(self, trial: "BaseTrial") -> dict[str, Any]:
        """Ask Optuna for a point; returns values by dotted field name. A resumed trial returns its own point."""
        return {name: item.suggest(trial, name, FIELDS[name]) for name, item in self.dimensions.items()}

    def configure(self, base: Config, values: Mapping[str, Any]) -> Config:
        """Return `base` with the values of a point; values of other names, such as switches, are ignored."""
        config: Config = _with(base, {name: values[name] for name in self.dimensions})
        return config

    def nearest(self, config: Config) -> dict[str, Any]:
        """Return the nearest point to a configuration: values by dotted field name."""
        return {name: item.nearest(attrgetter(name)(config)) for name, item in self.dimensions.items()}

    def parameters(self, config: Config) -> dict[str, Any]:
        """Return Optuna's parameters of a configuration inside the space, as enqueue_trial takes them."""
        values = {name: attrgetter(name)(config) for name in self.dimensions}
        with_zero = (name for name, item in self.dimensions.items() if isinstance(item, Range) and item.zero)
        switches = {name + SWITCH: values[name] != 0 for name in with_zero}
        return switches | {name: value for name, value in values.items() if switches.get(name + SWITCH, True)}

    def stage_lengths(self, stage: str) -> tuple[int, ...]:
        """All lengths of a stage in epochs, ascending; empty if its length does not vary."""
        item = self.dimensions.get(f"stages.{stage}.epochs")
        return item.integers() if item else ()

    def to_json(self) -> str:
        """The space as JSON text; `load_space` reads it as a file and returns the same space."""
        removed = dict.fromkeys((*PAPER_POINT, *LENGTHS))
        items = {name: item.model_dump(exclude_defaults=True) for name, item in self.dimensions.items()}
        return json.dumps(removed | items, indent=1) + "\n"


def default_space(base: Config) -> Space:
    """The three loss weights and the three stage lengths around `base`, whose own point is always inside.

    A weight is 0, or between a tenth and ten times the paper's on a log scale. The best weights of Figure 5 are all
    inside; beyond (segmentation 1 and 5, depth 10) its errors are larger than without the task. A stage lasts 0.5, 1
    or 1.5 times its length in `base`, rounded up to epochs, so that a trial costs on average what `base` costs. A
    stage that `base` omits stays omitted.
    """
    dimensions: dict[str, Dimension] = {}
    for name, paper in PAPER_POINT.items():
        own = attrgetter(name)(base) or paper
        dimensions[name] = Range(low=min(paper / 10, own), high=max(paper * 10, own), log=True, zero=True)
    for name in LENGTHS:
        if length := attrgetter(name)(base):
            dimensions[name] = Choice(choices=tuple(sorted({-(-length * halves // 2) for halves in (1, 2, 3)})))
    return Space(dimensions)


def load_space(path: str | None, vary: Sequence[str], base: Config) -> Space:
    """Return the default space, changed by a JSON file and then by --vary.

    A file is an object by field, an item of `vary` is NAME=JSON. A field has {"low", "high"} with optional "log",
    "zero" and "step", or {"choices": [...]}, or just the list. Each entry replaces earlier ones of its field; null
    fixes the field at its value in `base`.

    Args:
        path: Path or URI of the file, if any.
        vary: Items of --vary.
        base: The base configuration.

    Raises:
        SpaceError: All problems together, also values that the configuration refuses, alone or in pairs.
    """
    problems: list[str] = []
    entries = _entries(path, vary, problems)
    parsed = {name: _parse_entry(name, *entry, base, problems) for name, entry in entries.items()}
    if problems:
        raise SpaceError(problems)
    kept = {name: item for name, item in default_space(base).dimensions.items() if name not in parsed}
    space = Space(kept | {name: item for name, item in parsed.items() if item is not None})
    if conflicts := list(_conflicts(space, base)):
        raise SpaceError(conflicts)
    return space


def first_points(space: Space, base: Config) -> list[dict[str, Any]]:
    """Optuna's parameters of a study's first points: `base`, the paper's weights, no auxiliary task.

    Other fields have the nearest value to `base`. Weights outside the space are left out, equal points occur once.
    """
    points: list[dict[str, Any]] = []
    own = {name: attrgetter(name)(base) for name in PAPER_POINT}
    for weights in (own, PAPER_POINT, dict.fromkeys(PAPER_POINT, 0.0)):
        config = space.configure(base, space.nearest(_with(base, weights)))
        if all(attrgetter(name)(config) == weight for name, weight in weights.items()):
            points.append(space.parameters(config))
    return [point for index, point in enumerate(points) if point not in points[:index]]


def _entries(path: str | None, vary: Sequence[str], problems: list[str]) -> dict[str, tuple[Any, str]]:
    """Read the last entry of each field, with its source, from the file and --vary."""
    entries: dict[str, tuple[Any, str]] = {}
    if path is not None:
        content = _parse_json(storage.read_bytes(path), path, problems)
        if isinstance(content, dict):
            entries = {name: (entry, path) for name, entry in content.items()}
        elif not problems:
            problems.append(f'{path} is {content!r}; give an object of fields: {{"loss.depth": {_RANGE}}}')
    for item in vary:
        name, equals, text = (part.strip() for part in item.partition("="))
        if equals:
            entries[name] = (_parse_json(text, f"--vary {name}", problems), "--vary")
        else:
            problems.append(f"--vary {item!r} has no =; write --vary 'loss.depth={_RANGE}'")
    return entries


def _parse_json(text: str | bytes, source: str, problems: list[str]) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        problems.append(f"{source} is not JSON: {error}; write a range {_RANGE}, a list of choices, or null")
        return None


def _parse_entry(name: str, entry: Any, source: str, base: Config, problems: list[str]) -> Dimension | None:
    """Parse an entry of a file or --vary, and try its extremes in the configuration; None for null."""
    where = f"{name} in {source}"
    if entry is None and name in FIELDS:
        return None
    if isinstance(entry, list):
        entry = {"choices": entry}
    is_choice = isinstance(entry, dict) and "choices" in entry
    if name in FIXED:
        problems.append(f"{where} cannot vary: {FIXED[name]}")
    elif name not in FIELDS:
        problems.append(f"{where} is not a field; {_closest(name, FIELDS, 'see --help')}")
    elif not isinstance(entry, dict):
        problems.append(f"{where} is {entry!r}; give a range {_RANGE}, a list of choices, or null to fix the field")
    elif FIELDS[name] not in (int, float) and not is_choice:
        problems.append(f"{where} is a range, but the field is not a number; give a list of choices")
    else:
        return _parse(name, entry, Choice if is_choice else Range, where, base, problems)
    return None


def _parse(
    name: str, entry: Any, form: type[Dimension], where: str, base: Config, problems: list[str]
) -> Dimension | None:
    kind = FIELDS[name]
    try:
        dimension = form.model_validate(entry, context=kind)
    except ValidationError as error:
        problems.extend(_readable(item, tuple(form.model_fields), where) for item in error.errors(include_url=False))
        return None
    problems.extend(dimension.problems(where, kind))
    for label, value in dimension.extremes(kind):
        if reasons := "; ".join(_refusals(base, {name: value})):
            problems.append(f"{label.format(where)} {value}; {reasons.removeprefix(f'{name} is {value}; ')}")
    return dimension


def _readable(error: Any, keys: Sequence[str], where: str) -> str:
    """Describe a pydantic error by its key, value and reason."""
    key, *index = error["loc"]
    if error["type"] == "missing":
        return f"{where} has no {key}; give low and high, or choices"
    if error["type"] == "extra_forbidden":
        return f"{key} of {where} is not a key; {_closest(key, keys, 'give ' + ', '.join(keys))}"
    reason = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"].lower()
    return f"{'a choice' if index else key} of {where} is {error['input']!r}: {reason}"


def _closest(word: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"is it {close[0]}?" if close else otherwise


def _refusals(base: Config, values: Mapping[str, Any]) -> list[str]:
    """Why the configuration refuses values."""
    try:
        _with(base, values)
    except ConfigError as error:
        return error.problems
    return []


def _conflicts(space: Space, base: Config) -> Iterator[str]:
    """Yield pairs of fields whose values are valid alone but not together, each pair once."""
    extremes = {name: [value for _, value in item.extremes(FIELDS[name])] for name, item in space.dimensions.items()}
    for first, second in itertools.combinations(extremes, 2):
        for one, other in itertools.product(extremes[first], extremes[second]):
            if reasons := _refusals(base, {first: one, second: other}):
                yield f"{first} {one} with {second} {other}: {'; '.join(reasons)}"
                break


def _with(group: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Return a group of the configuration with the values of some fields, by dotted name."""
    changed = {}
    for item in dataclasses.fields(group):
        name, value = prefix + item.name, getattr(group, item.name)
        if dataclasses.is_dataclass(value):
            changed[item.name] = _with(value, values, f"{name}.")
        elif name in values:
            changed[item.name] = FIELDS[name](values[name]) if FIELDS[name] is float else values[name]
    return dataclasses.replace(group, **changed)
