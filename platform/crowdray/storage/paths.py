"""URIs, their file systems, retries of transient faults, and translation of errors to messages for users."""

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from crowdray.credentials import hide_credentials, with_credentials
from crowdray.errors import DataError, UserError

T = TypeVar("T")

PARTIAL = ".partial-"
"""Prefix of the names of unfinished files and folders, until they are renamed."""

RETRY_DELAYS_S = (0.2, 1.0, 4.0)
"""Seconds before each retry."""
RETRY_DEADLINE_S = 120.0
"""Seconds after which there is no retry, since the client libraries have their own retries and timeouts."""

_TRANSIENT = {
    *("HTTPClientError", "IncompleteReadError", "FlexibleChecksumError"),  # botocore
    *("EndpointConnectionError", "ConnectTimeoutError"),
    *("ClientPayloadError", "ClientConnectionError"),  # aiohttp
}
"""Client errors that may not recur: a timeout, a lost connection, an incomplete response."""
_SCHEME = re.compile(r"[A-Za-z][\w+.:-]*://")
"""Start of a URI; folders may contain :// elsewhere."""
_FILE = re.compile(r"file:(//(localhost)?)?(?=/)")
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")


def resolve(uri: str | os.PathLike[str]) -> str:
    """Normalize a URI: local files to an absolute path, others without credentials and trailing slash.

    A path is taken as it is, whatever characters it has. In file:// URIs, %20 stands for a space, as `Path.as_uri`
    writes it.

    Raises:
        UserError: The URI is empty, or its scheme is unknown or needs a package that is not installed.
    """
    text = os.fspath(uri)
    if not text:
        raise UserError("the path is empty; give a folder, a file or a URI such as s3://bucket/folder")
    if file := _FILE.match(text):
        return os.path.abspath(unquote(text[file.end() :]))
    text = text.removeprefix("local://")
    if not _SCHEME.match(text):
        return os.path.abspath(os.path.expanduser(text))
    text = hide_credentials(text)
    scheme, _, rest = text.partition("://")
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise UserError(
            f"{text}: unknown scheme {scheme!r}; use a path or a scheme that fsspec supports: s3://, gs://, ..."
        ) from None
    except ImportError as error:
        raise UserError(f"{text}: {error}; install that package to read {scheme}://") from error
    return f"{scheme}://{rest.rstrip('/')}"


def join(uri: str, *parts: str) -> str:
    """Append path components to a URI: join("s3://b/c", "d") is "s3://b/c/d"."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """Whether a URI is a path in this machine's file system."""
    return not _SCHEME.match(resolve(uri))


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of a URI, and its path there."""
    resolved = resolve(uri)
    if not _SCHEME.match(resolved):
        return LocalFileSystem(), resolved
    fs, path = fsspec.core.url_to_fs(with_credentials(resolved))
    return fs, path


def retry(attempt: Callable[[], T]) -> T:
    """Call `attempt` until it succeeds, a few times, as long as its faults may be transient.

    Transient are a timeout, a lost connection, a response with status 408, 429 or 5xx, and damaged content; a missing
    object and refused credentials are not. `attempt` must be safe to repeat.
    """
    deadline = time.monotonic() + RETRY_DEADLINE_S
    for delay in RETRY_DELAYS_S:
        try:
            return attempt()
        except Exception as error:
            if time.monotonic() > deadline or not _is_transient(error):
                raise
        time.sleep(delay)
    return attempt()


def _is_transient(error: Exception) -> bool:
    if isinstance(status := getattr(error, "status", None), int):  # aiohttp: a response with an error status
        return status in (408, 429) or status >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (DataError, TimeoutError, ConnectionError)) or not names.isdisjoint(_TRANSIENT)


def is_transient(error: UserError) -> bool:
    """Whether an error may not recur, as a network fault; refused access and a full disk do."""
    cause = error.__cause__
    if isinstance(cause, PermissionError) or getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return False
    return isinstance(cause, OSError) or (isinstance(cause, Exception) and _is_transient(cause))


@contextlib.contextmanager
def translated_errors(action: str, uri: str) -> Iterator[None]:
    """Translate errors of file systems and their clients to a UserError with the URI and a fix."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"cannot {action} {uri}: it does not exist; check the path") from error
    except PermissionError as error:
        reason = "permission denied" if error.errno else str(error)  # the store's message, such as an expired token
        raise UserError(f"cannot {action} {uri}: {reason}; check its owner, or renew your credentials") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"cannot {action} {uri}: no space left on the device; free some, or choose another path. "
                "No partial file was left"
            ) from error
        raise UserError(f"cannot {action} {uri}: {error}") from error
    except Exception as error:
        # Remote file systems raise exceptions of their client libraries, which have no common base class.
        if not type(error).__module__.startswith(_CLIENTS):
            raise
        raise UserError(f"cannot {action} {uri}: {error}; check the address and your credentials") from error
