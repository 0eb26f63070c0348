"""Submission of a command to the job server of a Ray cluster."""

import asyncio
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from crowdray import storage
from crowdray.cluster.runtime import PACKAGE
from crowdray.errors import JobFailed, UserError, first_line
from crowdray.registry.provenance import UNKNOWN, git_revision

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
"""Address of a job server on this machine."""
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

_POLL_S = 1.0
_IGNORED = shutil.ignore_patterns("__pycache__", ".*")


@dataclass(frozen=True)
class SubmittedJob:
    """A job on a cluster."""

    client: "JobSubmissionClient"
    id: str

    def follow(self, on_output: Callable[[str], None]) -> int:
        """Pass on the job's output until it ends; returns the exit status of its command.

        Raises:
            JobFailed: The job was stopped, or the cluster does not answer any more.
        """
        with suppress(RuntimeError, OSError):  # a lost connection; the job continues
            asyncio.run(self._tail(on_output))
        try:
            while not (info := self.client.get_job_info(self.id)).status.is_terminal():
                time.sleep(_POLL_S)
        except (RuntimeError, OSError) as error:
            raise JobFailed(
                f"the cluster does not answer any more ({first_line(error)}); {self.id} may run on"
            ) from error
        if info.status == "SUCCEEDED":
            return 0
        if info.status == "FAILED" and info.driver_exit_code and info.driver_exit_code > 0:
            return info.driver_exit_code
        raise JobFailed(f"the job {self.id} is {info.status.lower()}: {info.message}")

    async def _tail(self, on_output: Callable[[str], None]) -> None:
        async for text in self.client.tail_job_logs(self.id):
            on_output(text)


def submit(
    arguments: Sequence[str],
    address: str,
    *,
    files: Iterable[str] = (),
    modules: Iterable[str] = (),
    variables: Mapping[str, str],
) -> SubmittedJob:
    """Send this package to a cluster and start one of its commands there.

    Nothing else of the current folder is sent, and of the environment only `variables` and the git revision.

    Args:
        arguments: The command and its arguments.
        address: Of the job server.
        files: Relative paths of files in the current folder that the command reads.
        modules: Importable modules or packages below the current folder that it imports.
        variables: Environment variables of the command.

    Raises:
        UserError: The job server does not answer, or rejects the job.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.INFO)  # Ray's client sets the levels of its loggers itself
    revision = git_revision(PACKAGE)
    known = {} if revision == UNKNOWN else {"CROWDRAY_GIT_REVISION": revision}
    os.environ[_ADDRESS_VARIABLES[0]] = address  # for the client, these variables precede its argument
    with storage.scratch_folder("submit") as folder:
        _stage(folder, files, modules)
        try:
            client = JobSubmissionClient(address)
            job = client.submit_job(
                entrypoint=shlex.join(["python", "-m", "crowdray.console.main", *arguments]),
                runtime_env={"working_dir": str(folder), "env_vars": {**known, **variables}},
            )
        except AuthenticationError as error:
            fix = "set RAY_AUTH_MODE=token, and its token as RAY_AUTH_TOKEN or in ~/.ray/auth_token"
            raise UserError(f"the Ray cluster at {address} refuses this user: {fix}") from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = first_line(error).rstrip(".")
            fix = "give --address the job server of a running cluster, such as http://HOST:8265"
            raise UserError(f"cannot submit to the Ray cluster at {address}: {reason}; {fix}") from error
    return SubmittedJob(client, job)


def default_address() -> str:
    """The address that Ray's own commands would use."""
    return next(filter(None, map(os.environ.get, _ADDRESS_VARIABLES)), ADDRESS)


def _stage(folder: Path, files: Iterable[str], modules: Iterable[str]) -> None:
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=_IGNORED)
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path)
    for module in modules:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise UserError(f"the module {module} cannot be sent: it is not a file or a package with __init__.py")
        source = Path(spec.origin)
        if not source.is_relative_to(Path.cwd()):
            continue  # installed, as on the cluster's nodes
        if spec.submodule_search_locations:
            shutil.copytree(source.parent, folder / module, ignore=_IGNORED)
        else:
            shutil.copy(source, folder / source.name)
