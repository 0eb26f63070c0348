"""The search space of a study, as data: which fields of the configuration vary and how, and its JSON form."""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from crowdray import storage
from crowdray.config import PAPER_WEIGHTS, Config, ConfigError
from crowdray.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

PAPER_POINT = {f"loss.{task}": weight for task, weight in PAPER_WEIGHTS.items()}
"""The paper's loss weights by field."""

LENGTHS = ("stages.baseline.epochs", "stages.decoders.epochs", "stages.joint.epochs")

SWITCH = ".on"
"""Ends the name of the parameter that says whether a field with `zero` is on."""

_SHARING = "it decides who can share whose beginning; set it by its flag, for all trials"
_NO_RESULT = "it changes memory and time, no result; set it by its flag, for all trials"

FIXED = {
    "seed": "the best trial would be the luckiest, not the best setting; keep one seed for the study: --seed 0",
    "numerics.threads": "each trial gets as many CPUs as its flag says; set --numerics.threads, for all trials",
    "sampling.validation": "trials would be measured on different images; choose once: --sampling.validation run",
    "sampling.validation_fraction": "trials would be measured on different images; set it by its flag, for all trials",
    "sampling.downsample": "errors at different sizes cannot be compared; set it by its flag, for all trials",
    "sampling.roi": "errors inside different regions cannot be compared; set it by its flag, for all trials",
    "model.backbone": "what one brings is not what another one trains; search each in a study of its own",
    "model.weights": "their hash belongs to one file; search each in a study of its own",
    "model.weights_sha256": "it belongs to one file; search each in a study of its own",
    **dict.fromkeys(("numerics.precision", "numerics.tf32", "numerics.compile"), _SHARING),
    **dict.fromkeys(("numerics.activation_checkpointing", "sampling.cache_gib", "sampling.gpu_cache_gib"), _NO_RESULT),
}
"""Fields that must not vary within a study, and why."""


