"""`crowdray submit`: run a command on a Ray cluster and follow it."""

import dataclasses
import importlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from crowdray import credentials
from crowdray.cluster.ray_job import check_shared
from crowdray.config import BACKBONES
from crowdray.console.arguments import PROGRAM, parse, program, shared_paths
from crowdray.errors import UserError, shell_path

EXAMPLES = (
    "train --preset mall-cfcn --data s3://bucket/mall --storage s3://bucket/runs --workers 8",
    "--address http://127.0.0.1:8265 --no-wait tune --preset lite0 --data s3://bucket/market "
    "--storage s3://bucket/runs --trials 32",
)


@dataclass(frozen=True, kw_only=True)
class SubmitJob:
    """Run another command on a Ray cluster.

    The code of this package is sent, with the file of your own backbone and JSON files that the arguments name, and
    nothing else: data and results need URIs or folders that all nodes reach. MLFLOW_TRACKING_URI of this shell is set
    for the job. The log is shown until the job ends, and its exit status is returned.
    """

    command: Annotated[
        Literal["train", "tune", "ablate", "convert", "evaluate", "predict"],
        tyro.conf.Positional,
        tyro.conf.arg(name="COMMAND", metavar="COMMAND"),
    ]
    """The command: train, tune, ablate, convert, evaluate or predict. Its own arguments follow."""
    address: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Address of the cluster's job server; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
    http://127.0.0.1:8265."""
    no_wait: bool = False
    """Return once the job is submitted."""


def parse_arguments(arguments: list[str]) -> tuple[SubmitJob, list[str]]:
    """Parse the options; returns the command to submit too, with its arguments."""
    known = get_args(get_type_hints(SubmitJob)["command"])
    start = next((number for number, word in enumerate(arguments) if word in known), len(arguments))
    return parse(SubmitJob, arguments[: start + 1], "submit", examples=EXAMPLES), arguments[start:]


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    options, command = parse_arguments(arguments)
    uri = credentials.hide_credentials(os.environ.get("MLFLOW_TRACKING_URI", ""))
    job = importlib.import_module(f"crowdray.console.commands.{command[0]}").parse_arguments(command[1:])
    _check(job)

    # Imported late: help and usage errors do not wait for Ray.
    from crowdray.cluster.submit import default_address, submit

    address = options.address or default_address()
    variables = {PROGRAM: program("NAME")} | ({"MLFLOW_TRACKING_URI": uri} if uri else {})
    submitted = submit(command, address, files=_files(command), modules=_backbones(job), variables=variables)
    ray = f"{shell_path(Path(sys.executable).with_name('ray'))} job"
    server = f"--address {shlex.quote(address)}"
    print(f"submitted {submitted.id} to {address}", flush=True)
    hints = f"follow it: {ray} logs --follow {server} {submitted.id}\nstop it:   {ray} stop {server} {submitted.id}"
    if options.no_wait:
        print(hints)
        return
    try:
        status = submitted.follow(lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nthe job continues on the cluster\n{hints}", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)


def _check(job: Any) -> None:
    """Raise UserError for what the cluster could not reach, would lose, or would show to its users."""
    if secret := next(iter(credentials.hidden), ""):
        raise UserError(
            f"the credentials of {secret} would be visible on Ray's dashboard; leave them out, and set them in the "
            "environment of the cluster's nodes (docs/cluster.md)"
        )
    if not getattr(job, "ephemeral", False):
        tracked = hasattr(job, "ephemeral") or getattr(job, "model", "").startswith(("models:", "runs:"))
        check_shared(shared_paths(job), tracked=tracked, fix="")


def _files(command: Sequence[str]) -> Iterator[str]:
    """Yield the JSON files below the current folder that the arguments name, such as a configuration."""
    for path in (Path(word.rpartition("=")[2]) for word in command):
        below = not path.is_absolute() and ".." not in path.parts
        if below and path.suffix in (".json", ".geojson") and path.is_file():
            yield str(path)


def _backbones(job: Any) -> Iterator[str]:
    """Yield the top-level module of your own backbone, if the job has one."""
    if dataclasses.is_dataclass(config := getattr(job, "config", None)):
        backbone: str = config.model.backbone  # type: ignore[union-attr]
        if backbone not in BACKBONES:
            yield backbone.partition(":")[0].partition(".")[0]
