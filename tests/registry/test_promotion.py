"""Promotion: the decision on the evidence, its record, races, rollback and webhooks."""

import base64
import hmac
import json
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from mlflow import MlflowClient
from werkzeug.serving import make_server

from crowdray.errors import JobFailed, UserError
from crowdray.evaluation.intervals import Interval
from crowdray.registry.card import MAX_DESCRIPTION
from crowdray.registry.promotion import (
    Bounds,
    Decision,
    Evidence,
    PromotionRegistry,
    previous_champion,
    with_comment,
)

WINS = Evidence(
    candidate=2,
    champion=1,
    data="data/mall",
    data_digest="d",
    split="test",
    images=100,
    candidate_mae=2.0,
    opponent_mae=3.0,
    gain=Interval(0.5, 1.5),
    latency_ratio=1.0,
    size_ratio=1.0,
    clean_load="",
    parent="",
)
RACES = int(os.environ.get("CROWDRAY_RACES", "5"))


@pytest.mark.parametrize(
    ("change", "objection"),
    [
        ({}, None),
        (
            {"gain": Interval(0.0, 1.5)},
            "not shown to be better than champion version 1: test MAE 2 against 3 on 100 images",
        ),
        ({"gain": Interval(-0.1, 0.2), "champion": None}, "not shown to be better than always predicting the mean"),
        ({"latency_ratio": 1.2}, "its latency is 1.20 times the champion's, more than 1.1"),
        ({"size_ratio": 2.0}, "its size is 2.00 times"),
        ({"clean_load": "no module"}, "does not load without crowdray: no module"),
        ({"parent": "the run is gone"}, None),
        ({"parent_differs": True}, "not that of the run's whole network"),
    ],
)
def test_objections_name_each_bound_that_the_evidence_breaks(change: dict[str, object], objection: str | None) -> None:
    found = replace(WINS, **change).objections(Bounds())  # type: ignore[arg-type]
    assert len(found) == (objection is not None) and (objection or "") in "".join(found)
    assert "by more than 0.5" in WINS.objections(Bounds(margin=0.5))[0]


def _history(*steps: tuple[str, int, int | None]) -> list[Decision]:
    return [Decision(n, "", action, version, before) for n, (action, version, before) in enumerate(steps)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "current", "expected"),
    [
        ([], None, None),
        ([("promoted", 1, None)], 1, None),
        ([("promoted", 1, None), ("rejected", 2, 1), ("promoted", 3, 1)], 3, 1),
        ([("promoted", 1, None), ("promoted", 2, 1), ("promoted", 3, 2), ("restored", 2, 3)], 2, 1),
        ([("promoted", 3, 1)], 3, 1),
        ([("promoted", 1, None), ("promoted", 9, 1), ("promoted", 3, 9)], 3, 1),
        ([("promoted", 1, None)], 2, 1),
    ],
)
def test_previous_champion_follows_the_history(
    steps: list[tuple[str, int, int | None]], current: int | None, expected: int | None
) -> None:
    assert previous_champion(_history(*steps), current, {1, 2, 3}) == expected


def test_with_comment_keeps_the_card_and_the_newest_comments() -> None:
    text = "card" * 900
    for number in range(40):
        text = with_comment(text, f"decision {number:02d} {'x' * 100}")
        assert len(text) <= MAX_DESCRIPTION and text.startswith("cardcard") and f"decision {number:02d}" in text
    assert text.count("## Promotions") == 1 and "decision 39" in with_comment("y" * 6000, "decision 39")


@pytest.fixture(scope="module")
def client(store: str) -> MlflowClient:
    return MlflowClient(store, store)


def _model(client: MlflowClient, name: str, versions: int) -> str:
    client.create_registered_model(name)
    for version in range(versions):
        client.create_model_version(name, source=f"s3://bucket/{version}")
    return name


