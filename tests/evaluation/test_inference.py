"""How a training counts: large photos in tiles, and nothing rounded that is a target or is told of a counter."""

import importlib
from typing import Any

import pytest
import torch

from crowdray.data.shards import Dataset
from crowdray.models.export import density_geometry
from crowdray.presets import preset
from crowdray.training.distributed import World
from crowdray.training.precision import set_tf32
from crowdray.training.trainer import Trainer


def training(discs: Dataset) -> Trainer:
    return Trainer(preset("debug"), discs, world=World(), device=torch.device("cpu"))


def test_large_photos_are_counted_in_tiles_as_if_whole(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = training(discs), []
    rows = discs.rows("train")

    def density(image: torch.Tensor) -> torch.Tensor:
        seen.append(image.shape[-1])
        return run.state.counter.density(image)

    whole = run._count(density, rows)
    assert set(seen) == {96}
    monkeypatch.setattr("crowdray.training.trainer.TILE", 32)
    geometry = density_geometry(run.state.counter)
    parts = run._count(density, rows)
    assert 32 <= max(seen[len(rows) :]) <= 32 + 2 * (geometry.reach + geometry.grid)
    assert [count.unmasked for count in parts] == pytest.approx([count.unmasked for count in whole], rel=1e-5)


def test_what_may_be_rounded_is_never_a_target_nor_what_is_told_of_a_counter(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TF32 is allowed: the switches are a process's own, and work without a GPU."""
    seen: dict[str, set[tuple[str, bool]]] = {}

    def noted(name: str, of: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            switches = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
            seen.setdefault(name, set()).add(switches)
            return of(*arguments, **named)

        return call

    for name, place in (
        ("build_targets", "stage_trainer"),
        ("task_losses", "stage_trainer"),
        ("count_images", "trainer"),
    ):
        module = importlib.import_module(f"crowdray.training.{place}")
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_tf32(True, torch.device("cuda"))
        run = training(discs)
        run.fit()
        seen.pop("count_images")  # validation may be in bf16
        run.evaluate("joint", discs.rows("test"))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    full, rounded = {("highest", False)}, {("high", True)}
    assert seen == {"build_targets": full, "task_losses": rounded, "count_images": full}
