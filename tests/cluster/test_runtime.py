"""Choice of devices for the resources of a cluster."""

import pytest

from crowdray.cluster.runtime import Resources, choose_gpu
from crowdray.config import Device
from crowdray.errors import UserError


@pytest.mark.parametrize(
    ("resources", "workers", "device", "gpu"),
    [
        (Resources(4, 0, True), 2, "auto", False),
        (Resources(4, 2, True), 2, "auto", True),
        (Resources(4, 2, True), 4, "cpu", False),
        (Resources(4, 1, False), 1, "gpu", True),
    ],
)
def test_choose_gpu_uses_gpus_if_there_are_enough(
    resources: Resources, workers: int, device: Device, gpu: bool
) -> None:
    assert choose_gpu(resources, workers, device) is gpu


@pytest.mark.parametrize(
    ("resources", "workers", "device", "fix"),
    [
        (Resources(2, 0, True), 3, "auto", "this machine has 2 CPUs and 0 GPUs: give --workers 2"),
        (Resources(2, 0, False), 3, "auto", "the Ray cluster has 2 CPUs and 0 GPUs: give --workers 2, or add nodes"),
        (Resources(8, 1, True), 2, "auto", "give --workers 1, or --device cpu"),
        (Resources(8, 0, True), 1, "gpu", "give --device cpu"),
        (Resources(8, 0, True), 0, "auto", "give at least 1"),
    ],
)
def test_choose_gpu_with_too_many_workers_raises_with_the_fix(
    resources: Resources, workers: int, device: Device, fix: str
) -> None:
    with pytest.raises(UserError, match=fix):
        choose_gpu(resources, workers, device)
