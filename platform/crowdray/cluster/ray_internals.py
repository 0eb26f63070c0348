"""Everything without a public name in Ray; pyproject.toml pins the minor version that was tested."""

from contextlib import suppress
from dataclasses import dataclass

_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ClusterLimits:
    """How far an autoscaler may grow the cluster."""

    resources: dict[str, float]
    """Most of each resource."""
    node_cpus: tuple[int, ...]
    """CPUs of each node that may run at once."""


def cluster_limits() -> ClusterLimits | None:
    """Read the autoscaler's limits; None where the cluster has a fixed size."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    if not most:
        return None
    groups = state.get_cluster_config().node_group_configs
    cpus = (int(group.resources["CPU"]) for group in groups for _ in range(_node_limit(group.max_count)))
    return ClusterLimits(dict(most), tuple(cpus))


def reload_settings() -> None:
    """Make Ray read its environment variables again, in case it was imported before they were set."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


def shut_down() -> None:
    """Disconnect, and end all processes of a node that this process started; Ray lets workers outlive it by seconds."""
    import psutil  # Ray has it
    import ray
    from ray._private import worker

    node = worker._global_node
    servers: list[int] = [info.process.pid for infos in node.all_processes.values() for info in infos] if node else []
    processes = []
    for pid in servers:
        with suppress(psutil.NoSuchProcess):
            processes += psutil.Process(pid).children(recursive=True)
    ray.shutdown(wait_for_processes=True)
    _, running = psutil.wait_procs(processes, timeout=0)
    for process in running:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(running, timeout=_KILL_TIMEOUT_S)


def ray_train_error() -> type[Exception]:
    """Base class of Ray Train's errors, those that it does not export among them."""
    from ray.train.v2._internal.exceptions import RayTrainError

    return RayTrainError


def start_timeout_error() -> type[Exception]:
    """Error of a group of workers that could not start for lack of resources."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return WorkerGroupStartupTimeoutError


def _node_limit(count: int) -> int:
    """Nodes that a group may have; Ray says -1 for an unlimited group."""
    return count if count >= 0 else 1000
