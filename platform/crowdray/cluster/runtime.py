"""Connection to a Ray cluster, and the resources that it offers."""

import logging
import os
import secrets
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crowdray import credentials, storage
from crowdray.cluster.ray_internals import cluster_limits, reload_settings, shut_down
from crowdray.config import Device
from crowdray.errors import RESUME_HINT, JobFailed, UserError, first_line
from crowdray.storage.scratch import PARENT

PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the package; Ray copies it to the workers, which need only its dependencies."""

MAX_RETRIES = 3
"""Restarts of a task, a worker group or a trial that lost a process or a node."""

START_LIMIT_S = {True: 600.0, False: 3600.0}
"""Seconds to wait for workers to start, by whether the cluster is local: a shared one may be busy, or still growing."""
_START_REPORT_S = 30.0
"""Seconds between two messages about what is waited for."""

_MAX_TEMP_BYTES = 20
"""Longest path above Ray's folder: its sockets' paths, 85 bytes longer, may have 107."""

_OBJECT_STORE_BYTES = 128 * 2**20
"""Object store of a local cluster: our objects are small, Ray's default is a third of the memory."""

_DRIVER_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; the current one warns at every start
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a late call from a thread would start a new cluster after shutdown
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # Ray polls reports this often; its 2 s would delay short epochs
}
_LOCAL_ENV = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # elsewhere too, Ray then listens on the loopback interface only
}
ALLOCATOR_ENV = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
"""Settings of glibc for workers: its defaults return the large tensors of each training step to the system, and clear
new pages for those of the next one (benchmarks/allocator.py). Higher thresholds fragment the heap by gigabytes."""

_WORKER_ENV = {
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a trial still running after this loses its slot for good; Ray's is 2 s
    **ALLOCATOR_ENV,
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
    address = os.environ.get("RAY_ADDRESS", "")
    local = address in ("", "local")
    for name, value in (_DRIVER_ENV | (_LOCAL_ENV if local else {})).items():
        os.environ.setdefault(name, value)
    if local:
        _enable_token_auth()
    import ray

    if ray.is_initialized():
        raise UserError("this process is connected to Ray already; call ray.shutdown() first")
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with ExitStack() as folders:
        environment, options = dict(_WORKER_ENV), dict[str, Any]()
        runtime_env: dict[str, Any] = {"py_modules": [str(PACKAGE)], "env_vars": environment}
        if hidden := dict(credentials.hidden):
            # Ray keeps a hook in memory, and writes other parts of a runtime environment into logs.
            runtime_env["worker_process_setup_hook"] = lambda: credentials.hidden.update(hidden)
        if local:
            # Ray lets everybody write into its folders, which hold the code that workers run; this one is private.
            options["_temp_dir"] = str(folders.enter_context(storage.scratch_folder("ray", _parent_of_ray_folder())))
            options |= {"include_dashboard": dashboard, "object_store_memory": _OBJECT_STORE_BYTES}
            environment[PARENT] = str(folders.enter_context(storage.scratch_folder("workers")))
            if sys.platform == "linux":
                environment["GLOO_SOCKET_IFNAME"] = environment["NCCL_SOCKET_IFNAME"] = "lo"
            if (quoted := shlex.quote(sys.executable)) != sys.executable:
                runtime_env["py_executable"] = quoted  # Ray passes it to a shell as it is (ray-project/ray#5288)
        try:
            _init(address or "local", runtime_env=runtime_env, **options)
            yield _resources(local)
        finally:
            shut_down()


def wait_for_workers(
    resources: Resources,
    workers: int,
    per_worker: Mapping[str, float],
    on_status: Callable[[str], None],
) -> None:
    """Wait until all workers can run at once and the process of one has started.

    Args:
        per_worker: Resources that each worker reserves.
        on_status: Receives messages about what is waited for.

    Raises:
        JobFailed: The workers cannot start, or not within START_LIMIT_S.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    demand = {name: number for name, number in per_worker.items() if number}
    started, limit = time.monotonic(), START_LIMIT_S[resources.local]
    group = placement_group([demand] * workers)
    try:
        ready = group.ready()
        while not ray.wait([ready], timeout=min(_START_REPORT_S, limit))[0]:
            wanted = f"{workers} worker{'s' * (workers > 1)} with {_listed(demand)}{' each' * (workers > 1)}"
            free = _listed(ray.available_resources())  # type: ignore[no-untyped-call]
            state = f"the cluster has {resources.cpus} CPU and {resources.gpus} GPU, free are {free}"
            if (waited := time.monotonic() - started) >= limit:
                fix = "end other programs" if resources.local else "free some, add nodes or give fewer --workers"
                late = f"{wanted} did not start within {limit / 60:.0f} min"
                raise JobFailed(f"{late}: {state}; {fix}, then {RESUME_HINT}")
            on_status(f"waiting {waited:.0f} s for {wanted}: {state}; giving up after {limit / 60:.0f} min")
        ray.get(ready)
    except ray.exceptions.RayError as error:
        raise JobFailed(f"no worker can be started: {first_line(error)}; {RESUME_HINT}") from error
    finally:
        remove_placement_group(group)


def _listed(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _init(address: str, **options: Any) -> None:
    """Call ray.init, which replaces the handler of SIGTERM by one that exits."""
    import ray

    handler, terminated = signal.getsignal(signal.SIGTERM), False
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)  # workers answer with reports
    except Exception as error:  # Ray raises the base class where its processes start too slowly
        if address == "local":
            action, fix = "start Ray on this machine", "end other programs if it is busy, then run the command again"
        else:
            action = f"connect to the Ray cluster at RAY_ADDRESS={address}"
            fix = "start it, correct the address, or unset RAY_ADDRESS to run on this machine"
        raise UserError(f"cannot {action}: {first_line(error).rstrip('.')}; {fix}") from error
    except SystemExit:
        terminated = True
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    if terminated:
        signal.raise_signal(signal.SIGTERM)


def _parent_of_ray_folder() -> str:
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return temporary if len(os.fsencode(temporary)) <= _MAX_TEMP_BYTES else "/tmp"


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
