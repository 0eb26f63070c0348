"""Cells of an ablation without Ray: what they record, and what the driver refuses before it connects."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crowdray.ablation.protocol import Ablation, Cell, plan_ablation, planned_updates
from crowdray.ablation.publish import AblationOutcome
from crowdray.ablation.reads import Read, ReadLog
from crowdray.ablation.record import read_records
from crowdray.cluster.ablate import Placement, ablate, cell_slots
from crowdray.cluster.cell import CellProgress, CellTask, count_cell, count_split, load_cell, train_cell
from crowdray.cluster.runtime import Resources
from crowdray.config import Config
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.errors import UserError
from crowdray.evaluation.metrics import summarise
from crowdray.presets import preset
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.training.checkpoint import load_checkpoint

from ..support.trainers import CPU

PLACEMENT = Placement(cpus=1, gpus=1.0, device="cpu", concurrent=None)


class Display:
    """A callback that shows nothing."""

    def on_status(self, text: str) -> None:
        pass

    def on_cells(self, cells: Any) -> None:
        pass


def make_ablation(discs: Dataset, folder: Path, seeds: tuple[int, ...] = (1,), arms: str = "none") -> Ablation:
    return plan_ablation(
        preset("debug"),
        discs.uri,
        "debug",
        arms=arms.split(","),
        sweeps=(),
        fractions=(0.5,),
        backbones=(),
        seeds=seeds,
        threads=1,
        folder=str(folder / "runs"),
        name="ablation",
        tracking_uri=None,
    )


def first_read(discs: Dataset, cell: Cell) -> ReadLog:
    return ReadLog(discs.digest, (Read("2026-01-01T00:00:00+00:00", "abc", "ablate", (cell.name,)),))


def run(ablation: Ablation, folder: Path) -> AblationOutcome:
    cache = StageCacheConfig(str(folder / "stages"), 2**30)
    options: dict[str, Any] = {"placement": PLACEMENT, "command": "ablate", "read_again": "", "tracking_uri": None}
    options["results"] = str(folder / "results")
    return ablate(ablation, Display(), stage_cache=cache, **options)


@pytest.mark.slow
def test_cell_counts_test_split_with_weights_of_its_last_epoch(discs: Dataset, tmp_path: Path) -> None:
    ablation, sent = make_ablation(discs, tmp_path), list[CellProgress]()
    ablation.create_or_verify(device="cpu")
    queue = SimpleNamespace(actor=SimpleNamespace(put_nowait=SimpleNamespace(remote=sent.append)))
    task = CellTask(ablation, StageCacheConfig(str(tmp_path / "stages"), 2**30), False, queue)
    (cell,) = ablation.cells
    train_cell(task, cell)
    folder, config = ablation.folder(cell), ablation.config(cell, discs)
    trained = load_cell(folder)
    assert trained.test is None and trained.updates == planned_updates(config, discs)
    checkpoint = load_checkpoint(Path(folder))
    assert checkpoint.progress.best["joint"].epoch == checkpoint.progress.epochs
    _, validation = split_rows(config, discs, 1)
    assert count_split(checkpoint, discs, validation, CPU) == trained.validation
    assert [(progress.stage, progress.epoch) for progress in sent] == [
        *(("baseline", epoch) for epoch in range(1, 5)),
        *(("joint", epoch) for epoch in range(1, 7)),
    ]
    count_cell(task, cell)
    tested = load_cell(folder)
    assert dataclasses.replace(tested, test=None) == trained
    assert tested.test is not None and [count.row for count in tested.test] == discs.rows("test").tolist()
    first_read(discs, cell).save(ablation.test_read_file)
    outcomes = [run(ablation, tmp_path) for _ in range(2)]  # finished: without Ray
    record = outcomes[0].record
    assert record == outcomes[1].record and read_records(str(tmp_path / "results")) == [record]
    assert (record.split, record.date, record.test_reads[0].cells) == ("test", "2026-01-01", 1)
    assert record.arms[0].errors.mae == pytest.approx(summarise(tested.test).mae)


def test_ablate_refuses_second_read_of_test_split_before_training(discs: Dataset, tmp_path: Path) -> None:
    ablation = make_ablation(discs, tmp_path)
    first_read(discs, ablation.cells[0]).save(ablation.test_read_file)
    with pytest.raises(UserError, match="already read"):
        run(make_ablation(discs, tmp_path, seeds=(1, 2)), tmp_path)


def test_ablate_refuses_arm_with_other_number_of_updates(
    discs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of = Ablation.config

    def longer(self: Ablation, cell: Cell, dataset: Dataset) -> Config:
        config = config_of(self, cell, dataset)
        joint = dataclasses.replace(config.stages.joint, epochs=config.stages.joint.epochs + (cell.arm.name == "all"))
        return dataclasses.replace(config, stages=dataclasses.replace(config.stages, joint=joint))

    monkeypatch.setattr(Ablation, "config", longer)
    with pytest.raises(UserError, match=r"updates differ at fraction 0.5 of cfcn: none 20, all 22"):
        run(make_ablation(discs, tmp_path, arms="none,all"), tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("placement", "resources", "use_gpu", "slots"),
    [
        (PLACEMENT, Resources(4, 0, True, (4,)), False, 4),
        (Placement(3, 1, "cpu", None), Resources(8, 0, False, (4, 4)), False, 2),
        (Placement(1, 0.25, "gpu", None), Resources(16, 1, True, (16,)), True, 4),
        (Placement(4, 0.25, "gpu", None), Resources(8, 1, True, (8,)), True, 2),
        (Placement(1, 1, "cpu", 3), Resources(8, 0, True, (8,)), False, 3),
        (Placement(2, 1, "cpu", None), Resources(2, 0, False, (2,), (2, 4)), False, 3),
    ],
)
def test_cell_slots_fit_nodes_and_gpus(placement: Placement, resources: Resources, use_gpu: bool, slots: int) -> None:
    assert cell_slots(resources, placement, use_gpu) == slots


@pytest.mark.parametrize(
    ("placement", "use_gpu"),
    [(Placement(5, 1, "cpu", None), False), (Placement(1, 2, "gpu", None), True), (Placement(1, 0, "gpu", None), True)],
)
def test_cell_slots_that_never_fit_are_user_error(placement: Placement, use_gpu: bool) -> None:
    with pytest.raises(UserError, match=r"--.pus-per-run"):
        cell_slots(Resources(8, 1, False, (4, 4)), placement, use_gpu)
