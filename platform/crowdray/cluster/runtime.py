"""Connection to a Ray cluster, and the resources that it offers."""

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crowdray import credentials
from crowdray.cluster.ray_internals import cluster_limits, reload_settings
from crowdray.config import Device
from crowdray.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the package; Ray copies it to the workers, which need only its dependencies."""

MAX_RETRIES = 3
"""Restarts of a task, a worker group or a trial that lost a process or a node."""

_OBJECT_STORE_BYTES = 128 * 2**20
"""Object store of a local cluster: our objects are small, Ray's default is a third of the memory."""

_DRIVER_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; the current one warns at every start
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a late call from a thread would start a new cluster after shutdown
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray polls reports this often; its 2 s would delay short epochs
}
_WORKER_ENV = {
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a trial still running after this loses its slot for good; Ray's is 2 s
}


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a cluster."""

    cpus: int
    """CPUs that workers can reserve, counting the nodes that an autoscaler may still add."""
    gpus: int
    """GPUs, counted the same way."""
    local: bool
    """Whether the cluster is one that this process started on this machine."""
    node_cpus: tuple[int, ...] = ()
    """CPUs of each running node."""
    max_node_cpus: tuple[int, ...] = ()
    """CPUs of each node at the autoscaler's maximum, running nodes included; empty without an autoscaler."""


@contextmanager
def connect(dashboard: bool = False) -> Iterator[Resources]:
    """Connect to the cluster at RAY_ADDRESS, or start a local one for the duration of the block.

    Only a local cluster is shut down afterwards.

    Args:
        dashboard: Serve the dashboard of a local cluster on the loopback interface.

    Raises:
        UserError: The connection fails, or this process is connected already.
    """
    for name, value in _DRIVER_ENV.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS", "")
    local = address in ("", "local")
    if local:
        _enable_token_auth()
    import ray

    if ray.is_initialized():
        raise UserError("this process is connected to Ray already; call ray.shutdown() first")
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    runtime_env: dict[str, Any] = {"py_modules": [str(PACKAGE)], "env_vars": _WORKER_ENV}
    if hidden := dict(credentials.hidden):
        # Ray keeps a hook in memory, and writes other parts of a runtime environment into logs.
        runtime_env["worker_process_setup_hook"] = lambda: credentials.hidden.update(hidden)
    own: dict[str, Any] = {"include_dashboard": dashboard, "object_store_memory": _OBJECT_STORE_BYTES} if local else {}
    try:
        ray.init(
            address or "local",
            runtime_env=runtime_env,
            log_to_driver=False,  # workers answer with reports and exceptions
            logging_level=logging.ERROR,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        action = "start Ray on this machine" if local else f"connect to the Ray cluster at RAY_ADDRESS={address}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "" if local else "; start it, correct the address, or unset RAY_ADDRESS to run on this machine"
        raise UserError(f"cannot {action}: {reason}{fix}") from error
    try:
        yield _resources(local)
    finally:
        ray.shutdown()


def node_resources() -> dict[str, float]:
    """Resources of the node of this process."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    return next(entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == node)  # type: ignore[no-untyped-call]


def deletion_warning(uri: str) -> str:
    """Warn that `uri` lies in the working directory of this Ray job, which Ray deletes; empty elsewhere."""
    if "/runtime_resources/" not in uri:
        return ""
    return f"{uri} is deleted when this Ray job ends; set --storage and MLFLOW_TRACKING_URI to keep the results"


def run_in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Start a blocking Ray call in a thread, so that Ctrl-C reaches this process and not Ray's signal handler.

    Returns:
        The thread, and a list that holds the exception of `work` once it has raised one.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="crowdray-ray", daemon=True)
    thread.start()
    return thread, errors


def choose_gpu(resources: Resources, workers: int, device: Device) -> bool:
    """Whether each worker gets a GPU.

    Args:
        device: "auto" uses GPUs if the cluster has one for each worker.

    Raises:
        UserError: The cluster is too small for all workers to run at once.
    """
    cluster = "this machine" if resources.local else "the Ray cluster"
    available = f"{cluster} has {resources.cpus} CPUs and {resources.gpus} GPUs"
    if workers < 1:
        raise UserError(f"--workers is {workers}; give at least 1")
    if resources.cpus < workers:
        raise UserError(
            f"{workers} workers need a CPU each, {available}: give --workers {max(1, resources.cpus)}"
            + ("" if resources.local else ", or add nodes")
        )
    wants_gpu = device == "gpu" or (device == "auto" and resources.gpus > 0)
    if wants_gpu and resources.gpus < workers:
        fewer = f"--workers {resources.gpus}, or " if resources.gpus else ""
        raise UserError(f"{workers} workers need a GPU each, {available}: give {fewer}--device cpu")
    return wants_gpu


def _enable_token_auth() -> None:
    """Require a token on the ports of a local cluster: they are open to the network and accept code to run.

    The token exists only in the environment of this process and its children.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        reload_settings()  # Ray reads the environment at import, which may have happened earlier


def _resources(local: bool) -> Resources:
    import ray

    total = dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
    limits = None if local else cluster_limits()
    if limits:
        total |= {name: max(total.get(name, 0), value) for name, value in limits.resources.items()}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return Resources(
        cpus=int(total.get("CPU", 0)),
        gpus=int(total.get("GPU", 0)),
        local=local,
        node_cpus=tuple(int(node.get("CPU", 0)) for node in alive),
        max_node_cpus=limits.node_cpus if limits else (),
    )
