"""The records in results/, and the page of the documentation that is generated from records."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from crowdray.ablation.figures import draw_record
from crowdray.ablation.record import read_records

from .test_summary import record, summarise

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page() -> Any:
    """The hook that generates the page."""
    spec = importlib.util.spec_from_file_location("results_reference", ROOT / "docs" / "results_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_are_records_of_committed_code_named_like_their_files() -> None:
    records = read_records(str(ROOT / "results"))  # raises for one that was edited
    assert {found.name for found in records} == {path.stem for path in (ROOT / "results").glob("*.json")}
    assert [found.name for found in records if not re.fullmatch(r"[0-9a-f]{40}", found.revision)] == []


def test_page_has_the_papers_numbers_next_to_measured_ones(page: Any) -> None:
    rows = page.table(record(summarise("none", "depth", "placebo"))).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert "paper, Table 3: MAE / RMSE" in rows[0]
    depth = next(row for row in rows if row.startswith("| `depth` |"))
    assert "2.79 / 3.51 | +0.35 |" in depth and "**+0." in depth
    text = "\n".join(
        page.section(record(summarise("none", "depth", "placebo")), ["figures/results/mall-test/gains.png"])
    )
    assert "jobs/ablate.py" in text and "![Gain of each arm, mall-test](figures/results/mall-test/gains.png)" in text


def test_record_without_baseline_has_no_figure(tmp_path: Path) -> None:
    assert draw_record(record(summarise("all")), tmp_path) == []
    assert [path.name for path in draw_record(record(summarise("none", "all")), tmp_path)] == ["gains.png"]
