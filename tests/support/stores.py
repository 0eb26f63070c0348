"""Local object stores for the tests: moto and rclone as processes, behind a proxy that injects faults."""

import http.client
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Literal

import s3fs

from .cluster import free_port, listens
from .processes import until

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "loopback", "AWS_SECRET_ACCESS_KEY": "loopback-secret", "AWS_DEFAULT_REGION": "us-east-1"}

Kind = Literal["error", "slow", "cut", "short", "gone", "expired", "lost"]

_REFUSALS = {
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "lost": (500, "InternalError", "We encountered an internal error. Please try again."),
    "gone": (404, "NoSuchKey", "The specified key does not exist."),
    "expired": (403, "ExpiredToken", "The provided token has expired."),
}


@dataclass
class Fault:
    """What the proxy does with the next matching requests."""

    kind: Kind
    """error, gone, expired: refused without reaching the store. lost: performed, but answered with an error. cut: the
    body ends in the middle. short: likewise, with a matching Content-Length. slow: the body stalls in the middle."""
    path: str
    """Regular expression to search in the path."""
    method: str = "GET"
    times: int = 1
    stalled: Event = field(default_factory=Event)
    """Set once a slow body has stalled."""
    resume: Event = field(default_factory=Event)
    """Lets a stalled body continue."""


class Proxy(ThreadingHTTPServer):
    """An HTTP proxy on a free port that counts requests and injects faults."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port = port
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request."""
        self._lock = Lock()

    def inject(self, kind: Kind, path: str, **options: Any) -> Fault:
        """Let the next matching requests fail."""
        self.faults.append(Fault(kind, path, **options))
        return self.faults[-1]

    def count(self, method: str, uri: str) -> int:
        """Number of requests for an object so far."""
        return self.requests.count((method, uri.removeprefix("s3:/")))

    def record_request(self, method: str, path: str) -> Fault | None:
        """Count a request and return the fault to inject into it, if any."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, *_: Any) -> None:
        """Log nothing: the tests kill clients and let them time out."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.record_request(self.command, self.path.partition("?")[0])
        kind = None if fault is None else fault.kind
        if kind in ("error", "gone", "expired"):
            self._refuse(kind)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):  # hop-by-hop, and not signed
                upstream.putheader(name, value)
        upstream.endheaders(body)
        with upstream.getresponse() as response:
            content = response.read()
            if kind == "lost":
                self._refuse("lost")
            else:
                self._respond(response, content, fault)
        upstream.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _refuse(self, kind: str) -> None:
        status, code, message = _REFUSALS[kind]
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _respond(self, response: http.client.HTTPResponse, content: bytes, fault: Fault | None) -> None:
        half = len(content) // 2
        if fault is not None and fault.kind == "short":
            content = content[:half]
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = response.headers["Content-Length"] if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if fault is not None and fault.kind in ("slow", "cut"):
            self.wfile.write(content[:half])
            self.wfile.flush()
            content = content[half:]
            fault.stalled.set()
            if fault.kind == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            fault.resume.wait(60)
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@dataclass(frozen=True)
class Store:
    """An object store with one empty bucket, behind its proxy."""

    name: str
    proxy: Proxy
    uri: str = f"s3://{BUCKET}"

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables of a process that uses the store."""
        variables = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.server_port}", "AWS_MAX_ATTEMPTS": "3"}
        if self.name == "rclone":  # it sends the checksum of the whole object with a range
            variables["AWS_RESPONSE_CHECKSUM_VALIDATION"] = "when_required"
        return variables


@contextmanager
def moto() -> Iterator[Store]:
    """Serve moto's S3 emulation, in memory."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with _serving("moto", command, port) as store:
        s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", key="k", secret="s").mkdir(BUCKET)
        yield store


@contextmanager
def rclone(folder: Path) -> Iterator[Store]:
    """Serve a folder as S3 with rclone, which checks signatures."""
    binary = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert binary, "rclone is not installed; run make setup"
    port = free_port()
    key = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    (folder / BUCKET).mkdir()
    command = [binary, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", key, "--config", "", str(folder)]
    with _serving("rclone", command, port) as store:
        yield store


@contextmanager
def _serving(name: str, command: list[str], port: int) -> Iterator[Store]:
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Proxy(port) as proxy:
        try:
            until(lambda: listens(port), 120, f"{name} did not start")
            Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            yield Store(name, proxy)
            proxy.shutdown()
        finally:
            server.kill()
            server.wait(timeout=30)
