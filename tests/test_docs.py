"""The documentation names files and configuration flags that exist."""

import re
from pathlib import Path

import pytest

from crowdray.config import FIELDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "infra" / "README.md"])
FLAGS = {f"--{name}".replace("_", "-") for name in FIELDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_existing_files_and_flags(page: Path) -> None:
    text = page.read_text()
    links = {target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target}
    scripts = set(re.findall(r"\b((?:jobs|benchmarks|examples|infra)/[a-z_]+\.(?:py|md|ipynb))\b", text))
    flags = {flag.replace("_", "-") for flag in re.findall(r"--[a-z]+\.[a-z0-9_.-]*[a-z0-9]", text)}
    assert {target for target in links if not (page.parent / target).exists()} == set()
    assert {script for script in scripts if not (ROOT / script).exists()} == set()
    assert flags - FLAGS == set()
