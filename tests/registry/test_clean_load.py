"""The clean environment gets the checked parts of a package, and its density decides."""

import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crowdray.registry.clean_load import clean_load_problem
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import Package

from ..support.counters import photo

pytestmark = pytest.mark.slow


def test_clean_load_passes_mlflow_nothing_but_the_checked_parts(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered = tmp_path / "model"
    shutil.copytree(package.path, altered)
    (altered / "data" / "pickle_module_info.txt").write_text("antigravity")
    with zipfile.ZipFile(altered / "data" / "model.pt2", "a") as archive:
        archive.writestr("model/models/other.json", "{}")
    image = photo(1, 50, 97)
    expected = load_counter(str(altered))(image)
    seen: list[Any] = []

    def run(command: list[str], cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder, result = command[-3], command[-1]
        seen.extend(sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()))
        seen.append(zipfile.ZipFile(Path(folder) / "data" / "model.pt2").namelist())
        assert command[1] == "-I" and env["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false" and "PYTHONPATH" not in env
        np.save(result, load_counter_there(Path(folder), image).numpy())
        return subprocess.CompletedProcess(command, 0, "", "")

    def load_counter_there(folder: Path, image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            density: torch.Tensor = torch.export.load(folder / "data" / "model.pt2").module()(image)
        return density

    monkeypatch.setattr(subprocess, "run", run)
    assert clean_load_problem(altered, image, expected) == ""
    assert seen[:3] == ["MLmodel", "data/model.pt2", "image.npy"] and "model/models/other.json" not in seen[3]
    assert clean_load_problem(altered, image, expected + 1) == "its density differs there"
