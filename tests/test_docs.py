"""The documentation names files and configuration flags that exist, and its commands run as they are printed."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crowdray.config import FIELDS
from crowdray.console.commands import convert
from crowdray.console.main import COMMANDS

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


def commands_of(text: str) -> Iterator[str]:
    """Commands of a page: lines of its blocks that start a program, and code in a sentence that starts ours."""
    start = r"(?:[A-Z_]+=\S+ )*(?:make|docker|export|python3?|pip|ray|mlflow|crowdray|jobs/\w+\.py|\.venv/bin/\w+) "
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        yield from filter(re.compile(start).match, block.replace("\\\n", " ").splitlines())
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    starts = r"\.venv/bin/|jobs/\S+\.py |make |python3? |pytest "
    yield from (code for code in re.findall(rf"`((?:{starts})[^`]+)`", sentences) if "..." not in code)


def check_command(line: str) -> None:
    """Fail unless a command runs from a checkout in which only `make train` was done, as far as its syntax says."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in arguments if "=" not in word} <= set(targets), line
    elif job := re.fullmatch(r"jobs/(\w+)\.py", program):
        check_job(job[1], arguments)
    elif program.startswith(".venv/bin/"):
        assert Path(sys.executable).with_name(Path(program).name).exists(), line
        if arguments[:2] == ["job", "submit"]:
            check_command(shlex.join(arguments[arguments.index("--") + 2 :]))
        for script in filter(re.compile(r"\w+/\w+\.py$").match, arguments[:1]):
            assert (ROOT / script).exists(), line
    else:
        assert program in ("docker", "export"), f"{line}: needs an environment; write jobs/NAME.py or .venv/bin/NAME"


def check_job(name: str, arguments: list[str]) -> None:
    """Parse the arguments of a job; raises for those that it rejects."""
    parsed = importlib.import_module(f"crowdray.console.commands.{name}").parse_arguments(arguments)
    if name == "submit":
        check_job(arguments[0] if parsed[1] == [] else parsed[1][0], parsed[1][1:])


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "lab-notes.md"], ids=lambda page: page.name)
def test_commands_of_page_run_as_they_are_printed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands_of(page.read_text()):
        try:
            check_command(line)
        except SystemExit as exit_:  # of --help
            assert not exit_.code, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_are_accepted(name: str) -> None:
    for example in importlib.import_module(f"crowdray.console.commands.{name}").EXAMPLES:
        check_job(name, shlex.split(example))


def test_commands_that_a_conversion_prints_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "jobs" / "convert.py")])
    convert.main(["synthetic", "--dest", "the data", "--train", "2", "--test", "0", "--width", "96"])
    printed = re.findall(r"^(?:check|train on) it: +(.*)", capsys.readouterr().out, re.M)
    assert len(printed) == 2
    for line in printed:
        python, script, *arguments = shlex.split(line)
        assert Path(python).resolve() == Path(sys.executable).resolve() and Path(script).is_file()
        check_job(Path(script).stem, arguments)
        assert "the data" in arguments