def _leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(group):
        if dataclasses.is_dataclass(item.type):
            yield from _leaves(item.type, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item.type


FIELDS: dict[str, Any] = dict(_leaves(Config))
"""Type of each field of the configuration, by dotted name."""


class SpaceError(UserError):
    """All problems of a search space together: each with its name, the value given, its place and the mend."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("the search space cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class Dimension:
    """How one field of the configuration varies: a range, or a list of choices."""

    low: float | None = None
    """Least value of the range."""
    high: float | None = None
    """Greatest value of the range."""
    log: bool = False
    """Search the range on a log scale."""
    zero: bool = False
    """Allow 0 beside the range: a task is dropped."""
    step: int | None = None
    """Distance of neighbours in a range of whole numbers; 1 if left out."""
    choices: tuple[Any, ...] | None = None
    """The values themselves, instead of a range."""

    def __str__(self) -> str:
        if self.choices is not None:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        step = f" by {self.step}" if self.step else ""
        return f"{self.low} to {self.high}{step}{' on a log scale' if self.log else ''}{', or 0' if self.zero else ''}"

    def nearest(self, value: Any) -> Any:
        """What the dimension holds nearest to a value: the value itself where it is inside."""
        if self.choices is not None:
            numeric = not isinstance(value, (str, bool))
            other = min(self.choices, key=lambda choice: abs(choice - value)) if numeric else self.choices[0]
            return value if value in self.choices else other
        assert self.low is not None and self.high is not None
        if self.zero and value == 0:
            return value
        inside = min(max(value, self.low), self.high)
        return self.low + round((inside - self.low) / self.step) * self.step if self.step else inside

    def corners(self, kind: Any) -> Iterator[tuple[str, Any]]:
        """Values that stand for all: choices, or the ends, the first step, 0; each with its message's beginning."""
        yield from (("a choice of {} is", choice) for choice in self.choices or ())
        yield from ((f"{key} of {{}} is", end) for key in ("low", "high") if (end := getattr(self, key)) is not None)
        if kind is int and isinstance(self.low, int):
            yield "step of {} leads to", self.low + (self.step if isinstance(self.step, int) else 1)
        if self.zero:
            yield "zero of {} allows", 0

    def problems(self, name: str, where: str) -> Iterator[str]:
        """What cannot be used for the field `name`, one sentence each; `where` is its name and place in them."""
        kind = FIELDS[name]
        for key, value in (("log", self.log), ("zero", self.zero)):
            yield from [] if isinstance(value, bool) else [f"{key} of {where} is {value!r}; give true or false"]
        corners = [(label.format(where), value, _unfit(value, kind)) for label, value in self.corners(kind)]
        wrong = [f"{label} {value!r}: {said}" for label, value, said in corners if said]
        if self.choices is not None:
            yield from (*wrong, *self._choice_problems(where, list(self.choices)))
        elif kind not in (int, float):
            yield f"{where} is a range, but the field holds no numbers; give a list of choices"
        elif self.low is None or self.high is None:
            yield from (
                *wrong,
                f"{where} has no {'low' if self.low is None else 'high'}; give low and high, or choices",
            )
        else:
            yield from wrong or self._range_problems(where, self.low, self.high, kind)

    def _choice_problems(self, where: str, choices: list[Any]) -> Iterator[str]:
        if not choices:
            yield f"choices of {where} are empty; give at least one value"
        for value in [value for place, value in enumerate(choices) if choices.index(value) < place]:
            yield f"choices of {where} hold {value!r} twice; give each value once"
        if others := [key for key in _given(self) if key != "choices"]:
            yield f"{where} has choices and {', '.join(others)}; give a range, or choices with 0 among them or not"

    def _range_problems(self, where: str, low: float, high: float, kind: Any) -> Iterator[str]:
        step: Any = 1 if self.step is None else self.step
        if low >= high:
            yield f"low of {where} is {low} and high is {high}; give a low below high, or null to hold the field still"
        if self.log and low <= 0:
            yield f'low of {where} is {low}, but a log scale has no 0; raise low and add "zero": true, or leave out log'
        if self.step is not None and (kind is float or self.log):
            yield f"step of {where} is {step!r}; only whole numbers on a linear scale have one: leave it out"
        elif _unfit(step, int) or step < 1:
            yield f"step of {where} is {step!r}; give a whole number from 1"
        elif kind is int and low < high and (high - low) % step:
            reached = low + max(1, (high - low) // step) * step
            yield f"step of {where} is {step} and does not lead from {low} to {high}; give high {reached}"


@dataclass(frozen=True)
class Space:
    """Fields that vary in a study: in the configuration's order and types, choices ascending, so that equal
    spaces give equal studies however they were written. Raises SpaceError with all problems together."""

    dimensions: Mapping[str, Dimension]
    """How each field varies, by its dotted name: loss.depth, stages.baseline.epochs."""

    def __post_init__(self) -> None:
        named = self.dimensions.items()
        problems = [said for name, item in named for said in _name_problems(name, name) or item.problems(name, name)]
        if not self.dimensions:
            problems = [f"it is empty; let a field vary: --vary 'loss.depth={_RANGE}'"]
        elif not problems and all(item.choices and len(item.choices) == 1 for _, item in named):
            problems = [f"{name} is {item} alone, and so the space is one point; add a choice" for name, item in named]
        if problems:
            raise SpaceError(problems)
        ordered = {name: _typed(self.dimensions[name], FIELDS[name]) for name in FIELDS if name in self.dimensions}
        object.__setattr__(self, "dimensions", ordered)

    def suggest(self, trial: "BaseTrial") -> dict[str, Any]:
        """Ask Optuna for a point: values by dotted field name, 0 for what is off.

        A field with `zero` is asked for in two steps, its switch `<name>.on` and, where that is on, the range.
        Drawn at random it is on in one trial of two: each of the eight subsets of three tasks, the paper's
        Table 2, is as likely as the next. A finished trial gives back the point that it had.
        """
        values: dict[str, Any] = {}
        item: Any
        for name, item in self.dimensions.items():
            if item.choices is not None:
                values[name] = trial.suggest_categorical(name, item.choices)
            elif item.zero and not trial.suggest_categorical(name + SWITCH, (True, False)):
                values[name] = FIELDS[name](0)
            elif FIELDS[name] is int:
                values[name] = trial.suggest_int(name, item.low, item.high, step=item.step or 1, log=item.log)
            else:
                values[name] = trial.suggest_float(name, item.low, item.high, log=item.log)
        return values

    def configure(self, base: Config, values: Mapping[str, Any]) -> Config:
        """`base` with the values of a point; what else `values` hold, such as switches, is no part of it."""
        config: Config = _with(base, {name: values[name] for name in self.dimensions})
        return config

    def nearest(self, config: Config) -> dict[str, Any]:
        """The point nearest to a configuration: values by dotted field name."""
        return {name: item.nearest(attrgetter(name)(config)) for name, item in self.dimensions.items()}

    def parameters(self, config: Config) -> dict[str, Any]:
        """Optuna's parameters under which `suggest` gives this configuration's values; what one enqueues.

        Raises SpaceError that names each field whose value lies outside.
        """
        values = {name: attrgetter(name)(config) for name in self.dimensions}
        outside = {name: value for name, value in values.items() if self.dimensions[name].nearest(value) != value}
        if outside:
            said = (f"{name} is {value}; give {self.dimensions[name]}, or widen it" for name, value in outside.items())
            raise SpaceError(list(said))
        switches = {name + SWITCH: values[name] != 0 for name, item in self.dimensions.items() if item.zero}
        return switches | {name: value for name, value in values.items() if switches.get(name + SWITCH, True)}

    def stage_lengths(self, stage: str) -> tuple[int, ...]:
        """The lengths in epochs that the space can ask of a stage, ascending; none where its length is not varied."""
        item: Any = self.dimensions.get(f"stages.{stage}.epochs", Dimension(choices=()))
        if item.choices is not None:
            return tuple(item.choices)
        return tuple(sorted({*range(item.low, item.high + 1, item.step or 1), *([0] if item.zero else [])}))

    def to_json(self) -> str:
        """The space as JSON text, which `load_space` takes as a file and gives this space back."""
        removed = dict.fromkeys((*PAPER_POINT, *LENGTHS))
        return json.dumps(removed | {name: _given(item) for name, item in self.dimensions.items()}, indent=1) + "\n"


def default_space(base: Config) -> Space:
    """The three loss weights and the three stage lengths, around `base`, whose own point is always inside.

    A weight lies between a tenth and ten times the paper's, on a log scale whose middle is the paper's, or is
    0. Figure 5's best weights all lie there; beyond (segmentation 1 and 5, depth 10) its errors are worse than
    without the task. A stage lasts 1, 2 or 3 quanta of half its length in `base`, rounded up to whole epochs:
    a trial costs in the middle what `base` costs. A stage that `base` leaves out stays out.
    """
    dimensions = {}
    for name, paper in PAPER_POINT.items():
        own = attrgetter(name)(base) or paper
        dimensions[name] = Dimension(low=min(paper / 10, own), high=max(paper * 10, own), log=True, zero=True)
    for name in LENGTHS:
        if length := attrgetter(name)(base):
            dimensions[name] = Dimension(choices=tuple({-(-length * quanta // 2) for quanta in (1, 2, 3)}))
    return Space(dimensions)


def load_space(place: str | None, vary: Sequence[str], base: Config) -> Space:
    """The default space with what a JSON file (a path or URI) and then `vary` say of single fields.

    A file is an object by field, an item of `vary` is NAME=JSON. A field has {"low", "high"} with "log",
    "zero", "step" where wanted, or {"choices": [...]} or the list alone, in place of all that was said of it
    before; null lets it keep the value in `base`. Raises SpaceError with all problems together: a value that
    the configuration refuses, alone or with another field's, is one.
    """
    problems: list[str] = []
    asked = _asked(place, vary, problems)
    problems += [said for name, entry in asked.items() for said in _entry_problems(name, *entry, base)]
    if problems:
        raise SpaceError(problems)
    kept = {name: item for name, item in default_space(base).dimensions.items() if name not in asked}
    space = Space(kept | {name: _dimension(keys) for name, (keys, _) in asked.items() if keys is not None})
    if clashes := list(_clashes(space, base)):
        raise SpaceError(clashes)
    return space


def first_points(space: Space, base: Config) -> list[dict[str, Any]]:
    """Optuna's parameters of the points that a study starts with: `base`, the paper's weights, no task at all.

    Other fields are as in `base`, or the nearest that the space holds. Weights that the space does not hold
    are left out, equal points are given once.
    """
    points: list[dict[str, Any]] = []
    for weights in (
        {name: attrgetter(name)(base) for name in PAPER_POINT},
        PAPER_POINT,
        dict.fromkeys(PAPER_POINT, 0.0),
    ):
        config = space.configure(base, space.nearest(_with(base, weights)))
        if all(attrgetter(name)(config) == weight for name, weight in weights.items()):
            points.append(space.parameters(config))
    return [point for place, point in enumerate(points) if point not in points[:place]]


_KEYS = tuple(item.name for item in dataclasses.fields(Dimension))
_RANGE = '{"low": 0.06, "high": 6}'


def _asked(place: str | None, vary: Sequence[str], problems: list[str]) -> dict[str, tuple[Any, str]]:
    """What a file and then `vary` say of each field, and which of the two; what cannot be read joins `problems`."""
    said: dict[str, tuple[Any, str]] = {}
    if place is not None:
        content = _parsed(storage.read_bytes(place), place, problems)
        if isinstance(content, dict):
            said = {name: (keys, place) for name, keys in content.items()}
        elif not problems:
            problems.append(f'{place} is {content!r}; give an object of fields: {{"loss.depth": {_RANGE}}}')
    for item in vary:
        name, equals, text = (part.strip() for part in item.partition("="))
        if equals:
            said[name] = (_parsed(text, f"--vary {name}", problems), "--vary")
        else:
            problems.append(f"--vary {item!r} has no =; write --vary 'loss.depth={_RANGE}'")
    return {name: ({"choices": keys} if isinstance(keys, list) else keys, by) for name, (keys, by) in said.items()}


def _parsed(text: str | bytes, place: str, problems: list[str]) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        problems.append(f"{place} is no JSON: {error}; write a range {_RANGE}, a list of choices, or null")
        return None


def _name_problems(name: str, where: str) -> list[str]:
    if name in FIXED:
        return [f"{where} cannot vary: {FIXED[name]}"]
    return [] if name in FIELDS else [f"{where} is no field; {_nearest(name, FIELDS, 'see --help')}"]


def _nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"is it {near[0]}?" if near else otherwise


def _entry_problems(name: str, keys: Any, place: str, base: Config) -> Iterator[str]:
    """What is wrong with what a file or --vary says of one field."""
    where = f"{name} in {place}"
    if keys is None and name in FIELDS:
        return
    if wrong := _name_problems(name, where):
        yield from wrong
    elif not isinstance(keys, dict):
        yield f"{where} is {keys!r}; give a range {_RANGE}, a list of choices, or null to keep the preset's value"
    elif strange := [key for key in keys if key not in _KEYS]:
        otherwise = f"keys are {', '.join(_KEYS)}"
        yield from (f"{key} of {where} is no key; {_nearest(key, _KEYS, otherwise)}" for key in strange)
    elif not isinstance(choices := keys.get("choices"), list | None):
        yield f"choices of {where} are {choices!r}; give a list"
    else:
        dimension, kind = _dimension(keys), FIELDS[name]
        yield from dimension.problems(name, where)
        for label, corner in ((label, corner) for label, corner in dimension.corners(kind) if not _unfit(corner, kind)):
            value = float(corner) if kind is float else corner
            if reasons := "; ".join(_refusals(base, {name: value})):
                yield f"{label.format(where)} {value}; {reasons.removeprefix(f'{name} is {value}; ')}"


def _refusals(base: Config, values: Mapping[str, Any]) -> list[str]:
    """The configuration's own reasons against values."""
    try:
        _with(base, values)
    except ConfigError as error:
        return error.problems
    return []


def _clashes(space: Space, base: Config) -> Iterator[str]:
    """Pairs of fields whose values are valid alone and not together, each pair once."""
    corners = {name: [value for _, value in item.corners(FIELDS[name])] for name, item in space.dimensions.items()}
    for first, second in itertools.combinations(corners, 2):
        for one, other in itertools.product(corners[first], corners[second]):
            if reasons := _refusals(base, {first: one, second: other}):
                yield f"{first} {one} with {second} {other}: {'; '.join(reasons)}"
                break


def _dimension(keys: Mapping[str, Any]) -> Dimension:
    given: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    return Dimension(**given)


def _unfit(value: Any, kind: Any) -> str:
    """Why a value is not of a field's type; nothing is converted but whole numbers to float."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        return error.errors(include_url=False)[0]["msg"].lower()
    return ""


def _typed(dimension: Dimension, kind: Any) -> Dimension:
    if dimension.choices is not None:
        choices = sorted(map(float, dimension.choices) if kind is float else dimension.choices)
        return dataclasses.replace(dimension, choices=tuple(choices))
    return dataclasses.replace(dimension, low=kind(dimension.low), high=kind(dimension.high))


def _given(dimension: Dimension) -> dict[str, Any]:
    """What of a dimension is not left out."""
    items = ((item, getattr(dimension, item.name)) for item in dataclasses.fields(dimension))
    return {item.name: value for item, value in items if value != item.default}


def _with(group: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A group of the configuration with the values of some fields, by dotted name."""
    changed = {}
    for item in dataclasses.fields(group):
        name, value = prefix + item.name, getattr(group, item.name)
        if dataclasses.is_dataclass(value):
            changed[item.name] = _with(value, values, f"{name}.")
        elif name in values:
            changed[item.name] = FIELDS[name](values[name]) if FIELDS[name] is float else values[name]
    return dataclasses.replace(group, **changed)
