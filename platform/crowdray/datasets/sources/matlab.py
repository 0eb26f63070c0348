"""Read both MATLAB formats of crowd datasets through fsspec.

scipy reads files up to version 7; from 7.3 on they are HDF5, with transposed arrays. Both return scipy's types: numeric
arrays for matrices, object arrays for cells, structured arrays with object fields for structs.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from crowdray import storage
from crowdray.data.sample import MAX_DISTANCE
from crowdray.datasets.sources.matlab5 import MAX_ARRAY_BYTES, check_matlab5
from crowdray.errors import DataError

T = TypeVar("T")

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""First bytes of an HDF5 file; MATLAB writes a user block of 512 bytes before them."""


def read_matlab(uri: str, extract: Callable[[dict[str, Any]], T], layout: str) -> T:
    """Return what `extract` makes of a MATLAB file's variables; DataError if they lack the described `layout`."""
    content = storage.read_bytes(uri)
    try:
        return extract(_variables(content))
    except DataError:
        raise
    except Exception as error:  # scipy and HDF5 raise many types for a damaged file
        raise DataError(f"{uri} does not contain {layout} ({type(error).__name__}: {error}); copy it again") from error


def read_points(uri: str, variable: str, base: float) -> NDArray[np.float64]:
    """Read the heads (N, 2) in a variable of a MATLAB file, in continuous pixels.

    Columns after x and y are dropped, and an empty array of any shape means no heads. `base` is the coordinate of the
    first pixel's centre. Raises DataError if the file is damaged or has no such variable.
    """
    return read_matlab(uri, lambda variables: as_points(variables[variable], base), f"`{variable}` with x and y")


def as_points(values: Any, base: float) -> NDArray[np.float64]:
    """Convert heads (N, 2 or more) to continuous pixels (N, 2); `base` is the first pixel's centre."""
    points = np.asarray(values)
    if points.size == 0:
        return np.zeros((0, 2))
    if points.ndim != 2 or points.shape[1] < 2 or points.dtype.kind not in "iuf":
        raise ValueError(f"heads of shape {points.shape} and type {points.dtype}, expected (heads, 2) numbers")
    return points[:, :2].astype(np.float64) - base + 0.5


def as_map(values: Any) -> NDArray[np.float64]:
    """Convert a map of an image to float64 (H, W); ValueError unless it is a finite matrix."""
    found = np.asarray(values)
    if found.ndim != 2 or found.size == 0 or found.dtype.kind not in "iufb":
        raise ValueError(f"a map of shape {found.shape} and type {found.dtype}, expected (height, width) numbers")
    if not np.isfinite(found).all():
        raise ValueError("a map with values that are not finite")
    return found.astype(np.float64)


def as_sizes(values: Any) -> NDArray[np.float64]:
    """Convert a perspective map to float64 (H, W); ValueError unless it is positive and plausible."""
    found = as_map(values)
    if not (found.min() >= 1 / MAX_DISTANCE and found.max() <= MAX_DISTANCE):
        raise ValueError(f"a perspective map from {found.min():g} to {found.max():g}: use --depth points")
    return found


def _variables(content: bytes) -> dict[str, Any]:
    if HDF5_SIGNATURE not in (content[:8], content[512:520]):
        check_matlab5(content)
        return dict(loadmat(io.BytesIO(content)))
    with h5py.File(io.BytesIO(content), "r") as file:
        return {name: _value(file[name], file) for name in file if not name.startswith("#")}


def _value(node: Any, file: Any) -> Any:
    """Convert a dataset or group of a 7.3 file to the type that scipy returns."""
    if isinstance(node, h5py.Group):
        return _struct({name: node[name] for name in node}, file)
    if node.nbytes > MAX_ARRAY_BYTES:
        raise ValueError(f"{node.name} claims {node.nbytes} bytes")
    if node.attrs.get("MATLAB_empty", 0):  # the content is the shape
        return np.zeros((0, 0)) if 0 in node[()] else node[()]
    values = np.asarray(node[()]).T
    if values.dtype == h5py.ref_dtype:
        return _objects(values, file)
    return values


def _objects(references: NDArray[Any], file: Any) -> NDArray[np.object_]:
    """Convert a cell: an array with the target of each reference."""
    values = np.empty(references.shape, dtype=object)
    for index, reference in np.ndenumerate(references):
        values[index] = _value(file[reference], file)
    return values


def _struct(fields: Mapping[str, Any], file: Any) -> NDArray[np.void]:
    """Convert a struct to a (1, 1) array, or an array of structs, whose fields are arrays of references."""
    is_array = all(
        isinstance(node, h5py.Dataset) and node.dtype == h5py.ref_dtype and "MATLAB_class" not in node.attrs
        for node in fields.values()
    )
    values = {name: _value(node, file) for name, node in fields.items()}
    shape = next(iter(values.values())).shape if is_array and values else (1, 1)
    result = np.empty(shape, dtype=[(name, object) for name in values])
    for name, value in values.items():
        if is_array:
            result[name] = value
        else:
            result[name][0, 0] = value
    return result
