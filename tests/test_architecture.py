"""Import rules of the package: the contracts in pyproject.toml hold, and each of them catches a planted violation."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

VIOLATIONS = {
    "layers": ("models/planted.py", "import crowdray.data.sample"),
    "cycles": (
        "models/planted.py",
        "import crowdray.models.build\n",
        "models/build.py",
        "import crowdray.models.planted\n",
    ),
    "ray": ("training/planted.py", "def f():\n    import ray.train"),
    "mlflow": ("evaluation/planted.py", "from mlflow import log_metric"),
    "optuna": ("cluster/planted.py", "import optuna"),
    "terminal": ("plots/planted.py", "from rich.table import Table"),
    "matplotlib": ("tune/planted.py", "import matplotlib.pyplot"),
    "scenes": ("scenes/planted.py", "import torch"),
}
"""Contract id -> files of the package and the code appended to each."""


def lint_imports(platform: Path, contract: str | None = None) -> str:
    """Output of import-linter over a copy of the package, or over our own."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    command += ["--no-cache", "--config", str(ROOT / "pyproject.toml")]
    command += ["--contract", contract] if contract else []
    environment = {**os.environ, "PYTHONPATH": str(platform)}
    return subprocess.run(command, env=environment, cwd=platform, capture_output=True, text=True).stdout


def test_import_contracts_hold() -> None:
    output = lint_imports(ROOT / "platform")
    assert re.search(r"Contracts: \d+ kept, 0 broken", output), output


@pytest.mark.parametrize("contract", VIOLATIONS)
def test_import_contract_catches_planted_violation(contract: str, tmp_path: Path) -> None:
    package = tmp_path / "crowdray"
    shutil.copytree(ROOT / "platform" / "crowdray", package, ignore=shutil.ignore_patterns("__pycache__"))
    files = VIOLATIONS[contract]
    for file, code in zip(files[::2], files[1::2], strict=True):
        with (package / file).open("a") as opened:
            opened.write(code + "\n")
    output = lint_imports(tmp_path, contract)
    assert "0 kept, 1 broken" in output and "planted" in output, output


def test_every_contract_has_a_planted_violation() -> None:
    ids = re.findall(r'^id = "(\w+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert sorted(ids) == sorted(VIOLATIONS)


def test_no_module_shadows_another() -> None:
    """With platform/__init__.py or platform.py, `import platform` would find ours: Ray, torch and MLflow break."""
    assert not (ROOT / "platform.py").exists()
    assert [path.name for path in (ROOT / "platform").glob("*.py")] == []
    packages = [path.parent.name for path in (ROOT / "platform").glob("*/__init__.py")]
    assert packages == ["crowdray"]
    reserved = sys.stdlib_module_names | {"crowdray", "ray", "mlflow", "torch"}
    assert [path.name for path in (ROOT / "jobs").glob("*.py") if path.stem in reserved] == []


def test_jobs_are_thin() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "jobs").glob("*.py")}
    assert lengths and max(lengths.values()) < 80, lengths
