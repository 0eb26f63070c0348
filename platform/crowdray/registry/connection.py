"""Connection to an MLflow server or database, with a limit on the time of every call.

MLflow itself retries an unreachable server for minutes, and a database for hours.
"""

import contextlib
import ctypes
import importlib.util
import logging
import math
import os
import re
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from crowdray.credentials import redacted, with_credentials
from crowdray.errors import UserError, missing_package

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

_ARTIFACT_CLIENTS = ("boto3", "botocore", "s3transfer", "google", "azure")
_CALL_LIMIT = 4
"""Time of a call with several requests, in units of the timeout of one."""
_MIN_BYTES_PER_S = 2**18
"""Slowest transfer of artifacts that is waited for."""
_LOG_IN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_REASONS = {
    r"status 3|valid JSON format|Exceeded \d+ redirects|no experiments": "another program answers, or a login page",
    r"closed connection|aborted|reset by peer": "it closes the connection",
    r"load plugin": "unknown scheme",
    r"out-of-date database schema": "its schema is of another version",
}
"""What to say instead of a library's text, by symptom."""
_FIXES = {
    r"Invalid Host header": "start the server with --allowed-hosts and the name in the URI",
    r"status 401|UNAUTHENTICATED": f"give or correct the login: {_LOG_IN}",
    r"status 403|PERMISSION_DENIED": f"this user lacks the permission: ask the server's owner, or {_LOG_IN}",
    r"status 40[45]|ENDPOINT_NOT_FOUND": "correct the path in the URI; if it is correct, the server is older than "
    "MLflow 3: upgrade it",
    r"status 429": "the server limits requests: run the same command again later",
    r"status 5": "the server or the proxy before it fails: see its log, then run the same command again",
    r"login page": "correct the address, or log in as the server requires (MLFLOW_TRACKING_TOKEN)",
    r"CERTIFICATE_VERIFY_FAILED": "set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of the server's authority, "
    "or correct the host name",
    r"WRONG_VERSION_NUMBER|SSL": "the server does not speak TLS: write http:// instead of https://",
    r"[Pp]roxy": "check HTTP_PROXY and HTTPS_PROXY, or add the host to NO_PROXY",
    r"not known|No address|name resolution|Invalid url": "correct the host name and the port, or check the network",
    r"closes the connection": "write https:// if it speaks TLS, or see its log",
    r"unknown scheme": "use http://, https://, sqlite:/// or the URI of another database",
    r"[Tt]imed? ?out|timeout": "check that the server is not overloaded and no firewall drops its packets",
    r"refused": "start it (mlflow server --backend-store-uri sqlite:///mlflow.db), or set MLFLOW_TRACKING_URI to a "
    "running server, or to sqlite:////a/folder/mlflow.db for a file that needs no server",
    r"schema is of another version": "back it up and run `mlflow db upgrade` with this URI, or install the newer "
    "MLflow that wrote it",
    r"database is locked": "end the process that holds it, or use a server (mlflow server) for several writers",
    r"readonly|Read-only|unable to open|Permission denied|No such file": "make the file and its folder writable, or "
    "use another path",
    r"not a database|malformed": "the file is damaged or no MLflow database: restore it, or use another path",
    r"password|[Aa]ccess denied|[Aa]uthentication": "correct the user and the password in the URI",
}
"""Fixes by symptom; the first that matches applies."""
_STATUS = re.compile(r"error code (\d{3})|too many (\d{3}) error|(\d{3}) (?:Client|Server) Error")


def connect(uri: str, timeout_s: float) -> "MlflowClient":
    """Return a client for a tracking URI, after one successful request.

    Args:
        uri: http(s)://host:port, sqlite:///path/mlflow.db or another database URI.

    Raises:
        UserError: The URI has another form, does not answer within about `timeout_s` seconds, or is not MLflow.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if "://" not in uri or scheme == "file":
        folder = uri.removeprefix("file://").rstrip("/") or "."
        raise UserError(
            f"the tracking URI {uri!r} is a plain folder, which MLflow no longer supports; "
            f"use a database file in it instead: sqlite:///{folder}/mlflow.db"
        )
    configure_mlflow()
    from mlflow import MlflowClient, MlflowException

    def open_client() -> MlflowClient:
        full = with_credentials(uri)
        if scheme == "sqlite" and "?" not in full:
            full = sqlite_uri(sqlite_path(full))
        if scheme not in ("http", "https"):
            _check_database(full, timeout_s)
        if scheme == "sqlite":
            _create_tables(full)
        client = MlflowClient(tracking_uri=full, registry_uri=full)
        if not client.search_experiments(max_results=1) and not _has_experiment(client):
            raise MlflowException("no experiments")
        return client

    return call_mlflow(uri, timeout_s, open_client, retries=0)


def _has_experiment(client: "MlflowClient") -> bool:
    """Whether MLflow's default experiment exists, deleted or not; any JSON object passes for an empty list."""
    from mlflow.exceptions import RestException

    try:
        return bool(client.get_experiment("0").experiment_id)
    except RestException:  # only MLflow answers so
        return True


def configure_mlflow() -> None:
    """Disable MLflow's telemetry and start-up messages; call this before importing mlflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)  # warnings of a database quote its user


def sqlite_path(uri: str) -> Path:
    """Return the absolute path of the file of sqlite:///relative.db or sqlite:////absolute.db, as MLflow opens it.

    Raises:
        UserError: The URI names no file.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(uri).database
    except ArgumentError:
        database = None
    if not database or database.startswith((":memory:", "file:")):
        raise UserError(f"the tracking URI {uri!r} names no file; use sqlite:////a/folder/mlflow.db")
    return Path(database).absolute()


