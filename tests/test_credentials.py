"""Credentials of URIs never reach a text that is written or printed, and return only where a connection is opened."""

import pickle
from collections.abc import Iterator

import pytest

from crowdray import credentials, storage
from crowdray.credentials import hide_credentials, redacted, with_credentials
from crowdray.errors import DataError, JobFailed, UserError

SECRETS = ("dude", "s3cret", "t0ken-of-many-letters")


@pytest.fixture(autouse=True)
def no_hidden_credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(credentials, "hidden", {})
    yield


URIS = {
    "http://dude:s3cret@host:5000": "http://host:5000",
    "https://dude@host/data": "https://host/data",
    "https://host/data?token=t0ken-of-many-letters": "https://host/data",
    "https://host/data?t0ken-of-many-letters": "https://host/data",
    "https://dude:s3cret@host/data?X-Amz-Signature=t0ken-of-many-letters&x=1": "https://host/data",
    "postgresql://dude:s3cret@host/db": "postgresql://host/db",
    "postgresql+psycopg2://dude:a/s3cret@host:5432/db?sslmode=require": "postgresql+psycopg2://host:5432/db",
    "mysql://dude:s3cret@@host/db": "mysql://host/db",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dt0ken-of-many-letters": "mssql+pyodbc:///",
    "sftp://dude:s3cret@[::1]:22/runs": "sftp://[::1]:22/runs",
    "s3://s3cret:t0ken-of-many-letters@bucket/runs": "s3://bucket/runs",
    "az://container/runs?sv=1&sig=t0ken-of-many-letters": "az://container/runs",
    "zip://train::https://dude:s3cret@host/data.zip": "zip://train::https://host/data.zip",
}
"""URIs with and without credentials."""


@pytest.mark.parametrize(("uri", "bare"), URIS.items())
def test_hide_credentials_removes_and_with_credentials_restores_them(uri: str, bare: str) -> None:
    for template in ("{}", "--data={}", "onnx:{},near=2"):
        assert hide_credentials(template.format(uri)) == template.format(bare)
    assert hide_credentials(bare) == bare
    assert with_credentials(bare) == uri


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("uri", URIS)
def test_redacted_text_contains_no_secret(uri: str, hidden: bool) -> None:
    if hidden:
        hide_credentials(uri)
    for template in ("cannot read {}: it does not exist", '{{"uri": "{}", "n": 1}}', "{};", "({})", "url='{}'"):
        text = redacted(template.format(uri))
        assert not any(secret in text for secret in SECRETS), text
        head, _, tail = template.format("\0").partition("\0")
        assert text.startswith(head) and text.endswith(tail)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b.jpg", "http://host:5000/a@b.jpg", "models:/NAME@candidate", "s3://bucket/photos/img-?.jpg",
        "abfss://container@account.dfs.core.windows.net/runs", "/a/b?c=1", "/a/http://me@b?c=1",
        "is it http://host:5000? see me@host", "sqlite:////a/mlflow.db", "memory://a/b", "file:///a/u:p@b?c=d/e",
    ],
)  # fmt: skip
def test_redacted_text_without_credentials_is_unchanged(text: str) -> None:
    assert redacted(text) == hide_credentials(text) == text


def test_with_credentials_of_a_path_below_adds_them() -> None:
    hide_credentials("https://dude:s3cret@host/data/?sig=t0ken-of-many-letters")
    below = "https://dude:s3cret@host/data/a/index.json?sig=t0ken-of-many-letters"
    assert with_credentials("https://host/data/a/index.json") == below
    assert with_credentials("https://host/database") == "https://dude:s3cret@host/database"  # the same server
    for uri in ("https://other/data", "http://host/data", "https://me@host/data"):
        assert with_credentials(uri) == uri


def test_hide_credentials_of_two_queries_at_one_path_keeps_both_apart() -> None:
    first, second = "https://host/image?id=1", "https://host/image?id=2"
    assert {with_credentials(hide_credentials(uri)) for uri in (first, second)} == {first, second}


def test_redacted_masks_hidden_secrets_outside_uris() -> None:
    hide_credentials("postgresql://dude:s3cr%2Fet-word@host/db")
    message = "FATAL: password authentication failed for user \"dude\" with s3cr/et-word (user 'dude'@'host')"
    assert redacted(message) == "FATAL: password authentication failed for user *** with *** (user ***@'host')"


@pytest.mark.parametrize("kind", [UserError, DataError, JobFailed])
def test_errors_redact_their_messages_also_after_pickling(kind: type[Exception]) -> None:
    error = pickle.loads(pickle.dumps(kind("cannot read http://dude:s3cret@host/x")))
    assert str(error) == "cannot read http://host/x"


def test_resolve_hides_credentials_and_filesystem_uses_them() -> None:
    assert storage.resolve("https://dude:s3cret@host/data/") == "https://host/data"
    _, path = storage.filesystem("https://host/data")
    assert path == "https://dude:s3cret@host/data"
