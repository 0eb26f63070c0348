"""Everything without a public name in Ray; pyproject.toml pins the minor version that was tested."""

from dataclasses import dataclass


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


def ray_train_error() -> type[Exception]:
    """Base class of Ray Train's errors, those that it does not export among them."""
    from ray.train.v2._internal.exceptions import RayTrainError

    return RayTrainError


def _node_limit(count: int) -> int:
    """Nodes that a group may have; Ray says -1 for an unlimited group."""
    return count if count >= 0 else 1000
