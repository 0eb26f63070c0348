"""The command line of the jobs: their arguments as dataclasses, their mistakes as one message and a
status."""

import dataclasses
import difflib
import functools
import json
import operator
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro
from rich.console import Console

from crowdray import storage
from crowdray.config import Config, ConfigError, from_json
from crowdray.datasets.sources import SOURCES
from crowdray.errors import JobFailed, UserError
from crowdray.presets import preset

Job = TypeVar("Job")

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
"""Exit status of a job: done, failed, invalid input, Ctrl-C."""


def run_job(main: Callable[[list[str]], None]) -> None:
    """Run a job with the command line's arguments and exit with its status.

    UserError, JobFailed and KeyboardInterrupt are printed as one message. Every other exception is a bug and keeps its
    traceback.
    """
    sys.path.append(os.getcwd())  # custom backbones are imported from here; Ray's workers search it too
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(_print_error(error, EXIT_USAGE))
    except JobFailed as error:
        sys.exit(_print_error(error, EXIT_FAILED))
    except KeyboardInterrupt:
        sys.exit(_print_error("interrupted; run the same command again to resume", EXIT_INTERRUPTED))


def _print_error(message: object, status: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def parse(job: type[Job], arguments: Sequence[str], prog: str, description: str | None = None) -> Job:
    """Arguments as an instance of the dataclass `job`; prints help or what is wrong and exits as usual.

    The help opens with `description`, else with the docstring of the job.
    """
    _refuse_repeated(arguments)
    return tyro.cli(job, args=list(arguments), prog=prog, description=description)


def parse_with_config(job: type[Job], arguments: Sequence[str], prog: str) -> Job:
    """Like `parse` for a dataclass with a field `config`, whose defaults come from the preset that --preset
    names.

    Any field of the configuration can be overridden by its dotted name: --stages.joint.epochs 20. Raises
    ConfigError with all problems of all overrides together.
    """
    _refuse_repeated(arguments)
    chosen = next(_values("--preset", arguments), None)
    base = Config() if chosen is None else load_preset(chosen)
    if problems := list(dict.fromkeys(_override_problems(base, arguments))):
        raise ConfigError(problems)
    required = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(cast(Any, job))
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    default: Job = cast(Any, job)(**required, config=base)
    return tyro.cli(job, args=list(arguments), prog=prog, default=default, config=(tyro.conf.FlagConversionOff,))


def named_source(job: type, arguments: Sequence[str]) -> str | None:
    """The source that a conversion names, the first such word that is no option's value; None when it names none."""
    valued = {f"--{field.name}" for field in dataclasses.fields(job) if field.type is not bool}
    words = (word for before, word in pairwise(["", *arguments]) if before not in valued)
    return next((word for word in words if word in SOURCES), None)


def refuse_strange_options(job: type, source: str | None, own: Collection[str], arguments: Sequence[str]) -> None:
    """Raise UserError for options that are neither the job's nor among the source's `own`."""
    known = {field.name for field in dataclasses.fields(job)} | {*own, "help"}
    names = (word.partition("=")[0].removeprefix("--no-").removeprefix("--") for word in arguments if word[:2] == "--")
    strange = sorted({name for name in names if name.replace("-", "_") not in known})
    if source and strange:
        more = f"; its own options are --{', --'.join(own)}" if own else ""
        raise UserError(f"{source} knows no --{', no --'.join(strange)}; leave that out{more}")


def load_preset(choice: str) -> Config:
    """The preset of that name, or the configuration in a JSON file, such as the config.json beside trained
    weights."""
    if choice.endswith(".json"):
        return from_json(storage.read_bytes(choice), choice)
    return preset(choice)


def tracking_uri(root: Path) -> str:
    """Where MLflow keeps its record: MLFLOW_TRACKING_URI, else a file at the repository's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


def write_json(place: str | None, content: Mapping[str, Any]) -> None:
    """Write a job's result for machines where --json asks for it."""
    if place is not None:
        storage.write_bytes(place, (json.dumps(content, indent=1) + "\n").encode())


def console() -> Console:
    """Where jobs draw: a terminal's own width, a wide page in a log so that no table is cut."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def _values(option: str, arguments: Sequence[str]) -> Iterator[str]:
    """What follows an option, as in --option value and --option=value; - and _ are the same in names."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option.replace("_", "-"):
            yield value if equals else following


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Raise UserError for an option that is there twice: tyro would take its last mention and drop the others."""
    names = [word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")]
    if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UserError(f"{repeated[0]} is given twice; give it once, with all its values behind it")


def _override_problems(base: Config, arguments: Sequence[str]) -> Iterator[str]:
    """What is wrong with each override alone: a name that is no field, a value of another type, or out of
    range."""
    fields = dict(_leaves(dataclasses.asdict(base)))
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and "." in name and name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            yield f"--{name} is no field of the configuration; " + (f"is it --{near[0]}?" if near else "see --help")
    for name in fields:
        for text in _values(f"--{name}", arguments):
            content = dataclasses.asdict(base)
            *groups, leaf = name.split(".")
            functools.reduce(operator.getitem, groups, content)[leaf] = text
            try:
                from_json(json.dumps(content), "the command line")
            except ConfigError as error:
                yield from error.problems


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
