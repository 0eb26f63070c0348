"""MATLAB files as they come with crowd datasets, of both kinds, read through fsspec.

Files up to version 7 are MATLAB's own and scipy reads them; since 7.3 they are HDF5, whose arrays lie
transposed. Both come out as scipy gives them: matrices as arrays, cells as arrays of objects, structs as arrays
with fields of objects.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from crowdray import storage
from crowdray.data.sample import FARTHEST
from crowdray.datasets.sources.matlab5 import LARGEST, check_matlab5
from crowdray.errors import DataError

T = TypeVar("T")

HDF5 = b"\x89HDF\r\n\x1a\n"
"""First bytes of an HDF5 file; MATLAB puts a block of its own, 512 bytes or a multiple, before them."""


def read_matlab(uri: str, extract: Callable[[dict[str, Any]], T], layout: str) -> T:
    """What `extract` takes from the variables of a MATLAB file; `layout` says in words what it expects there.

    Raises DataError when the file cannot be parsed or does not hold that layout.
    """
    content = storage.read_bytes(uri)
    try:
        return extract(_variables(content))
    except DataError:
        raise
    except Exception as error:  # scipy and HDF5 answer a damaged file with any of a dozen types
        raise DataError(f"{uri} does not hold {layout} ({type(error).__name__}: {error}); copy it again") from error


def read_points(uri: str, variable: str, base: float) -> NDArray[np.float64]:
    """The (N, 2) heads in a variable of a MATLAB file as continuous pixels, whose first centre is 0.5.

    `base` is the coordinate that the file gives to the centre of the first pixel. Columns after x and y are
    left out, no heads may be an array of any shape without elements. Raises DataError.
    """
    return read_matlab(uri, lambda variables: as_points(variables[variable], base), f"`{variable}` with x and y")


def as_points(values: Any, base: float) -> NDArray[np.float64]:
    """Heads (N, 2 or more) with the centre of the first pixel at `base` as (N, 2) continuous pixels; ValueError."""
    points = np.asarray(values)
    if points.size == 0:
        return np.zeros((0, 2))
    if points.ndim != 2 or points.shape[1] < 2 or points.dtype.kind not in "iuf":
        raise ValueError(f"heads of shape {points.shape} and type {points.dtype}, expected (heads, 2) numbers")
    return points[:, :2].astype(np.float64) - base + 0.5


def as_map(values: Any) -> NDArray[np.float64]:
    """A map over the pixels of an image as float64 (H, W); ValueError for what is none, and for NaN and infinity."""
    found = np.asarray(values)
    if found.ndim != 2 or found.size == 0 or found.dtype.kind not in "iufb":
        raise ValueError(f"a map of shape {found.shape} and type {found.dtype}, expected (height, width) numbers")
    if not np.isfinite(found).all():
        raise ValueError("a map with values that are not finite")
    return found.astype(np.float64)


def as_sizes(values: Any) -> NDArray[np.float64]:
    """A perspective map, as as_map takes it; ValueError unless it is positive and of a size that is believed."""
    found = as_map(values)
    if not (found.min() >= 1 / FARTHEST and found.max() <= FARTHEST):
        raise ValueError(f"a perspective map from {found.min():g} to {found.max():g}: use --depth points")
    return found


def _variables(content: bytes) -> dict[str, Any]:
    if HDF5 not in (content[:8], content[512:520]):
        check_matlab5(content)
        return dict(loadmat(io.BytesIO(content)))
    with h5py.File(io.BytesIO(content), "r") as file:
        return {name: _value(file[name], file) for name in file if not name.startswith("#")}


def _value(node: Any, file: Any) -> Any:
    """A dataset or group of a 7.3 file as scipy would give the variable."""
    if isinstance(node, h5py.Group):
        return _struct({name: node[name] for name in node}, file)
    if node.nbytes > LARGEST:
        raise ValueError(f"{node.name} claims {node.nbytes} bytes")
    if node.attrs.get("MATLAB_empty", 0):  # then its shape is all that it holds
        return np.zeros((0, 0)) if 0 in node[()] else node[()]
    values = np.asarray(node[()]).T
    if values.dtype == h5py.ref_dtype:
        return _objects(values, file)
    return values


def _objects(references: NDArray[Any], file: Any) -> NDArray[np.object_]:
    """A cell: what each reference points to, in the same places."""
    values = np.empty(references.shape, dtype=object)
    for place, reference in np.ndenumerate(references):
        values[place] = _value(file[reference], file)
    return values


def _struct(fields: Mapping[str, Any], file: Any) -> NDArray[np.void]:
    """A struct as a (1, 1) array, an array of structs in its shape: there each field is an array of references."""
    many = all(
        isinstance(node, h5py.Dataset) and node.dtype == h5py.ref_dtype and "MATLAB_class" not in node.attrs
        for node in fields.values()
    )
    values = {name: _value(node, file) for name, node in fields.items()}
    shape = next(iter(values.values())).shape if many and values else (1, 1)
    made = np.empty(shape, dtype=[(name, object) for name in values])
    for name, value in values.items():
        if many:
            made[name] = value
        else:
            made[name][0, 0] = value
    return made
