"""The way to an MLflow server or database: what cannot work is refused at once, with the mend.

MLflow retries an unreachable server for minutes, and a database for hours; here every call has a bound.
"""

import contextlib
import logging
import math
import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from crowdray.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DATABASES = ("postgresql", "mysql", "mssql")
_ARTIFACT_CLIENTS = ("boto3", "botocore", "s3transfer", "google", "azure")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_MEND = (
    "start it (mlflow server --backend-store-uri sqlite:///mlflow.db), or set MLFLOW_TRACKING_URI to one "
    "that runs, or to sqlite:////a/folder/mlflow.db for a file that needs no server"
)


def connect(uri: str, timeout_s: float) -> "MlflowClient":
    """A client for a tracking URI that was seen to answer.

    `uri` is http(s)://host:port, sqlite:///path/mlflow.db or another database URI. Raises UserError, within
    about `timeout_s` seconds, when it has another form, does not answer, or is not MLflow.
    """
    _check_form(uri)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme == "sqlite":
        _check_sqlite(sqlite_path(uri), uri)
    elif scheme in _DATABASES:
        _check_port(uri, _PORTS[scheme], timeout_s)
    disable_telemetry()
    from mlflow import MlflowClient

    with translated_errors(uri), request_timeout(timeout_s, retries=0):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client


def disable_telemetry() -> None:
    """Keep MLflow from reporting usage to its makers and from chatting; call it before importing mlflow."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for chatty in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def is_server(uri: str) -> bool:
    """Whether a tracking URI names a server, in contrast to a database."""
    return urlsplit(uri).scheme in ("http", "https")


def redacted(uri: str) -> str:
    """A URI for messages: without its password."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def sqlite_path(uri: str) -> Path:
    """The absolute path of the file behind sqlite:///relative.db or sqlite:////absolute.db."""
    return Path(urlsplit(uri).path.removeprefix("/")).absolute()


@contextlib.contextmanager
def request_timeout(timeout_s: float, retries: int) -> Iterator[None]:
    """Bound MLflow's requests: each waits at most `timeout_s` seconds and is repeated `retries` times."""
    # MLflow reads these at each request; it has no argument for them.
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, math.floor(timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    with environment(wanted):
        yield


@contextlib.contextmanager
def environment(wanted: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the length of a block."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def translated_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow, its database or the network say into one UserError with the URI and the mend."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except UserError:
        raise
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"cannot use the MLflow tracking URI {redacted(uri)}: {_reason(error)}; {_MEND}") from error
    except Exception as error:
        # What a store of artifacts says comes as an error of its client, which shares no base class with others.
        if not isinstance(error, ImportError) and not type(error).__module__.startswith(_ARTIFACT_CLIENTS):
            raise
        raise UserError(
            f"cannot use the artifact store of the MLflow tracking URI {redacted(uri)}: {_reason(error)}; check its "
            "credentials, and that its client is installed (for s3://: pip install 'crowdray[aws]')"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: MLflow wraps what the network said in layers of advice."""
    innermost = error
    while (cause := innermost.__cause__ or innermost.__context__) is not None:
        innermost = cause
    shown = innermost if isinstance(innermost, OSError) else error
    text = str(shown).strip().splitlines() or [type(shown).__name__]
    return text[0][:300].rstrip(" .;")


def _check_form(uri: str) -> None:
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if "://" not in uri or scheme == "file":
        folder = uri.removeprefix("file://").rstrip("/") or "."
        raise UserError(
            f"the tracking URI {redacted(uri)!r} is a plain folder, which MLflow no longer writes; "
            f"use a database file in it instead: sqlite:///{folder}/mlflow.db"
        )
    if scheme not in ("http", "https", "sqlite", *_DATABASES) and not scheme.startswith("databricks"):
        raise UserError(
            f"the tracking URI {redacted(uri)!r} has the scheme {scheme!r}, which MLflow does not know; "
            "use http://host:port, sqlite:////a/folder/mlflow.db or postgresql://..."
        )
    if scheme != "sqlite" and not scheme.startswith("databricks") and not urlsplit(uri).hostname:
        raise UserError(f"the tracking URI {redacted(uri)!r} names no host; write it as {scheme}://host:port")


def _check_sqlite(path: Path, uri: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("pragma schema_version").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"cannot open the MLflow database {path} (tracking URI {uri}): {error}; "
            "check that its folder can be written and the file is an MLflow database, or name another one"
        ) from error


def _check_port(uri: str, default_port: int, timeout_s: float) -> None:
    parts = urlsplit(uri)
    assert parts.hostname is not None
    try:
        socket.create_connection((parts.hostname, parts.port or default_port), timeout=timeout_s).close()
    except OSError as error:
        where = f"{parts.hostname}:{parts.port or default_port}"
        raise UserError(f"the MLflow database at {where} does not answer: {error}; {_MEND}") from error
