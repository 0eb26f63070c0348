"""The command `ablate`: usage errors, the command that its record states, and its display."""

import re

import pytest
from rich.console import Console

from crowdray.ablation.arms import Arm
from crowdray.ablation.record import AblationRecord, Machine
from crowdray.ablation.result import CellResult
from crowdray.ablation.summary import summarise_arms
from crowdray.cluster.ablate import CellStatus
from crowdray.console.ablation_display import AblationDisplay, ablation_table
from crowdray.console.commands import ablate
from crowdray.errors import UserError
from crowdray.evaluation.metrics import ImageCount


def make_record(names: str = "none,depth,all,placebo") -> AblationRecord:
    """A record whose arms have one error each: that of seed s and arm a is 10 + s - a."""
    arms = [Arm(name, {"depth": 1.0}, placebo=name == "placebo") for name in names.split(",")]
    counts = {
        (arm.name, seed): [ImageCount(0, 20, 30.0 + seed - n, 0.0)] for n, arm in enumerate(arms) for seed in (0, 1)
    }
    cells = [CellResult(arm, 1.0, "cfcn", seed, 25, 61.0, one, one) for (arm, seed), one in counts.items()]
    machine = Machine("cpu", 2, "3.11", {})
    fixed = {"preset": "debug", "config": {}, "command": "", "revision": "", "date": "", "machine": machine}
    rows = tuple(summarise_arms(cells, arms))
    return AblationRecord("a", "mall", "d", "test", 1, **fixed, test_reads=(), other_reads=0, arms=rows)  # type: ignore[arg-type]


def printed(width: int, record: AblationRecord) -> str:
    console = Console(width=width, record=True, force_terminal=False)
    console.print(ablation_table(record, console))
    return console.export_text()


def test_ablation_table_has_errors_and_gains_of_each_arm() -> None:
    lines = printed(160, make_record()).splitlines()
    (depth,) = [line for line in lines if "depth" in line]
    assert re.search(r"depth +2 +9\.50 .* \+1\.00 .* -2\.00 .*0:01:01", depth)


@pytest.mark.parametrize("width", [50, 80, 100])
def test_ablation_table_in_narrow_terminal_cuts_nothing(width: int) -> None:
    text = printed(width, make_record())
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for value in ("placebo", "9.50", "+1.00"):
        assert value in text


def test_ablation_table_without_placebo_has_no_column_for_it() -> None:
    assert "over none" in (text := printed(160, make_record("none,all"))) and "over placebo" not in text


def test_record_states_command_without_folders_of_machine() -> None:
    arguments = ["--preset", "debug", "--data", "/mnt/x/mall", "--storage", "/tmp/runs", "--json=/tmp/a.json"]
    words = list(ablate.repeatable([*arguments, "--stage_cache", "/c", "--seeds", "1,2", "--init=/m/run"]))
    assert words == ["--preset", "debug", "--data", "mall", "--seeds", "1,2", "--init=run"]


@pytest.mark.parametrize("option", ["--seeds", "--fractions"])
def test_ablate_with_numbers_that_are_none_is_user_error(option: str) -> None:
    with pytest.raises(UserError, match=rf"{option} is '1,b'"):
        ablate.main(["--preset", "debug", "--data", "x", option, "1,b"])


def test_display_prints_each_finished_cell_once(capsys: pytest.CaptureFixture[str]) -> None:
    display = AblationDisplay(Console(force_terminal=False))
    with display:
        display.on_cells([CellStatus("a", "training"), CellStatus("b")])
        for _ in range(2):
            display.on_cells([CellStatus("a", "trained", mae=2.5), CellStatus("b", "training", "joint 1/3", 3.0)])
    assert capsys.readouterr().out.count("a: trained  val MAE 2.50") == 1