def sqlite_uri(path: Path) -> str:
    """Return the URI for which SQLAlchemy and MLflow open exactly this file."""
    text = str(path.absolute())
    escaped = text.replace("%", "%25").replace("?", "%3F")
    # MLflow would create folders with the escaped name, but knows only the short form of the scheme there.
    return f"sqlite{'' if escaped == text else '+pysqlite'}:///{escaped}"


def call_mlflow(uri: str, timeout_s: float, call: Callable[[], T], *, retries: int = 1, payload_bytes: int = 0) -> T:
    """Call MLflow: at most `timeout_s` per request, a few times that in total, and errors as one UserError.

    Args:
        uri: Tracking URI, for messages.
        call: Sends any number of requests. After the limit it is abandoned, and ends with its current request.
        retries: Retries of each request.
        payload_bytes: Size of the artifacts that are sent and received, which take time in addition.

    Raises:
        UserError: The call fails, or takes too long.
    """
    limit = _CALL_LIMIT * timeout_s + payload_bytes / _MIN_BYTES_PER_S
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    # A request ends late if its answer trickles, and neither databases nor artifact stores have one timeout for all.
    thread = threading.Thread(target=run, name="crowdray-mlflow", daemon=True)
    with _translated_errors(uri), _request_timeout(timeout_s, retries):
        thread.start()
        thread.join(limit)
        if thread.is_alive():
            assert thread.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            raise TimeoutError(f"timed out after {limit:.0f} s")
        if errors:
            raise errors[0]
        return results[0]


def limit_artifact_store(location: str, timeout_s: float) -> None:
    """Limit requests to artifacts on s3://, of which an abandoned one would delay the end of the process by minutes."""
    if not location.startswith("s3:") or importlib.util.find_spec("boto3") is None:
        return
    import boto3
    from botocore.config import Config
    from botocore.session import get_session

    session = get_session()
    limits = Config(connect_timeout=timeout_s, read_timeout=timeout_s, retries={"total_max_attempts": 2})
    session.set_default_client_config(limits)
    boto3.setup_default_session(botocore_session=session)  # MLflow's clients are made from it


@contextlib.contextmanager
def _request_timeout(timeout_s: float, retries: int) -> Iterator[None]:
    # MLflow reads these variables at each request; it has no arguments for them.
    variables = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, math.floor(timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    with _environment(variables):
        yield


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def silence_mlflow() -> Iterator[None]:
    """Suppress log messages below ERROR and warnings of MLflow and torch.export."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(mlflow|torch)(\.|$)")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _translated_errors(uri: str) -> Iterator[None]:
    """Turn errors of MLflow, its database, its artifact store and the network into one UserError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    store = f"cannot use the MLflow tracking URI {uri}"
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{store}: {missing_package(error)}") from error
    except Exception as error:
        chain = list(_causes(error))
        reason = _reason(chain)
        # Clients of artifact stores have no common base class of their errors.
        if any(type(cause).__module__.startswith(_ARTIFACT_CLIENTS) for cause in chain):
            raise UserError(
                f"cannot use the artifact store of the MLflow tracking URI {uri}: {reason}; check the credentials and "
                "the address of the store"
            ) from error
        if not isinstance(error, (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)):
            raise
        raise UserError(f"{store}: {_explain(reason, str(error))}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it: MLflow wraps network errors in long advice."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(chain: Sequence[BaseException]) -> str:
    """Return the first line of the innermost cause if that is of the system, else of the error itself."""
    source = chain[-1] if isinstance(chain[-1], OSError) else chain[0]
    text = redacted(str(source)).strip()
    if status := _STATUS.search(text):
        answer = re.search(r"Response body: '([^<\n]+)'", text)
        return f"it answers with status {next(filter(None, status.groups()))}" + (f" ({answer[1]})" if answer else "")
    return (text.splitlines() or [type(source).__name__])[0][:300].rstrip(" .;")


def _explain(reason: str, text: str) -> str:
    """Return a reason with the fix for it, which the whole text of the error may decide."""
    text = f"{reason} {text}"
    reason = next((better for symptom, better in _REASONS.items() if re.search(symptom, text)), reason)
    text = f"{reason} {text}"
    fix = next((fix for symptom, fix in _FIXES.items() if re.search(symptom, text)), "check MLFLOW_TRACKING_URI")
    return f"{reason}; {fix}"


def _create_tables(uri: str) -> None:
    """Create the tables of a new SQLite file: MLflow itself would write the working directory into them, unescaped."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = sqlite_path(uri)
    if path.stat().st_size == 0:
        SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri())  # type: ignore[no-untyped-call]


def _check_database(uri: str, timeout_s: float) -> None:
    """Connect once: MLflow repeats a failed attempt for hours."""
    import mlflow
    import sqlalchemy

    if "%" in (folder := str(Path(mlflow.__file__).parent)):
        raise UserError(
            f"MLflow cannot create the tables of a database from {folder}, where it is installed, as it misreads the "
            "%: move the checkout to a folder without %, or set MLFLOW_TRACKING_URI to a running server"
        )
    options: dict[str, object] = {}
    if uri.startswith("sqlite"):
        sqlite_path(uri).parent.mkdir(parents=True, exist_ok=True)
        options["timeout"] = timeout_s  # for a lock
    engine = sqlalchemy.create_engine(uri, connect_args=options)
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(sqlalchemy.text("pragma schema_version"))
    engine.dispose()
