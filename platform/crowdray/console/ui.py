"""MLflow's web pages in a browser: `make ui`, or python -m crowdray.console.ui."""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path

from crowdray.console.arguments import tracking_uri
from crowdray.console.main import run_job
from crowdray.credentials import with_credentials
from crowdray.errors import JobFailed, UserError
from crowdray.registry import pages
from crowdray.registry.connection import connect

_START_LIMIT_S = 120.0


def main(arguments: Sequence[str]) -> None:
    """Serve the tracking store until Ctrl-C, if no server does, print the addresses of its pages, and open one."""
    parser = argparse.ArgumentParser("make ui", description=main.__doc__)
    parser.add_argument("--port", type=int, default=pages.LOCAL_PORT, help="port on this machine (make ui PORT=5001)")
    port, uri = parser.parse_args(arguments).port, tracking_uri()
    if pages.is_server(uri):
        _show(uri, pages.server_of(uri))
        return
    server = f"http://127.0.0.1:{port}"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(
                f"port {port} is in use, perhaps by another `make ui`; use another: make ui PORT={port + 1}"
            )
    connect(uri, timeout_s=20)  # creates the tables of a new store
    process = _serve(uri, port)
    try:
        _wait_until_served(process, server)
        _show(uri, server)
        print("Ctrl-C ends the server.", flush=True)
        if process.wait():
            raise JobFailed(f"the MLflow server ended with status {process.returncode}; see its messages above")
    except KeyboardInterrupt:
        print()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def command() -> str:
    """Return how to start the server from a shell in the current folder."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "Makefile").is_file():
        return f"{shlex.quote(sys.executable)} -m crowdray.console.ui"
    return "make ui" if root == Path.cwd() else f"make -C {shlex.quote(str(root))} ui"


def _serve(uri: str, port: int) -> "subprocess.Popen[bytes]":
    # Without MLflow's job runner: seven processes for features that crowdray does not use. The URI is in the
    # environment, which other users cannot list, unlike arguments.
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
        "MLFLOW_BACKEND_STORE_URI": with_credentials(uri),
    }
    server = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Ctrl-C reaches this process alone, which ends the server and its children without their tracebacks.
    return subprocess.Popen([*server, "--uvicorn-opts", "--log-level warning"], env=environment, start_new_session=True)


def _wait_until_served(process: "subprocess.Popen[bytes]", server: str) -> None:
    limit = time.monotonic() + _START_LIMIT_S
    while process.poll() is None and time.monotonic() < limit:
        try:
            with urllib.request.urlopen(f"{server}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise JobFailed("the MLflow server did not start; see its messages above")


def _show(uri: str, server: str) -> None:
    """Print the addresses of all pages, and open the first where there is a display."""
    links = list(_links(uri, server)) or [("no runs yet", server)]
    for name, link in links:
        print(f"{name + ':':<28} {link}", flush=True)
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform == "darwin":
        webbrowser.open(links[0][1])


def _links(uri: str, server: str) -> Iterator[tuple[str, str]]:
    client = connect(uri, timeout_s=20)
    newest_first = ["last_update_time DESC"]
    for experiment in client.search_experiments(filter_string="name LIKE 'crowdray-%'", order_by=newest_first):
        yield f"runs of {experiment.name}", pages.runs_page(server, experiment.experiment_id)
    for model in client.search_registered_models(filter_string="name LIKE 'crowdray-%'"):
        yield f"model {model.name}", pages.model_page(server, model.name)


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
