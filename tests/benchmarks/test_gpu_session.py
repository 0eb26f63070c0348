"""Sessions of benchmarks/gpu_session.py: what is run, left out, recorded and resumed."""

import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu_session
from benchmarks.support.session import RESULTS_FILE, Entry, Record, Session, append_record, read_records

from crowdray.data.shards import Dataset

ROOT = Path(__file__).resolve().parents[2]


def entry(name: str, code: str = "print('result: {}')", kind: str = "kind", guess_s: float = 0.0) -> Entry:
    return Entry(name, kind, f"key of {name}", guess_s, (sys.executable, "-S", "-c", code))


def run_session(folder: Path, *entries: Entry, seconds: float = 60, processes: int = 1) -> list[Record]:
    """Run a session; returns all records of its folder."""
    deadline = time.monotonic() + seconds
    Session(entries, folder, processes=processes, threads=1, deadline=deadline, revision="").run()
    return read_records(folder / RESULTS_FILE)


def test_session_leaves_out_entries_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the time of finished ones of the kind, else by the guess."""
    long, short, alike = entry("long", kind="other", guess_s=1000), entry("short"), entry("alike", guess_s=1000)
    records = run_session(tmp_path, long, short, alike)
    assert [record.entry for record in records] == ["short", "alike"]
    assert "left out long: it takes about 1000 s" in capsys.readouterr().out


def test_session_records_failure_and_runs_other_entries(tmp_path: Path) -> None:
    failing, other = entry("failing", "raise ValueError('no weights')"), entry("other", "print('result: {\"a\": 1}')")
    for session in (1, 2):
        found = {record.entry: record for record in run_session(tmp_path, failing, other, processes=2)}
        assert (found["failing"].status, found["failing"].result) == ("failed", {})
        assert found["failing"].message == "exit status 1: ValueError: no weights"
        assert (found["other"].status, found["other"].result) == ("done", {"a": 1})
        names = [record.entry for record in read_records(tmp_path / RESULTS_FILE)]
        assert sorted(names) == ["failing"] * session + ["other"]  # a failed entry is tried again


def test_session_at_its_deadline_records_progress_only(tmp_path: Path) -> None:
    slow = entry("slow", "import time\nprint('result: {}')\nprint('epoch 3', flush=True)\ntime.sleep(60)")
    (record,) = run_session(tmp_path, slow, seconds=1)
    assert (record.status, record.result) == ("interrupted", {})
    assert record.message == f"exit status {-signal.SIGTERM}: epoch 3"


def test_session_runs_exclusive_entry_alone(tmp_path: Path) -> None:
    code = f"""import os, time
folder = {str(tmp_path)!r}
open(folder + "/%s.running", "w").close()
time.sleep(0.3)
print("result:", '{{"running": %d}}' % len([name for name in os.listdir(folder) if name.endswith(".running")]))
os.remove(folder + "/%s.running")"""
    entries = [entry(name, code.replace("%s", name)) for name in ("a", "b", "c")]
    entries[1] = replace(entries[1], exclusive=True)
    assert [record.result for record in run_session(tmp_path, *entries, processes=3)] == [{"running": 1}] * 3


def test_record_after_one_that_was_cut_short_is_read(tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    records = [Record(name, "kind", name, "done", 1.0, 1, "", "", {}) for name in ("a", "b")]
    append_record(path, records[0])
    path.write_bytes(path.read_bytes() + b'{"entry": "cut')
    append_record(path, records[1])
    assert read_records(path) == records


def test_entry_ends_with_session_that_was_killed() -> None:
    code = "import time\nfrom benchmarks.support.session import end_with_session\nend_with_session()\ntime.sleep(60)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd=ROOT) as process:
        assert process.stdin
        process.stdin.close()
        assert process.wait(30) == -signal.SIGKILL


def computed(result: dict[str, Any]) -> dict[str, Any]:
    """A run's result without times and memory."""
    return {name: value for name, value in result.items() if name not in ("epoch_s", "memory_gib")}


@pytest.mark.slow
def test_session_killed_and_started_again_equals_unbroken_one(discs: Dataset, tmp_path: Path) -> None:
    arguments = ["--preset", "debug", "--device", "cpu", "--only", "csrnet", "--seeds", "3", "--data", discs.uri]
    arguments += ["--epochs", "1", "--processes", "1", "--threads", "1", "--results", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_session.py"), *arguments]
    with subprocess.Popen(command) as first:
        while not (done := read_records(tmp_path / RESULTS_FILE)) and first.poll() is None:
            time.sleep(0.01)
        first.kill()
    cpu = torch.device("cpu")
    entries, runs = gpu_session.plan(gpu_session.parse_arguments(arguments), arguments, discs, cpu)
    records = run_session(tmp_path, *entries)
    assert len(done) == 1 and records[:1] == done
    assert [record.entry for record in records] == ["csrnet-density-seed3", "csrnet-local-counts-0.1-seed3"]
    assert {record.status for record in records} == {"done"}

    unbroken = [computed(asdict(gpu_session.train(run, discs, cpu))) for run in runs.values()]
    assert [computed(record.result) for record in records] == unbroken
    assert unbroken[0]["errors"] != unbroken[1]["errors"]
    gain = unbroken[0]["validation"]["mae"] - unbroken[1]["validation"]["mae"]
    assert f"gain over density, 1 seeds in pairs: {gain:+.2f}" in "\n".join(gpu_session.table(records))


def test_plan_keeps_validation_images_and_updates_of_arms(discs: Dataset) -> None:
    arguments = ["--preset", "debug", "--seeds", "0", "1"]
    _, runs = gpu_session.plan(gpu_session.parse_arguments(arguments), arguments, discs, torch.device("cpu"))
    rows = {name: gpu_session.fixed_rows(run.config, discs) for name, run in runs.items()}
    assert len({tuple(validation) for _, validation in rows.values()}) == 1
    assert {len(training) for training, _ in rows.values()} == {20, 2}
    assert {math.isclose(run.config.loss.depth, 0) for run in runs.values()} == {True, False}
    few = [set(rows[f"arms-10%-all-seed{seed}"][0]) for seed in (0, 1)]
    assert few[0] != few[1] and not (few[0] | few[1]) & set(rows["arms-10%-all-seed0"][1])
