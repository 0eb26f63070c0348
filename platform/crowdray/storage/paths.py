"""URIs and the file systems behind them: which there are, what may be tried again, what their errors mean."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from crowdray.errors import DataError, UserError

T = TypeVar("T")

PARTIAL = ".partial-"
"""Start of the names that half-written files and folders carry until their one rename."""

RETRY_DELAYS_S = (0.2, 1.0, 4.0)
"""Seconds before each further attempt."""
RETRY_DEADLINE_S = 120.0
"""Seconds after whose end there is no further attempt: below this, clients have their own retries and timeouts."""

_PASSING = {
    *("HTTPClientError", "IncompleteReadError", "FlexibleChecksumError"),  # botocore
    *("EndpointConnectionError", "ConnectTimeoutError"),
    *("ClientPayloadError", "ClientConnectionError"),  # aiohttp
}
"""Errors that say nothing of the object: a timeout, a cut connection, half an answer."""
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")


def resolve(uri: str | os.PathLike[str]) -> str:
    """The absolute form of a URI: an absolute path for local files, everything else without a trailing slash.

    Raises UserError for a scheme that nothing here can read.
    """
    text = os.fspath(uri)
    if not text:
        raise UserError("an empty path was given; name a folder, a file or a URI such as s3://bucket/folder")
    if text.startswith(("file://", "local://")):
        text = text.split("://", 1)[1]
    if "://" not in text:
        return os.path.abspath(os.path.expanduser(text))
    scheme, _, rest = text.partition("://")
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise UserError(
            f"{text}: the scheme {scheme!r} is not known; use a path or a scheme of fsspec: s3://, gs://, ..."
        ) from None
    except ImportError as error:
        raise UserError(f"{text}: {error}; install that package to read {scheme}://") from error
    return f"{scheme}://{rest.rstrip('/')}"


def join(uri: str, *parts: str) -> str:
    """A URI below another one: join("s3://b/c", "d") is "s3://b/c/d"."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)])


def is_local(uri: str) -> bool:
    """Whether a URI names a place in this machine's own file system."""
    return "://" not in resolve(uri)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI, and the URI's path in it."""
    resolved = resolve(uri)
    if "://" not in resolved:
        return LocalFileSystem(), resolved
    fs, path = fsspec.core.url_to_fs(resolved)
    return fs, path


def retry(attempt: Callable[[], T]) -> T:
    """What a read, or a write of something whole, gives; tried again a few times where the fault may pass.

    A timeout, a cut connection, an answer with 500 or 503 and content that is not what it should be may pass. A
    missing object and refused credentials do not.
    """
    end = time.monotonic() + RETRY_DEADLINE_S
    for pause in RETRY_DELAYS_S:
        try:
            return attempt()
        except Exception as error:
            if time.monotonic() > end or not _is_transient(error):
                raise
        time.sleep(pause)
    return attempt()


def _is_transient(error: Exception) -> bool:
    if isinstance(status := getattr(error, "status", None), int):  # aiohttp: an answer that is a refusal
        return status in (408, 429) or status >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (DataError, TimeoutError, ConnectionError)) or not names.isdisjoint(_PASSING)


def is_transient(error: UserError) -> bool:
    """Whether the fault behind an error may pass by itself: the network's or a shared disk's, not refused credentials
    nor a full disk."""
    cause = error.__cause__
    if isinstance(cause, PermissionError) or getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return False
    return isinstance(cause, OSError) or (isinstance(cause, Exception) and _is_transient(cause))


@contextlib.contextmanager
def translated_errors(action: str, uri: str) -> Iterator[None]:
    """Turn what the system says into a UserError with the URI and the mend."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"cannot {action} {uri}: it does not exist; check the path") from error
    except PermissionError as error:
        said = "permission denied" if error.errno else str(error)  # a store's own words, such as an expired token
        raise UserError(f"cannot {action} {uri}: {said}; check its owner, or renew your credentials") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"cannot {action} {uri}: no space left on the device; free some, or choose another place. "
                "Nothing was left half-written"
            ) from error
        raise UserError(f"cannot {action} {uri}: {error}") from error
    except Exception as error:
        # Remote file systems raise exceptions of their client libraries, which share no base class.
        if not type(error).__module__.startswith(_CLIENTS):
            raise
        raise UserError(f"cannot {action} {uri}: {error}; check the address and your credentials") from error
