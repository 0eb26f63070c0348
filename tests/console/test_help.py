"""Help texts: every option in standard notation, within the terminal's width, without waiting for heavy imports."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crowdray.config import FIELDS
from crowdray.console.commands.predict import CountingOptions
from crowdray.console.main import COMMANDS
from crowdray.datasets.sources import SOURCES
from crowdray.evaluation.inference import TILE
from crowdray.presets import PRESETS, preset, preset_for, training_options

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "mlflow", "pyarrow", "optuna", "matplotlib", "numpy")


def help_of(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str, width: int = 80
) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"crowdray.console.commands.{command}").main([*arguments])
    assert not exit_.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_wrapped_and_has_an_example(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, capsys, monkeypatch, "--help-all", width=width)
    options, _, examples = text.partition("\nexamples:\n")
    assert max(map(len, options.splitlines())) <= width
    assert examples.strip() and all(f"{command}" in line for line in examples.strip().splitlines())
    assert "None" not in options and "STR" not in options and "{" not in options.replace('{"', "")


@pytest.mark.parametrize("command", ["train", "tune"])
def test_help_lists_the_configuration_only_where_asked(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = help_of(command, capsys, monkeypatch, "-h")
    everything = help_of(command, capsys, monkeypatch, "--preset", "mall-cfcn", "--help-all")
    for name in FIELDS:
        option = f"\n  --{name.replace('_', '-')} "
        assert option in everything and option not in common
    assert all(f"\n  {name} " in common for name in PRESETS)
    assert "(required)" not in everything.partition("Cache of trained stages")[2]
    joint = everything.partition("--stages.joint.epochs N\n")[2].partition("--stages.joint.learning-rate")[0]
    assert "(default: 16)" in joint  # that of the preset


def test_help_and_usage_errors_import_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys, importlib; from crowdray.console.main import COMMANDS\n"
        "for name in COMMANDS:\n"
        "    for arguments in (['--help-all'], ['--unknown', 'x']):\n"
        "        try: importlib.import_module(f'crowdray.console.commands.{name}').main(arguments)\n"
        "        except SystemExit: pass\n"
        f"sys.exit(' '.join(sorted({set(HEAVY)} & set(sys.modules))) or 0)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "platform")})
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("environment", [False, True])
def test_job_without_dependencies_starts_again_in_the_environment_or_says_how_to_build_it(
    environment: bool, tmp_path: Path
) -> None:
    names = ["jobs/train.py", *(f"platform/crowdray/{name}.py" for name in ("__init__", "credentials", "errors"))]
    names += [f"platform/crowdray/console/{name}.py" for name in ("__init__", "main", "terminal")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    if environment:
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\necho "restarted: $@"\n')
        python.chmod(0o755)
    script = str(tmp_path / "jobs" / "train.py")
    result = subprocess.run([sys.executable, "-S", "-E", script, "--data", "a b"], capture_output=True, text=True)
    if environment:
        assert (result.returncode, result.stdout, result.stderr) == (0, f"restarted: {script} --data a b\n", "")
    else:
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith("error: the package tyro is not installed for ")
        assert "make setup" in result.stderr and len(result.stderr.splitlines()) == 1


def test_defaults_of_options_agree_with_the_library() -> None:
    assert CountingOptions.tile == TILE


def test_preset_for_a_source_exists_and_is_the_one_for_your_own_photos_by_default() -> None:
    assert {preset_for(name) for name in (*SOURCES, "shanghaitech-a", "shanghaitech-b")} <= set(PRESETS)
    chosen = {"mall": "mall-cfcn", "synthetic": "demo", "shanghaitech-b": "lite0", "market": "lite0"}
    assert {name: preset_for(name) for name in chosen} == chosen


@pytest.mark.parametrize("photos", [1, 10, 50, 150, 200])
def test_options_for_few_photos_keep_the_number_of_updates(photos: int) -> None:
    overrides = iter(training_options("market", photos).split())
    options = dict(zip(overrides, overrides, strict=True))
    epochs, annealed = (int(options[f"--stages.baseline.{name}"]) for name in ("epochs", "anneal-epochs"))
    assert options["--preset"] == "adapt" and annealed == epochs // 2
    assert epochs == 200 or 0.9 < epochs * photos / (50 * preset("adapt").stages.baseline.epochs) < 1.1


def test_options_for_many_photos_or_a_dataset_with_a_preset() -> None:
    assert training_options("market", 201) == "--preset lite0"
    assert training_options("mall", 50) == "--preset mall-cfcn"
