"""Run the notebooks in examples/: their code cells in order, in one namespace."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_stores_no_outputs(notebook: Path) -> None:
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells(notebook))


@pytest.mark.slow
def test_train_and_count_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    notebook = next(path for path in NOTEBOOKS if path.stem == "train_and_count")
    for number, cell in enumerate(code_cells(notebook)):
        exec(compile("".join(cell["source"]), f"{notebook.name}[{number}]", "exec"), names)
    assert float(names["target"].sum()) == pytest.approx(names["points"].shape[1], rel=1e-4)
    assert names["density"].shape == names["target"].shape
    assert bool(names["density"].isfinite().all())
