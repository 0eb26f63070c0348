"""Counting by the trainer: in tiles, and in exact float32 where TF32 is allowed."""

import importlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from crowdray.data.shards import Dataset
from crowdray.models.export import density_geometry
from crowdray.training.precision import set_tf32

from ..support.trainers import trainer_of


def test_validate_in_tiles_equals_validate_on_whole_images(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, widths = trainer_of(discs), list[int]()
    encoder = trainer.state.counter.encoder
    encoder.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[-1]))
    whole = trainer.validate(nullcontext)
    assert set(widths) == {96}
    widths.clear()
    monkeypatch.setattr("crowdray.training.trainer.TILE", 32)
    tiled = trainer.validate(nullcontext)
    geometry = density_geometry(trainer.state.counter)
    assert len(widths) > whole.images and 32 <= max(widths) <= 32 + 2 * (geometry.reach + geometry.grid)
    assert tiled.mae_unmasked == pytest.approx(whole.mae_unmasked, rel=1e-5)


def test_tf32_is_used_for_losses_but_not_for_targets_and_evaluation(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switches are process-wide, and can be read without a GPU."""
    seen: dict[str, set[tuple[str, bool]]] = {}

    def record(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            switches = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
            seen.setdefault(name, set()).add(switches)
            return function(*args, **kwargs)

        return call

    for name, module_name in (
        ("build_targets", "stage_trainer"),
        ("task_losses", "stage_trainer"),
        ("count_images", "trainer"),
    ):
        module = importlib.import_module(f"crowdray.training.{module_name}")
        monkeypatch.setattr(module, name, record(name, getattr(module, name)))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_tf32(True, torch.device("cuda"))
        trainer = trainer_of(discs)
        trainer.fit()
        seen.pop("count_images")  # validation may use bf16
        trainer.evaluate("joint", discs.rows("test"))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    exact, tf32 = {("highest", False)}, {("high", True)}
    assert seen == {"build_targets": exact, "task_losses": tf32, "count_images": exact}
