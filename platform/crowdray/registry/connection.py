"""Connection to an MLflow server or database, with a timeout on every request.

MLflow itself retries an unreachable server for minutes, and a database for hours.
"""

import contextlib
import logging
import math
import os
import socket
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from crowdray.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ARTIFACT_CLIENTS = ("boto3", "botocore", "s3transfer", "google", "azure")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_FIX = (
    "start it (mlflow server --backend-store-uri sqlite:///mlflow.db), or set MLFLOW_TRACKING_URI to a "
    "running server, or to sqlite:////a/folder/mlflow.db for a file that needs no server"
)


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
    if scheme == "sqlite":
        _check_sqlite(sqlite_path(uri), uri)
    elif scheme in _PORTS:
        _check_port(uri, _PORTS[scheme], timeout_s)
    configure_mlflow()
    from mlflow import MlflowClient

    with translated_errors(uri), request_timeout(timeout_s, retries=0):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client


def configure_mlflow() -> None:
    """Disable MLflow's telemetry and start-up messages; call this before importing mlflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def redacted(uri: str) -> str:
    """Return a URI without its password, for messages."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def sqlite_path(uri: str) -> Path:
    """Return the absolute path of the file of sqlite:///relative.db or sqlite:////absolute.db."""
    return Path(urlsplit(uri).path.removeprefix("/")).absolute()


@contextlib.contextmanager
def request_timeout(timeout_s: float, retries: int) -> Iterator[None]:
    """Limit each MLflow request in the block to `timeout_s` seconds and `retries` retries."""
    # MLflow reads these variables at each request; it has no arguments for them.
    variables = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, math.floor(timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    with environment(variables):
        yield


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the duration of the block."""
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
def translated_errors(uri: str) -> Iterator[None]:
    """Turn errors of MLflow, its database, its artifact store and the network into one UserError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except UserError:
        raise
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"cannot use the MLflow tracking URI {redacted(uri)}: {_reason(error)}; {_FIX}") from error
    except Exception as error:
        # Clients of artifact stores have no common base class of their errors.
        if not isinstance(error, ImportError) and not type(error).__module__.startswith(_ARTIFACT_CLIENTS):
            raise
        raise UserError(
            f"cannot use the artifact store of the MLflow tracking URI {redacted(uri)}: {_reason(error)}; check the "
            "credentials, and that the client is installed (for s3://: pip install 'crowdray[aws]')"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost cause: MLflow wraps network errors in long advice."""
    innermost = error
    while (cause := innermost.__cause__ or innermost.__context__) is not None:
        innermost = cause
    source = innermost if isinstance(innermost, OSError) else error
    text = str(source).strip().splitlines() or [type(source).__name__]
    return text[0][:300].rstrip(" .;")


def _check_sqlite(path: Path, uri: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("pragma schema_version").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"cannot open the MLflow database {path} (tracking URI {uri}): {error}; "
            "check that its folder is writable and the file is an MLflow database, or use another path"
        ) from error


def _check_port(uri: str, default_port: int, timeout_s: float) -> None:
    parts = urlsplit(uri)
    address = parts.hostname or "localhost", parts.port or default_port
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except OSError as error:
        raise UserError(f"the MLflow database at {address[0]}:{address[1]} does not answer: {error}; {_FIX}") from error
