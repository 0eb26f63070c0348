"""Git revision with and without a repository."""

import subprocess
from pathlib import Path

import pytest

from crowdray.registry.provenance import git_revision


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    result = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_git_revision_of_a_repository_is_the_commit_and_marks_changes(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-q", "-m", "a")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert git_revision(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == f"{commit}+dirty"


def test_git_revision_without_a_repository_is_the_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("CROWDRAY_GIT_REVISION", raising=False)
    assert git_revision(tmp_path) == "unknown"
    monkeypatch.setenv("CROWDRAY_GIT_REVISION", "abc")
    assert git_revision(tmp_path) == "abc"
