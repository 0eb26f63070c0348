"""Aliases: the best version becomes candidate whatever the order, and one process at a time moves an alias."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient

from crowdray.errors import JobFailed
from crowdray.registry import aliases
from crowdray.registry.aliases import CandidateDecision, Validation, alias_lock, choose_candidate
from crowdray.registry.registration import move_candidate

NAME = "crowdray-aliases"


def validation(
    version: int, mae: float | None = 20.0, mean: float | None = 66.0, images: str | None = "a"
) -> Validation:
    return Validation(version, mae, mean, images)


@pytest.mark.parametrize(
    ("new", "holder", "expected"),
    [
        (validation(2, 295.0), None, None),
        (validation(2, 66.0), None, None),
        (validation(2, mean=None), None, None),
        (validation(2), None, 2),
        (validation(2), validation(1, 20.0), 1),
        (validation(2, 19.0), validation(1, 20.0), 2),
        (validation(2, 19.0), validation(1, 20.0, images="b"), 1),
        (validation(2), validation(1, None), 2),
        (validation(2), validation(1, images=None), 2),
    ],
)
def test_choose_candidate_prefers_the_lower_error_on_the_same_images(
    new: Validation, holder: Validation | None, expected: int | None
) -> None:
    decision = choose_candidate(new, holder, NAME)
    assert (decision.holder, decision.moves) == (expected, expected == 2)


@pytest.fixture(scope="module")
def client(store: str) -> MlflowClient:
    client = MlflowClient(store, store)
    client.create_registered_model(NAME)
    for version, mae in enumerate((30.0, 20.0, 10.0, 25.0), 1):
        tags = {"val/mae": str(mae), "mean_predictor/val/mae": "66", "crowdray.validation_images": "a"}
        client.create_model_version(NAME, source=f"s3://bucket/{version}", tags=tags)
    return client


def test_concurrent_registrations_end_at_the_best_version(client: MlflowClient) -> None:
    def move(version: int) -> CandidateDecision:
        return move_candidate(client, NAME, Validation.of(version, client.get_model_version(NAME, str(version)).tags))

    with ThreadPoolExecutor(4) as pool:
        for order in itertools.islice(itertools.permutations((1, 2, 3, 4)), 5):
            list(pool.map(move, order))
            assert client.get_registered_model(NAME).aliases == {"candidate": 3}
            client.delete_registered_model_alias(NAME, "candidate")
    assert client.get_registered_model(NAME).tags == {}


def test_alias_lock_of_an_ended_process_is_taken_over(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "_STALE_S", 0.1)
    with alias_lock(client, NAME) as suspended:
        started = time.monotonic()
        with alias_lock(client, NAME) as lock:
            lock.set_alias("champion", 1)
        assert time.monotonic() - started > 0.1
        with pytest.raises(JobFailed, match=f"another process took the lock of {NAME}"):
            suspended.set_alias("champion", 2)
    assert client.get_registered_model(NAME).aliases == {"champion": 1}
