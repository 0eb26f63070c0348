"""MLflow's pages in a browser."""

import socket

import pytest

from crowdray.console import ui
from crowdray.errors import UserError


def test_ui_on_a_used_port_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use.*make ui PORT={port + 1}"):
            ui.main(["--port", str(port)])


def test_ui_of_a_server_prints_its_pages_and_starts_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = "https://host/mlflow/#/experiments/1/runs"
    monkeypatch.setattr("crowdray.credentials.hidden", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:secret@host/mlflow")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(ui, "_links", lambda uri, server: [("runs", f"{server}/#/experiments/1/runs")])
    monkeypatch.setattr(ui, "_serve", None)
    ui.main([])
    assert page in (shown := capsys.readouterr().out) and "secret" not in shown
