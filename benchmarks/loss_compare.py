"""Compare the losses of two revisions: a refactoring reproduces every number to the last bit on a CPU.

Trains one epoch of each stage with this checkout and with another revision, on the same shards, and compares the
whole history and the final errors. Exit status 1 when any number differs.

    .venv/bin/python benchmarks/loss_compare.py --base HEAD~1 --preset mall-cfcn --data data/mall --workers 2
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ONE_EPOCH = [text for stage in ("baseline", "decoders", "joint") for text in (f"--stages.{stage}.epochs", "1")]
COMPARED = ("loss/", "weighted/", "val/", "learning_rate", "updates")
"""Starts of the names of all numbers in a history row that are computed, not measured by a clock."""


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A temporary git worktree of another revision."""
    with tempfile.TemporaryDirectory(prefix="crowdray-base-") as folder:
        path = Path(folder) / "base"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(path), revision], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def run(root: Path, job: str, arguments: list[str], folder: Path) -> None:
    """Run a job of a checkout with the packages of this interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(root / "platform")}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    subprocess.run([sys.executable, str(root / "jobs" / job), *arguments], env=environment, cwd=folder, check=True)


def train(root: Path, options: argparse.Namespace, data: str, folder: Path) -> dict[str, Any]:
    """The result of a short training run of a checkout."""
    folder.mkdir()
    arguments = ["--preset", options.preset, "--data", data, "--workers", str(options.workers)]
    arguments += ["--storage", str(folder / "runs"), "--json", str(folder / "outcome.json"), *ONE_EPOCH]
    run(root, "train.py", arguments, folder)
    result: dict[str, Any] = json.loads((folder / "outcome.json").read_text())["result"]
    return result


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """All computed numbers of a training result by name."""
    found = {
        f"epoch {row['epoch']} {name}": value
        for row in result["history"]
        for name, value in row.items()
        if name.startswith(COMPARED)
    }
    for stage, content in result["stages"].items():
        for split in ("validation", "test"):
            found |= {f"{stage} {split} {name}": value for name, value in (content[split] or {}).items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="HEAD", help="revision to compare with")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--data", help="URI of a dataset; without it the demo's scenes are rendered")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with checkout(options.base) as base, tempfile.TemporaryDirectory(prefix="crowdray-losses-") as scratch:
        folder = Path(scratch)
        data = str(Path(options.data).resolve()) if options.data else str(folder / "data")
        if not options.data:
            run(base, "convert.py", ["synthetic", "--dest", data], folder)
        before = numbers(train(base, options, data, folder / "base"))
        after = numbers(train(ROOT, options, data, folder / "head"))
    names = sorted({*before, *after}, key=lambda name: (name not in before, name))
    differing = [name for name in names if before.get(name) != after.get(name)]
    for name in differing:
        print(f"{name}: {before.get(name)!r} at {options.base}, {after.get(name)!r} in this checkout")
    print(f"{len(names) - len(differing)} of {len(names)} numbers equal to the last bit")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
