"""The lock: one holder among many processes, taken over only after its holder's heartbeat stops."""

import json
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from crowdray import storage
from crowdray.errors import UserError
from crowdray.storage import lock as lock_module
from crowdray.storage.lock import Lock
from crowdray.storage.process import process_id

FORK = multiprocessing.get_context("fork")
FIX = "choose another --name"


@pytest.fixture
def uri(root_uri: str) -> str:
    return f"{root_uri}/locks/driver"


def make_lock(uri: str, messages: list[str] | None = None) -> Lock:
    return Lock(uri, "the study", FIX, (messages if messages is not None else []).append)


def acquired(uri: str) -> Lock:
    lock = make_lock(uri)
    assert lock.try_acquire()
    return lock


def expire(lock: Lock) -> None:
    """Make the lock look as if its holder had been killed."""
    content = json.loads(storage.read_bytes(lock.uri))
    storage.write_bytes(lock.uri, json.dumps(content | {"process": f"{content['process']}0"}).encode())


def heartbeats(lock: Lock) -> int:
    return int(json.loads(storage.read_bytes(lock.uri))["heartbeats"])


def lock_files(uri: str) -> list[str]:
    return [file.name for file in storage.find_files(uri.rpartition("/")[0])]


def test_lock_has_one_holder_until_released(uri: str) -> None:
    with make_lock(uri) as lock:
        assert lock.held and lock.renew()
        assert not make_lock(uri).try_acquire()
        with make_lock(f"{uri}-2"), make_lock(f"{uri[:-1]}"):
            assert len(lock_files(uri)) == 3, "locks with similar names are independent"
        assert heartbeats(lock) == 1
    assert not lock.held and not lock.renew() and lock_files(uri) == []
    lock.release()
    acquired(uri).release()


def test_lock_expired_is_taken_over_and_its_holder_notices(uri: str) -> None:
    old = acquired(uri)
    expire(old)
    new = acquired(uri)
    assert new.renew()
    assert not old.renew() and not old.held
    old.release()
    assert new.renew()
    new.release()
    assert lock_files(uri) == []


def test_lock_expired_without_competitor_is_renewed(uri: str) -> None:
    with make_lock(uri) as lock:
        expire(lock)
        assert lock.renew() and not make_lock(uri).try_acquire()


def test_renew_yields_to_takeover_between_check_and_write(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = acquired(uri)
    expire(old)
    new: list[Lock] = []
    write = storage.write_bytes

    def write_late(uri_: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "write_bytes", write)
        new.append(acquired(uri))
        write(uri_, data)

    monkeypatch.setattr(storage, "write_bytes", write_late)
    assert not old.renew()
    assert new[0].renew() and len(lock_files(uri)) == 1
    new[0].release()


def test_acquire_yields_after_sleeping_through_a_takeover(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow process saw generation 1 expire; meanwhile 2 was taken and released, and another process has 1."""
    expire(acquired(uri))
    new: list[Lock] = []
    create = storage.create_bytes

    def create_late(uri_: str, data: bytes) -> bool:
        monkeypatch.setattr(storage, "create_bytes", create)
        acquired(uri).release()
        new.append(acquired(uri))
        return create(uri_, data)

    monkeypatch.setattr(storage, "create_bytes", create_late)
    assert not make_lock(uri).try_acquire()
    assert new[0].renew() and len(lock_files(uri)) == 1
    new[0].release()


@pytest.mark.parametrize(
    "content", [b"", b"{", json.dumps({"owner": "gone", "token": "t", "expires": 4_000_000_000}).encode()]
)
def test_lock_file_that_never_changes_is_taken_over(uri: str, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    storage.write_bytes(f"{uri}.000001.json", content)
    monkeypatch.setattr(lock_module, "TIMEOUT_S", 0.2)
    with make_lock(uri) as lock:
        assert lock.uri.endswith("driver.000002.json") and len(lock_files(uri)) == 1


@pytest.mark.parametrize("clock", [-1e6, 1e6])
def test_lock_of_a_running_holder_with_a_wrong_clock_is_kept(
    uri: str, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    monkeypatch.setattr(lock_module, "process_id", lambda pid: "another machine 1 1")
    monkeypatch.setattr(lock_module, "TIMEOUT_S", 1.0)
    with make_lock(uri) as lock:
        monkeypatch.setattr(time, "time", lambda: clock)
        with pytest.raises(UserError, match="in use by"):
            make_lock(uri).__enter__()
        assert lock.held


def test_heartbeat_renews_until_release(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "TIMEOUT_S", 0.2)
    with make_lock(uri) as lock:
        deadline = time.monotonic() + 10
        while heartbeats(lock) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert heartbeats(lock) >= 3 and lock.held
    assert lock_files(uri) == []


def test_heartbeat_survives_an_error_and_notices_a_loss(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock_module, "TIMEOUT_S", 0.2)
    lock, failed = make_lock(uri), threading.Event()
    renew = lock.renew

    def fail_once() -> bool:
        if not failed.is_set():
            failed.set()
            raise UserError("no network")
        return renew()

    monkeypatch.setattr(lock, "renew", fail_once)
    with lock:
        assert failed.wait(5)
        storage.remove(lock.uri)
        deadline = time.time() + 5
        while lock.held and time.time() < deadline:
            time.sleep(0.02)
    assert not lock.held and "no network" in caplog.text and "was lost to another process" in caplog.text


def test_acquire_rejects_a_running_holder_and_replaces_a_dead_one(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "TIMEOUT_S", 2.0)
    messages: list[str] = []
    with make_lock(uri) as lock, pytest.raises(UserError, match=rf"the study is in use by {lock.owner}; {FIX}"):
        make_lock(uri, messages).__enter__()
    assert not messages, "a process of this machine is known to run"
    content = {"owner": "a killed process", "token": "", "process": "elsewhere 1 1"}
    storage.write_bytes(f"{uri}.000007.json", json.dumps(content).encode())
    monkeypatch.setattr(lock_module, "TIMEOUT_S", 0.4)
    with make_lock(uri, messages):
        assert lock_files(uri) == ["driver.000008.json"]
    assert messages == ["waiting up to 0 s: a killed process may still be using the study"]


def _race(folder: str, start: Any, done: Any, wins: Any) -> None:
    logging.disable()
    for number in range(20):
        start.wait(60)
        lock = make_lock(f"{folder}/lock-{number}")
        if lock.try_acquire():
            wins.put((number, int(lock.uri[-11:-5])))
        done.wait(60)  # no process releases before all have tried


@pytest.mark.parametrize("expired", [False, True], ids=["new", "takeover"])
def test_acquire_from_many_processes_has_exactly_one_winner(tmp_path: Path, expired: bool) -> None:
    folder, racers = str(tmp_path), 4
    if expired:
        for number in range(20):
            content = {"owner": "dead", "token": "dead", "process": f"{process_id(os.getpid())}0"}
            (tmp_path / f"lock-{number}.000001.json").write_text(json.dumps(content))
    start, done, wins = FORK.Barrier(racers), FORK.Barrier(racers), FORK.Queue()
    processes = [FORK.Process(target=_race, args=(folder, start, done, wins)) for _ in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    won = sorted(wins.get(timeout=5) for _ in range(20))
    assert won == [(number, 2 if expired else 1) for number in range(20)]
    assert wins.empty() and len(list(tmp_path.iterdir())) == 20
