"""The conversion's code digest changes with the code that decides its bytes, and with no other code."""

import importlib
from pathlib import Path

import pytest

from crowdray.datasets.resume import PACKAGE, SHARED_CODE, code_digest
from crowdray.datasets.sources import open_source

from ..support.builders import make_shanghaitech

UNRELATED = [
    "config.py",
    "console/tables.py",
    "data/loader.py",
    "datasets/sources/__init__.py",
    "datasets/sources/annotations/coco.py",
    "datasets/sources/mall.py",
    "datasets/validation.py",
    "plots/dataset.py",
    "storage/files.py",
    "training/trainer.py",
    "tune/search.py",
]
DECISIVE = [
    "data/sample.py",
    "data/shards.py",
    "datasets/depth/inverse.py",
    "datasets/sources/base.py",
    "datasets/sources/matlab.py",
    "datasets/sources/shanghaitech.py",
    "scenes/people.py",
]


@pytest.mark.parametrize(
    ("depth", "used", "unused"), [("points", "analytic", "precomputed"), ("precomputed:{}", "precomputed", "onnx")]
)
def test_code_digest_changes_with_decisive_code_only(
    depth: str, used: str, unused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.npy").touch()
    part = make_shanghaitech(tmp_path / "part_B", count=1)
    source = open_source("shanghaitech", str(part), depth=depth.format(tmp_path))
    unchanged, read = code_digest(source), Path.read_bytes
    decisive = [*DECISIVE, f"datasets/depth/{used}.py"]
    for path in [*decisive, *UNRELATED, f"datasets/depth/{unused}.py"]:
        planted = PACKAGE / path
        assert planted.is_file()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda file, planted=planted: read(file) + b"#" * (file == planted))
            assert (code_digest(source) != unchanged) == (path in decisive), path


def test_shared_code_exists() -> None:
    assert all(any(PACKAGE.glob(pattern)) for pattern in SHARED_CODE)


def test_code_digest_includes_classes_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = set()
    for number in (1, 2):
        name = f"custom_source_{number}"
        text = "from crowdray.datasets.sources.synthetic import Synthetic\nclass Custom(Synthetic):\n"
        (tmp_path / f"{name}.py").write_text(f"{text}    revision = {number}\n")
        digests.add(code_digest(importlib.import_module(name).Custom(train=1)))
    assert len(digests) == 2
