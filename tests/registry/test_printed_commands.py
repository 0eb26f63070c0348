"""Commands of the documentation, and those that a job prints at its end, run in a shell that has nothing set up."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import simplejpeg

from crowdray.registry.packaging import Package
from crowdray.registry.registration import register
from crowdray.registry.tracking import open_tracker

from ..support.counters import photo
from ..support.processes import ROOT
from ..test_docs import commands_of

pytestmark = pytest.mark.slow


def documented(page: str, start: str) -> str:
    """Return the only command of a page that starts with some text."""
    (command,) = (line for line in commands_of((ROOT / "docs" / page).read_text()) if line.startswith(start))
    return command


def test_commands_for_photos_run_as_they_are_printed(store: str, package: Package, tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / "photos").mkdir()
    for number in range(10):
        pixels = photo(1, 96, 128, seed=number)[0].permute(1, 2, 0).contiguous().numpy()
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    heads = [f"{number}.jpg,{number + 3},5" for number in range(10)]
    (tmp_path / "photos" / "heads.csv").write_text("\n".join(["image,x,y", *heads]))
    run_id = open_tracker(store, "printed", "a run", "printed").run_id
    assert run_id is not None
    register(package, "crowdray-synthetic", run_id, 1, store)

    def run(command: str) -> str:
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        environment = {"PATH": path, "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": store}
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    converted = run(documented("own-data.md", "jobs/convert.py csv"))
    (check,) = re.findall(r"^check it: +(.*)", converted, re.M)
    assert "outputs/check/photos/check.json" in run(check)
    assert "photos: 10 counted" in run(documented("getting-started.md", "jobs/predict.py"))
    assert (tmp_path / "counted" / "counts.csv").is_file()
