"""The conversion's code digest changes with the code that decides its bytes, and with no other code."""

import importlib
import shutil
from pathlib import Path

import pytest

from crowdray.datasets.code_digest import PACKAGE, code_digest
from crowdray.datasets.sources import Source, open_source

from ..support.builders import make_shanghaitech

INDEPENDENT = [
    "config.py",
    "console/tables.py",
    "data/loader.py",
    "data/shard_reader.py",
    "datasets/depth/onnx.py",
    "datasets/sources/__init__.py",
    "datasets/sources/annotations/base.py",
    "datasets/sources/mall.py",
    "datasets/validation.py",
    "plots/dataset.py",
    "scenes/render.py",
    "storage/files.py",
    "training/trainer.py",
    "tune/search.py",
]
DECISIVE = [
    "data/sample.py",
    "data/shards.py",
    "datasets/depth/analytic.py",
    "datasets/sources/base.py",
    "datasets/sources/layout.py",
    "datasets/sources/matlab.py",
    "datasets/sources/shanghaitech.py",
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(
        PACKAGE, tmp_path_factory.mktemp("code") / "crowdray", ignore=shutil.ignore_patterns("*.pyc")
    )


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source("shanghaitech", str(make_shanghaitech(tmp_path / "part_B", count=1)))


def digest_after_change(source: Source, package: Path, path: str) -> str:
    file = package / path
    original = file.read_bytes()
    file.write_bytes(original + b"\n_PLANTED = 1\n")
    try:
        return code_digest(source, package)
    finally:
        file.write_bytes(original)


def test_code_digest_ignores_unrelated_code(source: Source, package: Path) -> None:
    unchanged = code_digest(source, package)
    assert unchanged == code_digest(source)
    for path in INDEPENDENT:
        assert digest_after_change(source, package, path) == unchanged, path


@pytest.mark.parametrize("path", DECISIVE)
def test_code_digest_changes_with_decisive_code(source: Source, package: Path, path: str) -> None:
    assert digest_after_change(source, package, path) != code_digest(source, package)


def test_code_digest_depends_on_the_depth_teacher(package: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    (maps / "a.npy").write_bytes(b"")
    part = str(make_shanghaitech(tmp_path / "part_B", count=1))
    source = open_source("shanghaitech", part, depth=f"precomputed:{maps}")
    unchanged = code_digest(source, package)
    for path in ("datasets/depth/precomputed.py", "datasets/depth/inverse.py"):
        assert digest_after_change(source, package, path) != unchanged
    assert digest_after_change(source, package, "datasets/depth/huggingface.py") == unchanged


def test_code_digest_of_rendered_scenes_includes_the_renderer(package: Path) -> None:
    source = open_source("synthetic", train=1)
    unchanged = code_digest(source, package)
    assert digest_after_change(source, package, "scenes/people.py") != unchanged
    assert digest_after_change(source, package, "datasets/sources/shanghaitech.py") == unchanged


def test_code_digest_includes_classes_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = set()
    for number in (1, 2):
        name = f"custom_source_{number}"
        text = "from crowdray.datasets.sources.synthetic import Synthetic\nclass Custom(Synthetic):\n"
        (tmp_path / f"{name}.py").write_text(f"{text}    revision = {number}\n")
        digests.add(code_digest(importlib.import_module(name).Custom(train=1)))
    assert len(digests) == 2
