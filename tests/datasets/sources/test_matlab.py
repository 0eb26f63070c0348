"""MATLAB files: both formats load alike, damaged files are rejected; polygon masks equal matplotlib's."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from scipy.io import savemat

from crowdray.datasets.sources.matlab import as_points, read_matlab, read_points, struct_field
from crowdray.datasets.sources.region import polygon_mask
from crowdray.errors import DataError

from ...support.published import hdf5, in_bucket, mat


def variables(content: bytes) -> dict[str, Any]:
    return read_matlab(f"{in_bucket({'a.mat': content})}/a.mat", dict, "anything")


def test_read_matlab_both_formats_return_equal_variables() -> None:
    rng = np.random.default_rng(0)
    matrix, empty = rng.normal(size=(3, 5)), np.zeros((0, 2))
    cell = np.empty((2, 1), dtype=object)
    cell[:, 0] = [{"loc": matrix}, {"loc": empty}]
    old = variables(mat(matrix=matrix, empty=empty, struct={"mask": matrix, "deep": {"er": 4.0}}, cell=cell))
    new = variables(
        hdf5(
            matrix=matrix,
            empty=empty,
            struct={"mask": matrix, "deep": {"er": 4.0}},
            cell=[{"loc": matrix}, {"loc": empty}],
        )
    )
    for found in (old, new):
        np.testing.assert_array_equal(found["matrix"], matrix)
        assert found["empty"].size == 0
        np.testing.assert_array_equal(found["struct"]["mask"][0, 0], matrix)
        assert found["struct"]["deep"][0, 0]["er"][0, 0].item() == 4.0
        first, second = (entry["loc"][0, 0] for entry in np.ravel(found["cell"]))
        np.testing.assert_array_equal(first, matrix)
        assert second.size == 0


@pytest.mark.parametrize("write", [mat, hdf5])
def test_read_points_shifts_by_base(write: Callable[..., bytes]) -> None:
    uri = f"{in_bucket({'a.mat': write(p=np.array([[1.0, 2.0]]), c=np.ones((3, 5)))})}/a.mat"
    np.testing.assert_array_equal(read_points(uri, "p", 1.0), [[0.5, 1.5]])
    np.testing.assert_array_equal(read_points(uri, "p", 0.0), [[1.5, 2.5]])
    with pytest.raises(DataError, match=r"a\.mat does not contain `c` with x and y .*\(3, 5\).*copy it again"):
        read_points(uri, "c", 1.0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int64", "float32", "float64"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 50])
def test_as_points_any_orientation_type_and_nesting_is_the_same_list(count: int, dtype: str) -> None:
    rows = np.random.default_rng(count).integers(0, 255, (count, 2)).astype(dtype)
    expected = rows.astype(float) - 0.5
    stored = ("number", np.array([[count]], dtype=np.uint16))
    cell = np.empty((1, 1), dtype=object)
    cell[0, 0] = rows
    for values in (rows, cell, rows[0] if count == 1 else rows):
        np.testing.assert_array_equal(as_points(values, 1.0), expected)
        np.testing.assert_array_equal(as_points(values, 1.0, count=stored), expected)
    if count != 2:
        np.testing.assert_array_equal(as_points(rows.T, 1.0, count=stored), expected)
        if count == 3:  # or two heads with a third number each
            with pytest.raises(DataError, match="a list of 2 x 3 numbers may be 2 or 3 heads; write a row for each"):
                as_points(rows.T, 1.0)
        else:
            np.testing.assert_array_equal(as_points(rows.T, 1.0), expected)
    with pytest.raises(DataError, match=f"`number` is {count + 5}, but there are {count} heads"):
        as_points(rows, 1.0, count=("number", count + 5))


@pytest.mark.parametrize("shape", [(), (4,), (5, 1), (5, 3), (3, 50), (1, 3), (2, 2, 2)])
def test_as_points_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="heads of shape"):
        as_points(np.ones(shape), 1.0)


def test_as_points_surplus_columns_are_dropped_only_where_published() -> None:
    rows = np.random.default_rng(0).uniform(0, 9, (9, 3))
    for values in (rows, rows.T, rows[:2]):
        np.testing.assert_array_equal(as_points(values, 0.5, columns=3), rows[: 2 if len(values) == 2 else 9, :2])


@pytest.mark.parametrize("order", ["<", ">"])
def test_read_matlab_version_4_loads_matrices(order: str) -> None:
    rows = np.arange(6.0).reshape(3, 2)
    header = struct.pack(f"{order}5i", 1000 * (order == ">"), 3, 2, 0, 2) + b"p\0"
    content = header + rows.T.astype(f"{order}f8").tobytes()
    assert list(variables(content)) == ["p"]
    np.testing.assert_array_equal(variables(content)["p"], rows)
    buffer = io.BytesIO()
    savemat(buffer, {"p": rows.astype(np.int16), "text": "abc", "q": rows}, format="4")
    found = variables(buffer.getvalue())
    np.testing.assert_array_equal(found["p"], rows)
    np.testing.assert_array_equal(found["q"], rows)
    for damaged in (content[:-1], content[:30], struct.pack(f"{order}5i", 0, -1, 2, 0, 2) + content[20:]):
        with pytest.raises(DataError, match="does not contain anything"):
            variables(damaged)


@pytest.mark.parametrize("kind", ["link", "external", "virtual"])
def test_read_matlab_hdf5_with_content_of_another_file_is_refused(kind: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["p"] = np.ones((3, 2))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        if kind == "link":
            file["p"] = h5py.ExternalLink(str(tmp_path / "other.mat"), "p")
        elif kind == "external":
            file.create_dataset("p", (3, 2), "f8", external=[(str(tmp_path / "other.mat"), 0, 48)])
        else:
            layout = h5py.VirtualLayout((3, 2), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.mat"), "p", (3, 2))
            file.create_virtual_dataset("p", layout)
    with pytest.raises(DataError, match=r"p (is a link to|has its content in) another file"):
        variables(buffer.getvalue())


def test_read_matlab_hdf5_of_other_software_is_not_transposed() -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["p"] = np.arange(6.0).reshape(3, 2)
        file["info/location"] = np.arange(8.0).reshape(4, 2)
    found = variables(buffer.getvalue())
    np.testing.assert_array_equal(found["p"], np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(struct_field(found["info"], "location"), np.arange(8.0).reshape(4, 2))


@pytest.mark.parametrize(
    ("position", "written", "message"),
    [
        # Unchecked, the first three can crash scipy, and the fourth can loop for hours.
        (145, b"\x08", r"class 6 and shape \(3, 2\) with 1 elements"),
        (176, struct.pack("<I", 0), "an element of type 0 and 48 bytes"),
        (176, struct.pack("<I", 0x10809), "an element of type 2057 and 1 bytes"),
        (160, struct.pack("<ii", 2**30, 2), r"a matrix of shape \(1073741824, 2\)"),
        (160, struct.pack("<ii", -3, 2), r"a matrix of shape \(-3, 2\)"),
        (180, struct.pack("<I", 4000), "an element of type 9 and 4000 bytes"),
        (132, struct.pack("<I", 99), "an element of type 14 and 99 bytes"),
        (124, b"\0\2", "no MATLAB header"),
    ],
)
def test_read_matlab_damaged_element_is_rejected_before_scipy(position: int, written: bytes, message: str) -> None:
    content = bytearray(mat(p=np.arange(6.0).reshape(3, 2)))
    assert struct.unpack_from("<ii", content, 160) == (3, 2) and struct.unpack_from("<II", content, 176) == (9, 48)
    content[position : position + len(written)] = written
    with pytest.raises(DataError, match=message):
        variables(bytes(content))


def test_read_matlab_compressed_and_big_endian_files_load() -> None:
    buffer = io.BytesIO()
    savemat(buffer, {"p": np.arange(6.0).reshape(3, 2), "s": {"a": np.zeros((0, 2))}}, do_compression=True)
    np.testing.assert_array_equal(variables(buffer.getvalue())["p"], np.arange(6.0).reshape(3, 2))
    with pytest.raises(DataError, match="does not contain anything"):
        variables(buffer.getvalue()[:-10] + bytes(10))
    big = b"MATLAB".ljust(124) + b"\x01\x00MI" + struct.pack(">IIIIIIIIiiHH", 14, 64, 6, 8, 6, 0, 5, 8, 2, 1, 1, 1)
    big += b"p\0\0\0" + struct.pack(">IIdd", 9, 16, 1.5, 2.5)
    np.testing.assert_array_equal(variables(big)["p"], [[1.5], [2.5]])


@given(st.integers(3, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_polygon_mask_equals_matplotlib(corners: int, seed: int) -> None:
    # Corners sorted by angle form a star-shaped polygon, which does not cross itself.
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    x, y = (16 + rng.uniform(2, 20, corners) * wave(angles) for wave in (np.cos, np.sin))
    centres = np.stack(np.meshgrid(np.arange(32) + 0.5, np.arange(24) + 0.5), axis=-1).reshape(-1, 2)
    closed = Outline(np.stack([[*x, x[0]], [*y, y[0]]], axis=1), closed=True)
    np.testing.assert_array_equal(polygon_mask(x, y, 24, 32), closed.contains_points(centres).reshape(24, 32))


def test_polygon_mask_common_edge_assigns_each_pixel_once() -> None:
    # The edge passes through pixel centres.
    left = polygon_mask(np.array([0, 4.5, 6.5, 0]), np.array([0, 0, 8, 8]), 8, 10)
    right = polygon_mask(np.array([4.5, 10, 10, 6.5]), np.array([0, 0, 8, 8]), 8, 10)
    assert (left ^ right).all() and left.any() and right.any()


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 2, np.nan], [1, 2, 3]), ([1, 2, 1e30], [1, 2, 3])])
def test_polygon_mask_invalid_vertices_raise(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a polygon of 2 vertices|pixels from the image's corner"):
        polygon_mask(np.array(x), np.array(y), 8, 8)
