"""Submitted Ray jobs: whether this process is one, and what it could not reach or would lose."""

import os
import re
from collections.abc import Mapping

from crowdray.errors import UserError


def in_ray_job() -> bool:
    """Whether Ray's job server started this process, in a working directory that it deletes afterwards."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_shared(paths: Mapping[str, str], *, tracked: bool, fix: str) -> None:
    """Raise UserError if a Ray job would not find its files on the cluster, or lose its results.

    Args:
        paths: Paths and URIs by the options that name them.
        tracked: Whether the job needs an MLflow server.
        fix: What else the user can do.
    """
    problems = [_tracking_problem(os.environ.get("MLFLOW_TRACKING_URI", ""))] if tracked else []
    problems += [
        f"{option} {path} is relative: give an absolute folder or a URI that all nodes reach, such as s3://bucket/name"
        for option, path in paths.items()
        if path and "://" not in path and not os.path.isabs(path)
    ]
    if problems := list(filter(None, problems)):
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(
            f"Ray deletes the working directory of a job when it ends, with all results in it:{listed}{fix}"
        )


def _tracking_problem(uri: str) -> str:
    example = "such as http://HOST:5000"
    if not uri:
        return (
            f"MLFLOW_TRACKING_URI is not set: set it to your MLflow server, {example}; for ray job submit with "
            """--runtime-env-json '{"env_vars": {"MLFLOW_TRACKING_URI": "http://HOST:5000"}}'"""
        )
    if re.match(r"sqlite:///[^/]", uri) or ("://" not in uri and not os.path.isabs(uri)):
        return f"MLFLOW_TRACKING_URI {uri} is relative: set it to your MLflow server, {example}"
    return ""
