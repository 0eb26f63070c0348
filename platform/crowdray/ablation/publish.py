"""Publication of a finished ablation: its record and its figures, in storage and in MLflow."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import crowdray
from crowdray import storage
from crowdray.ablation.figures import draw_figures
from crowdray.ablation.protocol import Ablation
from crowdray.ablation.reads import ReadLog, reads_by_others
from crowdray.ablation.record import AblationRecord, Machine, TestRead, write_record
from crowdray.ablation.result import CellResult
from crowdray.ablation.summary import summarise_arms
from crowdray.data.shards import Dataset
from crowdray.evaluation.intervals import VIDEO_BLOCK
from crowdray.pipeline.identity import read_identity
from crowdray.registry.provenance import git_revision
from crowdray.registry.tracking import Tracker

RECORD_FILE = "record.json"
"""The record in the ablation's own folder, which outlives a submitted job."""


@dataclass(frozen=True)
class AblationOutcome:
    """Result of an ablation."""

    ablation: str
    """Its folder."""
    record: AblationRecord
    """Its numbers."""
    record_uri: str
    """File with the record."""
    figures: tuple[str, ...]
    """URIs of the figures."""
    run_url: str | None
    """Web page of its MLflow run."""


def publish_ablation(
    ablation: Ablation, cells: Sequence[CellResult], dataset: Dataset, command: str, results: str, tracker: Tracker
) -> AblationOutcome:
    """Draw the figures of an ablation, write its record, and log both; safe to repeat.

    Args:
        cells: All cells.
        command: The command, for the record.
        results: Folder or URI of records.
    """
    record, figures = make_record(ablation, cells, dataset, command), list[str]()
    tracker.log_summary(_metrics(record), 0)
    with storage.scratch_folder("ablation") as folder:
        for path in draw_figures(ablation, record, cells, dataset, folder):
            tracker.log_file(path, "figures")
            figures.append(storage.join(ablation.uri, path.name))
            storage.publish_file(path, figures[-1])
        copy = folder / RECORD_FILE
        copy.write_text(record.to_json(), encoding="utf-8")
        tracker.log_file(copy)
        storage.publish_file(copy, storage.join(ablation.uri, RECORD_FILE))
    return AblationOutcome(ablation.uri, record, write_record(record, results), tuple(figures), tracker.url)


def make_record(ablation: Ablation, cells: Sequence[CellResult], dataset: Dataset, command: str) -> AblationRecord:
    """Summarise the cells; the same command later makes the same record, apart from the machine."""
    identity, config = ablation.identity, ablation.identity.config
    log = ReadLog.load(ablation.test_read_file, dataset.digest)
    block = VIDEO_BLOCK if config.sampling.validation == "run" else 1
    now, revision = datetime.now(UTC).isoformat(timespec="seconds"), git_revision(Path(crowdray.__file__).parent)
    return AblationRecord(
        name=identity.name,
        dataset=dataset.index.name,
        data_digest=dataset.digest,
        split="test" if log.reads else "validation",
        block=block,
        preset=ablation.preset,
        config=asdict(config),
        command=command,
        revision=log.reads[-1].revision if log.reads else revision,
        date=(log.reads[-1].time if log.reads else now)[:10],
        machine=Machine.current(_gpu(ablation)),
        test_reads=tuple(TestRead(read.time, read.revision, len(read.cells), read.reason) for read in log.reads),
        other_reads=reads_by_others(identity.storage, identity.name, dataset.digest),
        arms=tuple(summarise_arms(cells, ablation.arms, block)),
    )


def _gpu(ablation: Ablation) -> str:
    """Name of the GPU on which the cells were trained, "" for CPUs; that of this machine, where it has one."""
    if read_identity(ablation.identity_file)["device"] == "cpu":
        return ""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"


def _metrics(record: AblationRecord) -> dict[str, float]:
    """Errors and gains by arm, under names that MLflow accepts."""
    groups = {(arm.fraction, arm.backbone) for arm in record.arms}
    metrics: dict[str, float] = {}
    for arm in record.arms:
        group = f" {arm.backbone} {arm.fraction:g}" if len(groups) > 1 else ""
        name = re.sub(r"[^\w. -]", "-", f"{arm.arm}{group}")
        metrics |= {f"{record.split}_mae {name}": arm.errors.mae, f"{record.split}_rmse {name}": arm.errors.rmse}
        if arm.gain is not None:
            metrics[f"gain {name}"] = arm.gain.gain
    return metrics
