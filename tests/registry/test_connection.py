"""Each cause of a failure of MLflow gets its own fix, and no call outlasts a few timeouts."""

import json
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from crowdray.errors import UserError
from crowdray.registry.connection import call_mlflow, connect, sqlite_path
from crowdray.registry.packaging import Package
from crowdray.registry.registration import register

pytestmark = pytest.mark.slow

EXPERIMENTS = {"experiments": [{"experiment_id": "0", "name": "Default"}]}


class _Handler(BaseHTTPRequestHandler):
    server: "Server"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        status, kind, body = self.server.answer
        if self.server.mode and "experiments/search" in self.path:
            status, kind, body = 200, "application/json", json.dumps(EXPERIMENTS)
        elif self.server.mode == "hangs":
            self.server.end.wait(60)
            return
        elif self.server.mode == "answers slowly":
            time.sleep(0.5)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/login")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for character in body:
            self.wfile.write(character.encode())
            if self.server.mode == "trickles" and self.server.end.wait(0.2):
                return

    do_GET = do_POST = do_PUT = do_PATCH = _answer

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Server(ThreadingHTTPServer):
    """A server with one answer to everything."""

    daemon_threads = True

    def __init__(self, answer: tuple[int, str, str], mode: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.mode, self.end = answer, mode, Event()

    def handle_error(self, *_: object) -> None:
        """Log nothing: clients leave early."""


@contextmanager
def serving(status: int, kind: str, body: str, mode: str = "") -> Iterator[str]:
    with Server((status, kind, body), mode) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.end.set()
        server.shutdown()


JSON, HTML = "application/json", "text/html"


@pytest.mark.parametrize(
    ("status", "kind", "body", "message"),
    [
        (401, "text/plain", "You are not authenticated.", "status 401.*MLFLOW_TRACKING_USERNAME and .*_TOKEN"),
        (403, JSON, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "lacks the permission"),
        (403, HTML, "<h1>Forbidden</h1>", "status 403; this user lacks the permission"),
        (404, HTML, "<h1>Not found</h1>", "status 404; correct the path"),
        (429, HTML, "slow down", "status 429; the server limits requests"),
        (500, JSON, '{"error_code": "INTERNAL_ERROR", "message": "disk"}', "status 500; the server or the proxy"),
        (502, HTML, "<h1>Bad gateway</h1>", "status 502; the server or the proxy"),
        (200, HTML, "<form>password</form>", "login page; correct the address"),
        (302, HTML, "", "login page; correct the address"),
        (200, JSON, '{"hello": 1}', "another program answers"),
        (200, JSON, "[]", "another program answers"),
        (400, JSON, '{"error_code": "X", "message": "Invalid Host header"}', "--allowed-hosts"),
    ],
)
def test_connect_to_a_server_that_refuses_names_the_fix(status: int, kind: str, body: str, message: str) -> None:
    with serving(status, kind, body) as uri, pytest.raises(UserError, match=message) as caught:
        connect(uri, timeout_s=5)
    assert "mlflow server" not in str(caught.value) and "<" not in str(caught.value) and "\n" not in str(caught.value)


def test_connect_to_a_server_without_tls_or_at_an_unknown_host_names_the_fix() -> None:
    with serving(200, JSON, "{}") as uri, pytest.raises(UserError, match="write http:// instead of https://"):
        connect(uri.replace("http:", "https:"), timeout_s=5)
    with pytest.raises(UserError, match="correct the host name"):
        connect("http://no-such-host.invalid:5000", timeout_s=5)
    with pytest.raises(UserError, match="correct the host name and the port"):
        connect("http://127.0.0.1:99999", timeout_s=5)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("update alembic_version set version_num = 'ffffffffffff'", "another version; back it up.*mlflow db upgrade"),
        ("pragma writable_schema = 1; update sqlite_master set sql = 'x'", "the file is damaged"),
    ],
)
def test_connect_to_an_unusable_sqlite_file_names_the_fix(
    store: str, tmp_path: Path, statement: str, message: str
) -> None:
    shutil.copy(sqlite_path(store), tmp_path / "m.db")
    with sqlite3.connect(tmp_path / "m.db") as database:
        database.executescript(statement)
    with pytest.raises(UserError, match=message):
        connect(f"sqlite:///{tmp_path}/m.db", timeout_s=5)


def test_connect_to_a_locked_sqlite_file_names_the_fix(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "m.db", isolation_level=None) as database:
        database.execute("begin exclusive")
        with pytest.raises(UserError, match="locked; end the process that holds it"):
            connect(f"sqlite:///{tmp_path}/m.db", timeout_s=0.3)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2"), "pip install psycopg2-binary$"),
        (ModuleNotFoundError("No module named 'boto3'", name="boto3"), "pip install boto3$"),
        (OSError("attempt to write a readonly database"), "make the file and its folder writable"),
        (OSError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), "MLFLOW_TRACKING_SERVER_CERT_PATH"),
        (OSError('FATAL: password authentication failed for user "me"'), "correct the user and the password"),
        (OSError("HTTPSConnectionPool: Cannot connect to proxy"), "check HTTP_PROXY"),
    ],
)
def test_call_mlflow_translates_an_error_to_its_fix(error: Exception, message: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(UserError, match=message):
        call_mlflow("http://host", 5, fail)


@pytest.mark.parametrize("mode", ["hangs", "answers slowly", "trickles"])
def test_register_with_a_server_that_does_not_finish_raises_within_a_few_timeouts(mode: str, tmp_path: Path) -> None:
    package = Package(tmp_path, "w", 1, {}, {}, torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 2, 2))
    with serving(200, JSON, json.dumps({"run": {"info": {"run_id": "r"}}}), mode) as uri:
        started = time.monotonic()
        with pytest.raises(UserError, match=r"timed out.*not overloaded"):
            register(package, "crowdray-time", "r", 1, uri, timeout_s=0.3)
        assert time.monotonic() - started < 5


def test_connect_through_a_closing_server_names_the_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def close() -> None:
            for _ in range(2):
                server.accept()[0].close()

        Thread(target=close, daemon=True).start()
        with pytest.raises(UserError, match="closes the connection"):
            connect(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=5)
