"""Joining a Ray cluster, or starting one of our own for the length of a block."""

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crowdray.config import Device
from crowdray.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
"""The package's own folder: it is sent to the workers, who need to have nothing but its dependencies."""

_OBJECT_STORE_BYTES = 128 * 2**20
"""Room for objects of a local Ray: ours are small, while Ray's default takes a third of the memory."""

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # reports to Ray's makers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; the old one warns at each start
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that speaks to Ray after its end would start it anew
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an epoch's report is seen; 2 s would hold up short epochs
}


_WORKERS = {
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # for a stopped trial to end; after Tune's own 2 its place is lost for good
}


@dataclass(frozen=True)
class Resources:
    """What a cluster has, all nodes together."""

    cpus: int
    """CPUs that workers can reserve, once an autoscaler has added all the nodes that it may."""
    gpus: int
    """GPUs likewise."""
    local: bool
    """Whether it is this machine alone, started by us."""
    nodes: tuple[int, ...] = ()
    """CPUs of each node that is there."""
    further: tuple[int, ...] = ()
    """CPUs of each node that an autoscaler may have at once, those that are there among them."""


@contextmanager
def connect(dashboard: bool = False) -> Iterator[Resources]:
    """A Ray cluster for the length of a block: the one that RAY_ADDRESS names, else a local one of our own.

    dashboard: whether the local one has a dashboard, on this machine's loopback.

    A cluster that was joined is left as it was; a local one is shut down. Raises UserError when it cannot be
    joined, and when this process is in a cluster already.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS", "")
    local = address in ("", "local")
    if local:
        _protect()
    import ray

    if ray.is_initialized():
        raise UserError("this process is connected to Ray already; call ray.shutdown() first")
    _quieten()
    try:
        if local:
            ray.init("local", include_dashboard=dashboard, object_store_memory=_OBJECT_STORE_BYTES, **_common())
        else:
            ray.init(address, **_common())
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "start Ray on this machine" if local else f"join the Ray cluster at RAY_ADDRESS={address}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = "" if local else "; start it, correct the address, or unset RAY_ADDRESS to run on this machine"
        raise UserError(f"cannot {where}: {reason}{mend}") from error
    try:
        yield _resources(local)
    finally:
        ray.shutdown()


def passing_with_job(uri: str) -> str:
    """What to tell of a folder that Ray removes with the working directory of the job that we are; else nothing."""
    if "/runtime_resources/" not in uri:
        return ""
    return f"{uri} goes with this Ray job; --storage URI and MLFLOW_TRACKING_URI keep what it gives"


def beside(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Start Ray's own waiting in a thread, so that an interrupt reaches us and not Ray's handler of it.

    Gives the thread, and the list that will hold what the work raises.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="crowdray-ray", daemon=True)
    thread.start()
    return thread, raised


def choose_gpu(resources: Resources, workers: int, device: Device) -> bool:
    """Whether `workers` workers get a GPU each; a UserError in words where they cannot all run at once.

    device: "auto" takes GPUs where the cluster has enough of them.
    """
    place = "this machine" if resources.local else "the Ray cluster"
    there = f"{place} has {resources.cpus} CPUs and {resources.gpus} GPUs"
    if workers < 1:
        raise UserError(f"--workers is {workers}; give at least 1")
    if resources.cpus < workers:
        raise UserError(
            f"{workers} workers need a CPU each, {there}: give --workers {max(1, resources.cpus)}"
            + ("" if resources.local else ", or add nodes")
        )
    if device == "gpu" and resources.gpus < workers:
        fewer = f"give --workers {resources.gpus}" if resources.gpus else "give --device cpu"
        raise UserError(f"{workers} workers need a GPU each, {there}: {fewer}")
    if device == "auto" and 0 < resources.gpus < workers:
        raise UserError(
            f"{workers} workers are more than the GPUs, {there}: give --workers {resources.gpus}, "
            "or --device cpu to train on CPUs"
        )
    return device != "cpu" and resources.gpus >= workers


def _common() -> dict[str, Any]:
    return {
        "runtime_env": {"py_modules": [str(PACKAGE)], "env_vars": _WORKERS},
        "log_to_driver": False,  # what workers have to say comes back as reports and exceptions
        "logging_level": logging.ERROR,
    }


def _protect() -> None:
    """Close a local Ray to everyone else: its ports are open to the network, and whoever speaks to them runs
    code.

    The token lives in the environment of this process and its children and is written nowhere.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        from ray._raylet import Config  # type: ignore[attr-defined]

        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        Config.initialize("")  # whoever imported Ray earlier made it read the environment then


def _quieten() -> None:
    for name in ("ray", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _resources(local: bool) -> Resources:
    import ray
    from ray._private.state import state

    total = dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
    most = None if local else state.get_max_resources_from_cluster_config()
    if most:
        total |= {name: max(total.get(name, 0), value) for name, value in most.items()}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = tuple(int(node.get("CPU", 0)) for node in alive)
    groups = state.get_cluster_config().node_group_configs if most else ()
    further = [int(group.resources["CPU"]) for group in groups for _ in range(_count(group.max_count))]
    return Resources(int(total.get("CPU", 0)), int(total.get("GPU", 0)), local, nodes, tuple(further))


def _count(most: int) -> int:
    """Nodes that a group may have; Ray says -1 for a group without a bound."""
    return most if most >= 0 else 1000
