"""MATLAB files as they come with crowd datasets, read through fsspec."""

import io
from collections.abc import Callable
from typing import Any, TypeVar

from scipy.io import loadmat

from crowdray import storage
from crowdray.errors import DataError

T = TypeVar("T")


def read_matlab(uri: str, extract: Callable[[dict[str, Any]], T], layout: str) -> T:
    """What `extract` takes from the variables of a MATLAB file; `layout` says in words what it expects there.

    Raises DataError when the file cannot be parsed or does not hold that layout.
    """
    content = storage.read_bytes(uri)
    try:
        return extract(loadmat(io.BytesIO(content)))
    except DataError:
        raise
    except Exception as error:  # scipy answers a damaged file with any of a dozen types
        raise DataError(f"{uri} does not hold {layout} ({type(error).__name__}: {error}); copy it again") from error
