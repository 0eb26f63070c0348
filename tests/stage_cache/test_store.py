"""Laws of the stage store: whole states or none, the longest beginning is found, and what is in use stays."""

import logging
import os
import time
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from crowdray import storage
from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.stage_cache import store
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import MANIFEST, StageStore, StateId
from crowdray.storage import lease as leases
from crowdray.training.checkpoint import BestEpoch, Checkpoint, Progress, load_checkpoint, save_checkpoint

PLENTY = 10**9
CHAIN = StageKey("a" * 32, "baseline", 10)
OTHER = StageKey("b" * 32, "decoders", 4)


def checkpoint(number: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(number)
    weights = {"encoder.w": torch.randn(3, 4, generator=generator), "b": torch.full((5,), float(number))}
    progress = Progress(1.5, 2.5, "data", 1, stage_epochs=number, best={"baseline": BestEpoch(number, 1.0, 2.0)})
    moments = {"0.momentum": torch.randn(7, generator=generator)}
    return Checkpoint(Config(seed=number), progress, weights, weights, moments, {"baseline": weights})


def publish(at: StageStore, chain: StageKey, epoch: int, number: int | None = None) -> StateId:
    made = checkpoint(epoch if number is None else number)
    at.publish(chain, epoch, lambda folder: save_checkpoint(made, folder))
    return StateId(chain.key, chain.stage, epoch)


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    def tensors(of: Checkpoint) -> dict[str, torch.Tensor]:
        named = {"weights": of.weights, "average": of.ema, "optimizer": of.optimizer, **of.best_weights}
        return {f"{group} {name}": value for group, values in named.items() for name, value in values.items()}

    if one is None or (one.config, one.progress) != (other.config, other.progress):
        return False
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def files(at: StageStore, folder: str = "") -> list[str]:
    return [file.name for file in storage.find_files(storage.join(at.uri, folder) if folder else at.uri)]


def refuse(folder: Path) -> None:
    raise AssertionError("saved again")


def test_a_state_comes_back_bit_for_bit(place: str) -> None:
    at = StageStore(place, PLENTY)
    state = publish(at, CHAIN, 3)
    assert at.find([CHAIN]) == state and at.epochs(CHAIN) == [3]
    assert same(at.load(state), checkpoint(3))
    at.publish(CHAIN, 3, refuse)
    assert at.load(StateId(CHAIN.key, CHAIN.stage, 4)) is None
    assert at.size() == sum(f.size for f in storage.find_files(storage.join(place, "states"))) > 0
    assert not files(at, "leases")


def test_an_empty_store_has_nothing(place: str) -> None:
    at = StageStore(place, PLENTY)
    assert at.find([CHAIN, OTHER]) is None and at.find([]) is None
    assert at.epochs(CHAIN) == [] and at.size() == 0 and not at.claimed(CHAIN)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.sets(st.integers(1, 8))), max_size=4))
def test_the_longest_beginning_is_found(stored: list[tuple[int, set[int]]]) -> None:
    at = StageStore(f"memory://{uuid.uuid4().hex}", PLENTY)
    chains = [StageKey(f"{number:032x}", "baseline", epochs) for number, (epochs, _) in enumerate(stored)]
    for chain, (_, epochs) in zip(chains, stored, strict=True):
        for epoch in epochs:
            storage.write_bytes(storage.join(at.uri, "states", chain.key, f"{epoch:05d}", MANIFEST), b"{}")
        storage.write_bytes(storage.join(at.uri, "states", chain.key, "00001", "0f", "half.bin"), b"no manifest")
    usable = [
        (number, epoch)
        for number, (longest, epochs) in enumerate(stored)
        for epoch in range(1, longest + 1)
        if epoch in epochs
    ]
    found = at.find(chains)
    expected = max(usable, default=None)
    assert (found and (found.chain, found.epoch)) == (expected and (chains[expected[0]].key, expected[1]))


