"""Read all MATLAB formats of crowd datasets through fsspec.

scipy reads versions 5 to 7; from 7.3 on files are HDF5, with transposed arrays, and version 4 has matrices only. All
return scipy's types: numeric arrays for matrices, object arrays for cells, structured arrays with object fields for
structs.
"""

import io
import struct
from collections.abc import Callable, Mapping, Sequence
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

MAX_COLUMNS = 6
"""Most columns of a published list of heads, JHU-CROWD++'s; a matrix with more contains a head per column."""

VERSION_4_TYPES = "dfihHB"
"""Types of MATLAB 4's matrices, as numpy names them, by their number in the file."""

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
"""First bytes of an HDF5 file; MATLAB writes a user block of 512 bytes before them."""


def read_matlab(uri: str, extract: Callable[[dict[str, Any]], T], layout: str) -> T:
    """Return what `extract` makes of a MATLAB file's variables; DataError if they lack the described `layout`."""
    content = storage.read_bytes(uri)
    try:
        return extract(_variables(content))
    except DataError as error:
        raise DataError(f"{uri}: {error}") from error
    except Exception as error:  # scipy and HDF5 raise many types for a damaged file
        raise DataError(f"{uri} does not contain {layout} ({type(error).__name__}: {error}); copy it again") from error


def read_points(uri: str, variable: str, base: float) -> NDArray[np.float64]:
    """Read the heads (N, 2) in a variable of a MATLAB file, in continuous pixels; see `as_points`."""
    return read_matlab(uri, lambda variables: as_points(variables[variable], base), f"`{variable}` with x and y")


def as_points(
    values: Any, base: float, *, count: tuple[str, Any] | None = None, columns: int = 2
) -> NDArray[np.float64]:
    """Convert a list of heads to continuous pixels (N, 2).

    A row is a head, so two rows and two columns are two heads. A column is a head if nothing else can be meant: if the
    count says so, or if there are more than MAX_COLUMNS columns, or one. An empty array of any shape means no heads.

    Args:
        values: Numbers (N, 2), or (2, N) as above, also in a cell.
        base: Coordinate of the first pixel's centre.
        count: Name and value of the number of heads that is stored with the list, if any.
        columns: Most columns; those after x and y are dropped.

    Raises:
        DataError: The stored count is another one, or the list may have as many heads as rows or as columns.
        ValueError: The list has another shape or type.
    """
    points = np.asarray(unwrapped(values))
    if points.size == 0:
        points = np.zeros((0, 2))
    points = np.atleast_2d(points)
    oriented = [matrix for matrix in (points, points.T) if points.ndim == 2 and 2 <= matrix.shape[1] <= columns]
    stored = None if count is None else np.asarray(unwrapped(count[1])).squeeze().tolist()
    heads = next((matrix for matrix in oriented if stored in (None, len(matrix))), None)
    if heads is None and oriented and count is not None:
        raise DataError(f"`{count[0]}` is {stored}, but there are {len(oriented[0])} heads; copy it again")
    if heads is not None and heads is not points and stored is None and len(points) < points.shape[1] <= MAX_COLUMNS:
        rows, others = points.shape
        raise DataError(f"a list of {rows} x {others} numbers may be {rows} or {others} heads; write a row for each")
    if heads is None or points.dtype.kind not in "iuf":
        raise ValueError(f"heads of shape {points.shape} and type {points.dtype}, expected (heads, 2) numbers")
    return heads[:, :2].astype(np.float64) - base + 0.5


def as_frames(frames: Any, base: float, *, counts: Any = None, columns: int = 2) -> list[NDArray[np.float64] | str]:
    """Heads of each frame of a video, see `as_points`, or a description of what is wrong with them.

    Args:
        frames: A cell with a struct for each frame, or an array of structs, whose field `loc` is a list of heads.
        counts: Number of heads of each frame, if known.
    """
    while frames.size == 1 and isinstance(inner := frames.item(), np.ndarray) and inner.size > 1:
        frames = inner  # a field of a struct, or a cell in a cell
    found: list[NDArray[np.float64] | str] = []
    for number, frame in enumerate(np.ravel(frames)):
        try:
            count = None if counts is None else ("count", counts[number])
            found.append(as_points(struct_field(frame, "loc"), base, count=count, columns=columns))
        except (ValueError, IndexError, TypeError) as error:
            found.append(f"frame {number + 1}: {error}")
    return found


