"""Summaries and records of an ablation, and the sentences that its statistics allow."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from crowdray.ablation.arms import parse_arms
from crowdray.ablation.paper import FIGURE_5, TABLES
from crowdray.ablation.record import AblationRecord, Machine, TestRead, read_records, write_record
from crowdray.ablation.result import CellResult
from crowdray.ablation.summary import ArmSummary, summarise_arms
from crowdray.ablation.verdict import verdicts
from crowdray.config import LossConfig
from crowdray.documents import parse_document, to_document
from crowdray.errors import DataError
from crowdray.evaluation.metrics import ImageCount

ARMS = parse_arms(["none", "depth", "all", "placebo"], [], LossConfig())
ERROR = {"none": 4.0, "depth": 3.0, "all": 2.0, "placebo": 3.9}
"""Mean absolute error of each arm."""


def cell(arm: str, seed: int, *, own_rows: bool = False, fraction: float = 1.0) -> CellResult:
    """A cell whose errors have the arm's magnitude, up to noise that depends on arm and seed."""
    generator = np.random.default_rng((seed, list(ERROR).index(arm)))
    noise = generator.normal(0, 0.2, 40)
    counts = [ImageCount(row, 30, 30 + ERROR[arm] + noise[row], 40.0) for row in reversed(range(40))]
    validation = [dataclasses.replace(count, row=count.row + 40 * seed) for count in counts]
    return CellResult(arm, fraction, "cfcn", seed, 120, 7.5, validation, None if own_rows else counts)


def summarise(*arms: str, seeds: int = 3, own_rows: bool = False) -> list[ArmSummary]:
    return summarise_arms([cell(arm, seed, own_rows=own_rows) for seed in range(seeds) for arm in arms], ARMS)


def record(arms: list[ArmSummary]) -> AblationRecord:
    reads = (TestRead("2026-11-28T05:00:00+00:00", "0" * 40, 12, ""),)
    facts = (
        "mall-test",
        "mall",
        "d" * 32,
        "test",
        50,
        "mall-cfcn",
        {"seed": 0},
        "jobs/ablate.py",
        "0" * 40,
        "2026-11-28",
    )
    return AblationRecord(*facts, Machine.current(), reads, 0, tuple(arms))


def test_arms_are_compared_over_the_same_images_and_seeds() -> None:
    none, depth, everything, placebo = summarise("none", "depth", "all", "placebo")
    assert [arm.errors.mae for arm in (none, depth, everything, placebo)] == pytest.approx([4, 3, 2, 3.9], abs=0.1)
    assert none.gain is None and placebo.gain_over_placebo is None
    assert depth.gain and depth.gain.gain == pytest.approx(none.errors.mae - depth.errors.mae)
    assert everything.gain_over_placebo and everything.gain_over_placebo.gain == pytest.approx(1.9, abs=0.1)
    assert (depth.seeds, depth.updates, depth.seconds, depth.errors.images) == ((0, 1, 2), 120, 7.5, 40)


def test_arms_of_different_seeds_are_compared_over_their_common_ones() -> None:
    none, depth = summarise_arms([cell("none", 0), cell("none", 1), cell("depth", 1), cell("depth", 2)], ARMS)
    assert depth.gain and len(depth.gain.seed_gains) == 1 and none.errors.seeds == 2
    alone = summarise_arms([cell("none", 0), cell("depth", 0, fraction=0.1)], ARMS)
    assert [arm.gain for arm in alone] == [None, None]


def test_arms_without_test_split_are_compared_on_validation_images() -> None:
    none, depth = summarise("none", "depth", own_rows=True)
    assert none.test is None and depth.gain and depth.gain.gain == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="different images"):
        summarise_arms([cell("none", 1, own_rows=True), cell("depth", 1)], ARMS)


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record(summarise("none", "all", "placebo"))
    uri = write_record(written, str(tmp_path))
    assert read_records(str(tmp_path)) == [AblationRecord.from_json(Path(uri).read_bytes(), uri)] == [written]
    assert Path(uri).stat().st_size < 10_000


def test_record_of_later_version_or_damaged_is_data_error() -> None:
    content = parse_document(record(summarise("none")).to_json())
    with pytest.raises(DataError, match="its format is 2"):
        AblationRecord.from_json(to_document(content | {"format": 2}), "results/x.json")
    with pytest.raises(DataError, match=r"results/x\.json is not a record of an ablation .*other_reads"):
        AblationRecord.from_json(
            to_document({k: v for k, v in content.items() if k != "other_reads"}), "results/x.json"
        )


def test_verdicts_say_what_is_shown_and_what_is_not() -> None:
    said = list(verdicts(record(summarise("none", "depth", "all", "placebo"))))
    assert said[0].startswith("depth: 0.9") or said[0].startswith("depth: 1.0")
    assert "fewer heads of error, 95%" in said[0] and "3 seeds, p =" in said[0]
    assert said[-1].startswith("all against the placebo: 1.9") and "what they know of the image" in said[-1]
    same = list(verdicts(record(summarise_arms([cell("none", 0), cell("none", 1)], ARMS))))
    assert same == []
    cells = [cell("none", seed) for seed in range(3)]
    copies = [dataclasses.replace(cells[(seed + 1) % 3], arm="all", seed=seed) for seed in range(3)]
    unclear = list(verdicts(record(summarise_arms([*cells, *copies], ARMS))))
    assert unclear[0].startswith("all: no difference shown (") and "seeds show 0.5 heads in 80% of cases" in unclear[0]
    assert "one seed" in next(iter(verdicts(record(summarise("none", "all", seeds=1)))))


def test_numbers_of_the_paper_agree_with_each_other() -> None:
    cfcn = TABLES["shanghaitech-b", "cfcn"].errors
    assert min(FIGURE_5["depth"].values()) == cfcn["depth"][0]
    assert FIGURE_5["count"][1] == cfcn["count"][0]
    assert all(curve[0] == cfcn["none"][0] for curve in FIGURE_5.values())
    assert TABLES["mall", "cfcn"].gain("all") == pytest.approx(0.86)
    assert all(rmse > mae for table in TABLES.values() for mae, rmse in table.errors.values())