def test_promotion_and_rollback_move_the_champion_and_are_recorded(store: str, client: MlflowClient) -> None:
    registry = PromotionRegistry(_model(client, "crowdray-promotion", 3), store)
    assert registry.decide(replace(WINS, candidate=1, champion=None), Bounds()).action == "promoted"
    rejected = registry.decide(replace(WINS, clean_load="no torch"), Bounds())
    assert (rejected.action, registry.champion()) == ("rejected", 1)
    registry.decide(replace(WINS, candidate=3), Bounds())
    with pytest.raises(JobFailed, match="meanwhile another process made version 3 of crowdray-promotion the champion"):
        registry.decide(WINS, Bounds())
    assert registry.champion() == 3
    restored = registry.rollback()
    assert (restored.version, restored.champion_before, registry.champion()) == (1, 3, 1)
    with pytest.raises(UserError, match="no earlier champion"):
        registry.rollback()
    assert [(d.number, d.action, d.version) for d in registry.history()] == [
        (1, "promoted", 1),
        (2, "rejected", 2),
        (3, "promoted", 3),
        (4, "restored", 1),
    ]
    assert registry.history()[1] == rejected
    version = client.get_model_version("crowdray-promotion", "2")
    assert version.tags["crowdray.promotion"] == str(rejected) and f"- {rejected}" in str(version.description)
    registry.set_candidate(2)
    assert client.get_registered_model("crowdray-promotion").aliases == {"candidate": 2, "champion": 1}


@pytest.mark.parametrize("version", ["models:/other/1", "models:/crowdray-resolve/x", "3", "runs:/a/model"])
def test_resolve_of_another_models_version_raises(store: str, client: MlflowClient, version: str) -> None:
    name = "crowdray-resolve"
    if not client.search_registered_models(f"name = '{name}'"):
        _model(client, name, 1)
    registry = PromotionRegistry(name, store)
    assert registry.resolve(f"models:/{name}/1") == 1
    with pytest.raises(
        UserError, match=r"is not a version of crowdray-resolve; write models:/crowdray-resolve/VERSION"
    ):
        registry.resolve(version)
    with pytest.raises(UserError, match=r"there is no version models:/crowdray-resolve/2 at .*: 1"):
        registry.resolve(f"models:/{name}/2")


def test_of_two_concurrent_promotions_one_wins(store: str, client: MlflowClient) -> None:
    registry = PromotionRegistry(_model(client, "crowdray-race", 3), store)
    client.set_registered_model_alias("crowdray-race", "champion", "1")
    barrier, winners = threading.Barrier(2), []

    def promote(candidate: int) -> int | None:
        barrier.wait()
        try:
            return registry.decide(replace(WINS, candidate=candidate), Bounds()).version
        except JobFailed:
            return None

    with ThreadPoolExecutor(2) as pool:
        for _ in range(RACES):
            won = [version for version in pool.map(promote, (2, 3)) if version]
            assert won == [registry.champion()]
            winners += won
            client.set_registered_model_alias("crowdray-race", "champion", "1")
    assert len(registry.history()) == RACES == len(winners)


def test_promotion_through_a_server_calls_the_webhook_of_the_alias(
    store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server import app, handlers

    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")  # for a receiver on this machine
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setattr(handlers, "_tracking_store", client._tracking_client.store)
    registry_client: Any = client._get_registry_client()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(handlers, "_model_registry_store", registry_client.store)
    received: queue.Queue[tuple[dict[str, str], bytes]] = queue.Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    _model(client, "crowdray-webhook", 1)
    with _served(HTTPServer(("127.0.0.1", 0), Receiver)) as receiver, _served(make_server("127.0.0.1", 0, app)) as port:
        client.create_webhook(
            "promotions", f"http://127.0.0.1:{receiver}/", ["model_version_alias.created"], secret="s"
        )
        registry = PromotionRegistry("crowdray-webhook", f"http://127.0.0.1:{port}")
        registry.decide(replace(WINS, candidate=1, champion=None), Bounds())
        headers, body = received.get(timeout=30)
    event = json.loads(body)
    assert (event["entity"], event["action"]) == ("model_version_alias", "created")
    assert event["data"] == {"name": "crowdray-webhook", "alias": "champion", "version": "1"}
    signed = f"{headers['X-MLflow-Delivery-Id']}.{headers['X-MLflow-Timestamp']}.".encode() + body
    signature = base64.b64encode(hmac.digest(b"s", signed, "sha256")).decode()
    assert headers["X-MLflow-Signature"] == f"v1,{signature}"


@contextmanager
def _served(server: HTTPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
