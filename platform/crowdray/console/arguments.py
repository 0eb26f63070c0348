"""Command-line arguments as dataclasses, with overrides of single configuration fields."""

import dataclasses
import difflib
import functools
import json
import operator
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro
from rich.console import Console

from crowdray import storage
from crowdray.cluster.ray_job import check_shared, in_ray_job
from crowdray.config import FIELDS, RENAMED_FIELDS, Config, ConfigError, from_json
from crowdray.console.help import HelpText, format_help
from crowdray.credentials import hide_credentials
from crowdray.errors import UserError, shell_path
from crowdray.presets import preset, preset_summaries
from crowdray.registry.connection import sqlite_uri

Job = TypeVar("Job")

RENAMED_OPTIONS = {"--store": "--stage-cache", "--store-gib": "--stage-cache-gib"} | {
    f"--{old}".replace("_", "-"): f"--{new}" for old, new in RENAMED_FIELDS.items()
}
"""Options that may still be given by their previous names, until the next version."""

PROGRAM = "CROWDRAY_PROGRAM"
"""Variable of a submitted job: how its user starts the command NAME."""

_SHARED = ("data", "source", "input", "storage", "stage_cache", "dest", "output", "json", "zones")
"""Options that take a path or URI."""


def parse(
    job: type[Job],
    arguments: Sequence[str],
    command: str,
    *,
    examples: Sequence[str] = (),
    lists: Mapping[str, Mapping[str, str]] | None = None,
) -> Job:
    """Parse arguments into the dataclass `job`; print help or a usage error and exit where asked.

    Args:
        job: Dataclass of the options; its docstring describes the command.
        arguments: The command line without the command.
        command: Name of the command, for the usage line.
        examples: Arguments of complete commands, for the help.
        lists: Titles, each with names and their meaning, for the help.
    """
    arguments = _current(arguments)
    text = HelpText(program(command), job.__doc__ or "", examples, lists or {})
    _print_help(job, arguments, text)
    return tyro.cli(job, args=arguments, prog=text.program)


def parse_with_config(job: type[Job], arguments: Sequence[str], command: str, *, examples: Sequence[str] = ()) -> Job:
    """Parse arguments into a dataclass with a field `config`, whose defaults are those of --preset.

    Each field of the configuration is an option by its dotted name: --stages.joint.epochs 20.

    Raises:
        ConfigError: All problems of all overrides.
    """
    arguments = _current(arguments)
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
    text = HelpText(program(command), job.__doc__ or "", examples, {"presets": preset_summaries()})
    _print_help(job, arguments, text, default)
    parsed = tyro.cli(job, args=arguments, prog=text.program, default=default)
    if in_ray_job() and not getattr(parsed, "ephemeral", False):
        fix = "\n  or give --ephemeral, to train without keeping the results"
        check_shared(shared_paths(parsed), tracked=True, fix=fix)
    return parsed


def program(command: str) -> str:
    """Return how to start a command from the user's folder, in the way and by the interpreter of this process."""
    if in_ray_job():  # on another machine
        return os.environ.get(PROGRAM, "jobs/NAME.py").replace("NAME", command)
    started = Path(sys.argv[0])
    if started.parent.name == "jobs":
        return f"{shell_path(Path(sys.executable))} {shell_path(started.absolute().with_name(f'{command}.py'))}"
    on_path = shutil.which(started.name) == str(started)
    return f"{started.name if on_path else shell_path(started.absolute())} {command}"


def shared_paths(job: Any) -> dict[str, str]:
    """Return the paths among the options of a job that all nodes of a cluster must reach, by option."""
    groups = [job, *(value for value in vars(job).values() if dataclasses.is_dataclass(value))]
    found = {name: getattr(group, name) for name in _SHARED for group in groups if hasattr(group, name)}
    return {f"--{name.replace('_', '-')}": path for name, path in found.items() if path}


def load_preset(name: str) -> Config:
    """Return the preset `name`, or the configuration in a JSON file such as the config.json of a run."""
    if name.endswith(".json"):
        return from_json(storage.read_bytes(name), name)
    return preset(name)


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI without credentials, else mlflow.db in the repository or the working directory."""
    root = Path(__file__).resolve().parents[3]
    folder = root if (root / "pyproject.toml").is_file() else Path.cwd()
    return hide_credentials(os.environ.get("MLFLOW_TRACKING_URI") or "") or sqlite_uri(folder / "mlflow.db")


def write_json(uri: str | None, content: Mapping[str, Any]) -> None:
    """Write the result of a job to the URI of --json, if given."""
    if uri is not None:
        storage.write_bytes(uri, (json.dumps(content, indent=1) + "\n").encode())


def console() -> Console:
    """Return a console as wide as the terminal; in a log, wide enough for every table."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=140)


def _print_help(job: type[Any], arguments: Sequence[str], text: HelpText, defaults: Any = None) -> None:
    """Print the help and exit, if an argument asks for it."""
    everything = "--help-all" in arguments
    if everything or {"-h", "--help"} & set(arguments):
        try:
            print(format_help(job, text, defaults=defaults, everything=everything), flush=True)
        except BrokenPipeError:  # as of `| head`; Python would complain about it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit()


def _current(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the current names of their options, which tyro accepts with "_" and with "-".

    Raises:
        UserError: An option is repeated; tyro would use the last one and drop the others.
    """
    current, seen = [], set[str]()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = RENAMED_OPTIONS.get(name.replace("_", "-"), name.replace("_", "-"))
            if name in seen:
                raise UserError(f"{name} is given twice; give it once, followed by all its values")
            seen.add(name)
        current.append(f"{name}{equals}{value}")
    return current


def _values(option: str, arguments: Sequence[str]) -> Iterator[str]:
    """Yield each value of an option, given as --option value or --option=value."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name == option:
            yield value if equals else following


def _override_problems(base: Config, arguments: Sequence[str]) -> Iterator[str]:
    """Yield the problems of all overrides: unknown fields, wrong types, values out of range or in conflict."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and "." in name and name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            yield f"--{name} is not a field of the configuration; " + (
                f"use --{close[0]}" if close else "see --help-all"
            )
    overrides = [(name, text) for name in FIELDS for text in _values(f"--{name.replace('_', '-')}", arguments)]
    problems = _problems(base, overrides)
    # The others as well: where one override has a wrong type, their ranges are not checked.
    others = [override for override in overrides if not set(_problems(base, [override])) & set(problems)]
    yield from problems
    yield from _problems(base, others) if problems else ()


def _problems(base: Config, overrides: Sequence[tuple[str, str]]) -> list[str]:
    content = dataclasses.asdict(base)
    for name, text in overrides:
        *groups, leaf = name.split(".")
        functools.reduce(operator.getitem, groups, content)[leaf] = text
    try:
        from_json(json.dumps(content), "the command line")
    except ConfigError as error:
        return error.problems
    return []