@pytest.mark.parametrize("victim", ["weights.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_a_damaged_state_is_not_used_but_trained_again(
    place: str, victim: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    at = StageStore(place, PLENTY)
    publish(at, CHAIN, 1)
    state = publish(at, CHAIN, 2)
    name = next(name for name in files(at, f"states/{CHAIN.key}/00002") if name.endswith(victim))
    uri = storage.join(place, "states", CHAIN.key, "00002", name)
    content = bytearray(storage.read_bytes(uri))
    content[-1] ^= 1  # in the weights a number, which only the hash tells
    if harm == "lose":
        storage.remove(uri)
    else:
        storage.write_bytes(uri, bytes(content) if harm == "flip" else bytes(content[: len(content) // 2]))
    if (victim, harm) != (MANIFEST, "flip"):  # a flipped bit there may hit what is not read
        assert at.load(state) is None
        assert (victim, harm) == (MANIFEST, "lose") or "cannot be used and will be trained again" in caplog.text
        assert at.find([CHAIN]) == StateId(CHAIN.key, CHAIN.stage, 1)
        publish(at, CHAIN, 2)
    assert (loaded := at.load(state)) is None or same(loaded, checkpoint(2))


def test_a_state_with_fields_of_another_time_is_trained_again(place: str) -> None:
    at = StageStore(place, PLENTY)

    def save(folder: Path) -> None:
        save_checkpoint(checkpoint(1), folder)
        (folder / "config.json").write_text('{"sampling": {"a_field_of_old": 1}}')

    at.publish(CHAIN, 1, save)
    assert at.load(StateId(CHAIN.key, CHAIN.stage, 1)) is None and at.epochs(CHAIN) == []


def test_what_this_user_may_not_read_stays(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = StageStore(place, PLENTY)
    state = publish(at, CHAIN, 1)

    def forbidden(path: Path) -> str:
        if path.name != "weights.safetensors":
            return hash_file(path)
        raise PermissionError(13, os.strerror(13))

    hash_file = storage.hash_file
    monkeypatch.setattr(storage, "hash_file", forbidden)
    with pytest.raises(UserError, match=r"cannot read .*weights.*ermission"):
        at.load(state)
    assert at.epochs(CHAIN) == [1]


def test_a_manifest_that_points_elsewhere_is_damaged(place: str, tmp_path: Path) -> None:
    at = StageStore(place, PLENTY)
    state = publish(at, CHAIN, 1)
    uri = storage.join(place, "states", CHAIN.key, "00001", MANIFEST)
    for bad in (
        b'{"folder": "..", "files": {}}',
        b"[]",
        b'{"folder": "a", "files": {"../x": {"bytes": 1, "sha256": ""}}}',
    ):
        storage.write_bytes(uri, bad)
        assert at.load(state) is None and at.epochs(CHAIN) == []


def test_one_that_is_removed_while_it_is_read_is_gone_without_a_warning(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    at = StageStore(place, PLENTY)
    state = publish(at, CHAIN, 1)
    read = storage.read_bytes_or_none

    def removed_after(uri: str) -> bytes | None:
        content = read(uri)
        if uri.endswith(MANIFEST):
            monkeypatch.setattr(storage, "read_bytes_or_none", read)
            storage.unpublish_directory(storage.join(place, "states", CHAIN.key, "00001"), MANIFEST)
        return content

    monkeypatch.setattr(storage, "read_bytes_or_none", removed_after)
    assert at.load(state) is None and not caplog.records


def test_the_first_whole_one_stays(place: str) -> None:
    at = StageStore(place, PLENTY)

    def save(folder: Path) -> None:
        publish(at, CHAIN, 1, number=5)  # another is quicker
        save_checkpoint(checkpoint(6), folder)

    at.publish(CHAIN, 1, save)
    assert same(at.load(StateId(CHAIN.key, CHAIN.stage, 1)), checkpoint(5))


def test_remains_without_a_manifest_do_not_stand_in_the_way(place: str) -> None:
    at = StageStore(place, PLENTY)
    storage.write_bytes(storage.join(place, "states", CHAIN.key, "00001", "0f", "weights.safetensors"), b"half")
    assert at.find([CHAIN]) is None and at.load(StateId(CHAIN.key, CHAIN.stage, 1)) is None
    assert same(at.load(publish(at, CHAIN, 1)), checkpoint(1))


@pytest.mark.parametrize("said", ["os", "safetensors"])
def test_a_full_disk_is_the_users_and_leaves_nothing(place: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = StageStore(place, PLENTY)

    def full(folder: Path) -> None:
        (folder / "weights.safetensors").write_bytes(b"half")
        if said == "os":
            raise OSError(28, os.strerror(28))
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"no space left.*00001.*TMPDIR"):
        at.publish(CHAIN, 1, full)
    assert files(at) == []
    fs = fsspec.filesystem("memory")

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("shutil.copytree", no_space)
    monkeypatch.setattr(type(fs), "put_file", no_space)
    with pytest.raises(UserError, match=r"00001.*no space left"):
        publish(at, CHAIN, 1)
    assert files(at) == []


def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(place: str) -> None:
    at = StageStore(place, PLENTY)
    states = []
    for epoch in range(1, 6):
        states.append(publish(at, CHAIN, epoch))
        time.sleep(0.02)
    publish(at, OTHER, 1)
    time.sleep(0.02)
    assert at.load(states[0]) is not None
    time.sleep(0.02)
    room = at.size() * 4 // 6 + 100  # for four of the seven
    tight = StageStore(place, room)
    with tight.hold(states[1]), tight.claim(CHAIN, "me") or pytest.fail("nobody has it"):
        publish(tight, OTHER, 2)
    # Used in the order 2 3 4 5, then the other chain's, then 1, which was loaded. 2 is held, 5 is where the claimed
    # chain goes on: 3 and 4 go, and the next one after them.
    assert tight.epochs(CHAIN) == [1, 2, 5] and tight.epochs(OTHER) == [2]
    assert tight.size() <= room
    publish(tight, OTHER, 3)
    assert tight.epochs(CHAIN) == [1, 5] and tight.epochs(OTHER) == [2, 3]
    marks = {f"{CHAIN.key}-00001"}
    assert set(files(at, "used")) == marks


def test_a_state_larger_than_the_limit_is_kept_with_a_warning(place: str, caplog: pytest.LogCaptureFixture) -> None:
    at = StageStore(place, 10)
    publish(at, CHAIN, 1)
    assert at.epochs(CHAIN) == [1]
    assert "more than its limit of 10" in caplog.text
    publish(at, CHAIN, 2)
    assert at.epochs(CHAIN) == [2]


def test_two_evictors_at_once_do_no_harm(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = StageStore(place, PLENTY)
    for epoch in (1, 2, 3):
        publish(at, CHAIN, epoch)
    tight = StageStore(place, at.size() // 3 + 100)
    remove = StageStore._remove

    def twice(self: StageStore, chain: str, epoch: int) -> None:
        monkeypatch.setattr(StageStore, "_remove", remove)
        publish(tight, OTHER, 1)  # evicts all of them
        remove(self, chain, epoch)

    monkeypatch.setattr(StageStore, "_remove", twice)
    publish(tight, OTHER, 2)
    assert tight.epochs(CHAIN) == [] and tight.size() <= tight.limit_bytes
    assert len(tight.epochs(OTHER)) == 1  # for each evictor the other one's state is a state like any other


def test_a_hold_lasts_while_a_slow_reader_reads(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 0.2)
    at = StageStore(place, PLENTY)
    state = publish(at, CHAIN, 1)
    load, seen = load_checkpoint, []

    def slow(folder: Path) -> Checkpoint:
        time.sleep(0.5)
        publish(StageStore(place, 1), OTHER, 1)
        seen.append(at.epochs(CHAIN))
        return load(folder)

    monkeypatch.setattr(store, "load_checkpoint", slow)
    assert same(at.load(state), checkpoint(1))
    assert seen == [[1]]


def test_what_killed_ones_left_is_swept_when_it_is_old(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = StageStore(place, PLENTY)
    at.load(publish(at, CHAIN, 1))
    remains = ["states/c/.partial-0-00001/manifest.json", "states/c/00002/0f/half.bin", f"used/{'c' * 32}-00001"]
    for name in remains:
        storage.write_bytes(storage.join(place, name), b"remains")
    publish(at, CHAIN, 2)
    assert set(remains) <= set(files(at))
    monkeypatch.setattr(store, "LEFTOVER_S", -5.0)
    publish(at, CHAIN, 3)
    assert not set(remains) & set(files(at))
    assert at.epochs(CHAIN) == [1, 2, 3] and f"used/{CHAIN.key}-00001" in files(at)


def test_a_chain_is_claimed_by_one(place: str) -> None:
    at, again = StageStore(place, PLENTY), StageStore(place, PLENTY)
    claim = at.claim(CHAIN, "me")
    assert claim is not None and claim.owner == "me"
    assert again.claim(CHAIN, "you") is None and again.claimed(CHAIN) and not again.claimed(OTHER)
    claim.release()
    assert not again.claimed(CHAIN) and again.claim(CHAIN, "you") is not None


def test_an_epoch_is_counted_from_one(place: str) -> None:
    with pytest.raises(AssertionError, match="counted from 1"):
        publish(StageStore(place, PLENTY), CHAIN, 0)


def test_nothing_is_said_when_all_is_well(place: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="crowdray"):
        at = StageStore(place, PLENTY)
        at.load(publish(at, CHAIN, 1))
    assert [record for record in caplog.records if record.name.startswith("crowdray")] == []
