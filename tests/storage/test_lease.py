"""Laws of leases: one holder at a time among many who ask, and none for longer than it lives."""

import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from crowdray import storage
from crowdray.errors import UserError
from crowdray.storage import lease as leases
from crowdray.storage.lease import Keeper, Lease, living, share, sweep, take

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(place: str) -> str:
    return f"{place}/leases"


def taken(folder: str, name: str, owner: str = "me") -> Lease:
    lease = take(folder, name, owner)
    assert lease is not None
    return lease


def expire(lease: Lease) -> None:
    """What is there when its holder was suspended for long."""
    content = json.dumps({"owner": lease.owner, "token": lease.token, "expires": time.time() - 1})
    storage.write_bytes(lease.uri, content.encode())


def test_one_has_it_until_it_is_given_back(folder: str) -> None:
    with taken(folder, "claim-a") as lease:
        assert take(folder, "claim-a", "other") is None
        assert taken(folder, "claim-ab").name == "claim-ab"
        assert living(folder, "claim-a") == {"claim-a"}
        assert living(folder) == {"claim-a", "claim-ab"}
        said = json.loads(storage.read_bytes(lease.uri))
        assert leases.holder(folder, "claim-a") == ("me", said["expires"])
        assert leases.holder(folder, "claim") is None
        assert said["owner"] == "me" and said["expires"] == pytest.approx(time.time() + leases.LEASE_S, abs=5)
    assert living(folder, "claim-a") == set()
    assert not lease.renew()
    lease.release()
    assert taken(folder, "claim-a", "other").renew()


def test_an_expired_one_is_taken_over_and_its_holder_hears_of_it(folder: str) -> None:
    old = taken(folder, "claim")
    expire(old)
    assert living(folder) == set()
    new = taken(folder, "claim", "other")
    assert new.renew()
    assert not old.renew() and old.ended
    old.release()
    assert living(folder) == {"claim"} and new.renew()
    new.release()
    assert storage.find_files(folder) == []


def test_one_that_nobody_wanted_meanwhile_goes_on(folder: str) -> None:
    lease = taken(folder, "claim")
    expire(lease)
    assert lease.renew() and living(folder) == {"claim"}


def test_a_holder_who_wakes_between_look_and_write_yields_to_the_taker(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = taken(folder, "claim")
    expire(old)
    seen: list[Lease] = []
    write = storage.write_bytes

    def late(uri: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "write_bytes", write)
        seen.append(taken(folder, "claim", "other"))
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", late)
    assert not old.renew()
    assert seen[0].renew() and len(storage.find_files(folder)) == 1


def test_a_taker_who_sleeps_over_a_whole_takeover_yields(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow one saw number 1 expire; meanwhile 2 came and went, and somebody new has number 1."""
    expire(taken(folder, "claim"))
    seen: list[Lease] = []
    create = storage.create_bytes

    def late(uri: str, data: bytes) -> bool:
        monkeypatch.setattr(storage, "create_bytes", create)
        taken(folder, "claim", "quick").release()
        seen.append(taken(folder, "claim", "new"))
        return create(uri, data)

    monkeypatch.setattr(storage, "create_bytes", late)
    assert take(folder, "claim", "slow") is None
    assert seen[0].renew() and len(storage.find_files(folder)) == 1


def test_many_share(folder: str) -> None:
    one, other = share(folder, "hold-a", "me"), share(folder, "hold-a", "me")
    assert living(folder) == {one.name, other.name}
    assert all(name.startswith("hold-a-") for name in living(folder))
    one.release()
    assert living(folder) == {other.name}


def test_a_file_without_content_counts_from_its_time(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(storage.join(folder, "claim.000001.json"), b"")
    assert take(folder, "claim", "me") is None
    monkeypatch.setattr(leases, "LEASE_S", 0.01)
    time.sleep(0.05)
    assert taken(folder, "claim").number == 2


def test_silent_ones_are_swept_and_others_stay(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = taken(folder, "claim")
    sweep(folder)
    assert lease.renew()
    monkeypatch.setattr(leases, "LEASE_S", 0.001)
    time.sleep(0.05)
    sweep(folder)
    assert storage.find_files(folder) == []
    assert not lease.renew()


def test_a_keeper_renews_what_it_has_and_releases_it_at_its_end(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 0.2)
    kept, let_go = taken(folder, "kept"), taken(folder, "let-go")

    def expires(lease: Lease) -> float:
        return float(json.loads(storage.read_bytes(lease.uri))["expires"])

    first, other = expires(kept), expires(let_go)
    with Keeper() as keeper:
        keeper.add(kept)
        keeper.add(let_go)
        keeper.discard(let_go)
        deadline = time.time() + 10
        while expires(kept) < first + 2 * leases.LEASE_S and time.time() < deadline:
            time.sleep(0.02)
        assert expires(kept) >= first + 2 * leases.LEASE_S and not kept.ended
        assert expires(let_go) == other
    assert living(folder) == set() and not kept.renew()
    assert take(folder, "let-go", "other") is not None


def test_a_keeper_outlives_trouble_and_forgets_what_was_lost(
    folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 0.2)
    troubled, tried = taken(folder, "claim"), threading.Event()
    renew = troubled.renew

    def failing() -> bool:
        if not tried.is_set():
            tried.set()
            raise UserError("no network")
        return renew()

    monkeypatch.setattr(troubled, "renew", failing)
    with Keeper() as keeper:
        keeper.add(troubled)
        assert tried.wait(5)
        storage.remove(troubled.uri)
        deadline = time.time() + 5
        while not troubled.ended and time.time() < deadline:
            time.sleep(0.02)
    assert troubled.ended and "no network" in caplog.text


def _race(folder: str, start: Any, done: Any, wins: Any) -> None:
    for number in range(20):
        start.wait(60)
        lease = take(folder, f"claim-{number}", "racer")
        if lease is not None:
            wins.put((number, lease.number))
        done.wait(60)  # nobody releases before all have tried


@pytest.mark.parametrize("stale", [False, True], ids=["new", "takeover"])
def test_of_many_processes_exactly_one_wins(tmp_path: Path, stale: bool) -> None:
    folder, racers = str(tmp_path), 4
    if stale:
        for number in range(20):
            expire(taken(folder, f"claim-{number}"))
    start, done, wins = FORK.Barrier(racers), FORK.Barrier(racers), FORK.Queue()
    processes = [FORK.Process(target=_race, args=(folder, start, done, wins)) for _ in range(racers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    won = sorted(wins.get(timeout=5) for _ in range(20))
    assert won == [(number, 2 if stale else 1) for number in range(20)]
    assert wins.empty()
    assert len(living(folder)) == len(storage.find_files(folder)) == 20