def frame_heads(uri: str, frames: Sequence[NDArray[np.float64] | str], index: int) -> NDArray[np.float64]:
    """Heads of one frame of `as_frames`; DataError if something is wrong with them."""
    if isinstance(heads := frames[index], str):
        raise DataError(f"{uri}, {heads}")
    return heads


def unwrapped(values: Any) -> Any:
    """Content of a cell with one value, in any number of cells."""
    while isinstance(values, np.ndarray) and values.dtype == object and values.size == 1:
        values = values.item()
    return values


def struct_field(values: Any, name: str) -> Any:
    """Content of a field of a struct, both in any number of cells; ValueError without such a field."""
    return unwrapped(unwrapped(values)[name])


def as_map(values: Any) -> NDArray[np.float64]:
    """Convert a map of an image to float64 (H, W); ValueError unless it is a finite matrix."""
    found = np.asarray(unwrapped(values))
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
        if 0 in content[:4]:
            return _matrices(content)
        check_matlab5(content)
        return dict(loadmat(io.BytesIO(content)))
    with h5py.File(io.BytesIO(content), "r") as file:
        return {name: _value(_member(file, name), file) for name in file if not name.startswith("#")}


def _matrices(content: bytes) -> dict[str, NDArray[Any]]:
    """Matrices of numbers in a MATLAB 4 file by name; text is left out.

    Format: MAT-File Format, The MathWorks, chapter 2.
    """
    found: dict[str, NDArray[Any]] = {}
    position = 0
    order = "<" if content[2:4] == bytes(2) else ">"
    while position < len(content):
        kind, rows, columns, imaginary, name_length = struct.unpack_from(f"{order}5i", content, position)
        machine, _, type_, is_text = (kind // unit % 10 for unit in (1000, 100, 10, 1))
        if machine != (order == ">") or is_text > 1 or imaginary or min(kind, rows, columns, name_length - 1) < 0:
            raise ValueError(f"it has no MATLAB header, or matrix {len(found) + 1} is sparse, complex or damaged")
        start = position + 20 + name_length
        values = np.frombuffer(content, f"{order}{VERSION_4_TYPES[type_]}", rows * columns, start)
        if not is_text:
            name = content[position + 20 : start].rstrip(b"\0").decode("latin1")
            found[name] = values.reshape((rows, columns), order="F")
        position = start + values.nbytes
    return found


def _member(group: Any, name: str) -> Any:
    """Dataset or group in a group of a 7.3 file; ValueError for one whose content lies in another file."""
    if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
        raise ValueError(f"{name} is a link to another file")
    node = group[name]
    if isinstance(node, h5py.Dataset) and (node.external or node.is_virtual):
        raise ValueError(f"{name} has its content in another file")
    return node


def _value(node: Any, file: Any) -> Any:
    """Convert a dataset or group of a 7.3 file to the type that scipy returns."""
    if isinstance(node, h5py.Group):
        return _struct({name: _member(node, name) for name in node}, file)
    if node.nbytes > MAX_ARRAY_BYTES:
        raise ValueError(f"{node.name} claims {node.nbytes} bytes")
    if node.attrs.get("MATLAB_empty", 0):  # the content is the shape
        return np.zeros((0, 0))
    values = np.asarray(node[()])
    if values.dtype == h5py.ref_dtype:
        return _objects(values.T, file)
    if "MATLAB_class" in node.attrs:
        return values.T
    if len(node.attrs):  # other software, such as h5py, neither transposes nor sets any
        raise ValueError(f"{node.name} has attributes, but not MATLAB_class")
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
