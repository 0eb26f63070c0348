"""Published datasets as people have them: every layout of the same data reads to the same samples."""

import io
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from crowdray.datasets.sources import open_source
from crowdray.datasets.sources.base import pair_items
from crowdray.errors import DataError, UserError

from ...support.builders import heads, make_shanghaitech, sample_fields
from ...support.published import HDF5_START, LAYOUTS, Files, hdf5, in_bucket, mat, nwpu, ucf_qnrf


def small(name: str, folder: Path) -> Files:
    """A layout with few images: of UCF_CC_50 those with one digit."""
    files = LAYOUTS[name](folder)
    return {path: data for path, data in files.items() if name != "ucf-cc-50" or re.match(r"\d\D", path)}


def samples(name: str, root: str) -> list[object]:
    source = open_source(name, root, depth="none")
    return [sample_fields(source.load(item)) for item in source.items()]


def renamed(change: Callable[[str], str]) -> Callable[[Files], Files]:
    return lambda files: {change(path): data for path, data in files.items()}


def with_companions(files: Files) -> Files:
    """Files of macOS, Windows and Synology next to each file."""
    added: Files = {}
    for path, data in files.items():
        folder, name = PurePosixPath(path).parent, PurePosixPath(path).name
        added |= {f"{folder}/._{name}": b"\0\5\x16\7", f"__MACOSX/{folder}/._{name}": b"\0\5\x16\7"}
        added |= {f"{folder}/@eaDir/{name}": data, f"$RECYCLE.BIN/{folder}/{name}": data}
        added |= {f"{folder}/{other}": b"?" for other in (".DS_Store", "Thumbs.db", "desktop.ini")}
    return {path.removeprefix("./"): data for path, data in added.items()} | files


def upper_suffix(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(PurePosixPath(path).suffix.upper()))


def upper_folders(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return folder.upper() + slash + name


def doubled_folder(path: str) -> str:
    top, slash, rest = path.partition("/")
    return f"{top}/{top}/{rest}" if slash else path


def rewritten(write: Callable[[dict[str, Any]], bytes]) -> Callable[[Files], Files]:
    """Write the variables of every MATLAB 5 file anew."""

    def rewrite(path: str, data: bytes) -> bytes:
        if not path.endswith(".mat") or data[512:520] == HDF5_START:
            return data
        return write({name: plain(value) for name, value in loadmat(io.BytesIO(data)).items() if name[0] != "_"})

    return lambda files: {path: rewrite(path, data) for path, data in files.items()}


def plain(value: Any) -> Any:
    """A cell as a list, and a struct as a dict."""
    if isinstance(value, np.void) or value.dtype.names:
        one = value if isinstance(value, np.void) else value.item(0)
        return {name: plain(one[number]) for number, name in enumerate(value.dtype.names)}
    return [plain(entry) for entry in value.ravel()] if value.dtype == object else value


def in_cells(value: Any, shape: tuple[int, int]) -> Any:
    """Lists as cells of a shape, of which one side is -1."""
    if isinstance(value, dict):
        return {name: in_cells(entry, shape) for name, entry in value.items()}
    if not isinstance(value, list):
        return value
    cell = np.empty(len(value), dtype=object)
    cell[:] = [in_cells(entry, shape) for entry in value]
    return cell.reshape(shape)


def in_structs(value: Any) -> Any:
    """Lists of structs as arrays of structs."""
    if isinstance(value, dict):
        return {name: in_structs(entry) for name, entry in value.items()}
    if not isinstance(value, list):
        return value
    array = np.empty((1, len(value)), dtype=[(name, object) for name in value[0]])
    for number, entry in enumerate(value):
        array[0, number] = tuple(entry.values())
    return array


def compressed(variables: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, in_cells(variables, (-1, 1)), do_compression=True)
    return buffer.getvalue()


def nested(variables: dict[str, Any]) -> bytes:
    """Every variable in a cell."""
    return mat(**in_cells({name: [value] for name, value in variables.items()}, (1, -1)))


VARIANTS: dict[str, Callable[[Files], Files]] = {
    "companions": with_companions,
    "deeper": renamed(lambda path: f"Data set/v1.0 (final)/{path}"),
    "doubled folders": renamed(doubled_folder),
    "upper-case suffixes": renamed(lambda path: path if path.endswith(".txt") else upper_suffix(path)),
    "jpeg": renamed(lambda path: path.replace(".jpg", ".jpeg")),
    "upper-case folders": renamed(upper_folders),
    "compressed columns": rewritten(compressed),
    "structs": rewritten(lambda variables: mat(**in_structs(variables))),
    "cells": rewritten(nested),
    "version 7.3": rewritten(lambda variables: hdf5(**variables)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_source_in_upper_case_reads_the_same_samples(name: str, tmp_path: Path) -> None:
    def lower(values: Any) -> list[Any]:
        return [[value.lower() if isinstance(value, str) else value for value in fields] for fields in values]

    files = small(name, tmp_path / "dataset")
    upper = renamed(str.upper)(files)
    assert lower(samples(name, in_bucket(upper))) == lower(samples(name, in_bucket(files)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_source_variant_of_layout_reads_the_same_samples(name: str, variant: str, tmp_path: Path) -> None:
    files = small(name, tmp_path / "dataset")
    changed = VARIANTS[variant](files)
    assert samples(name, in_bucket(changed)) == samples(name, in_bucket(files))


def test_nwpu_image_parts_are_one_folder() -> None:
    files = nwpu()
    parts = {re.sub(r"^images/(...(.))", r"images_part\2/\1", path): data for path, data in files.items()}
    assert "images_part3/0003.jpg" in parts
    assert samples("nwpu", in_bucket(parts)) == samples("nwpu", in_bucket(files))


def test_pair_items_spelled_differently_pairs_where_one_fits() -> None:
    decomposed = unicodedata.normalize("NFD", "Zürich")
    images = {name: f"{name}.jpg" for name in ("IMG_1", decomposed, "photo", "Photo", "a", "A")}
    annotations = {name: f"{name}.mat" for name in ("img_1", "Zürich", "PHOTO", "a")}
    items = {item.name: (item.image, item.annotation) for item in pair_items("train", images, annotations)}
    assert items == {
        "IMG_1": ("IMG_1.jpg", "img_1.mat"),
        decomposed: (f"{decomposed}.jpg", "Zürich.mat"),
        "PHOTO": ("", "PHOTO.mat"),
        "Photo": ("Photo.jpg", ""),
        "photo": ("photo.jpg", ""),
        "A": ("A.jpg", ""),
        "a": ("a.jpg", "a.mat"),
    }


@pytest.mark.parametrize(
    ("name", "below", "splits"),
    [("shanghaitech", "train_data", {"train"}), ("ucf-qnrf", "Test", {"test"}), ("jhu", "val", {"val"})],
)
def test_source_inside_a_dataset_reads_that_split(name: str, below: str, splits: set[str], tmp_path: Path) -> None:
    root = in_bucket({f"part_B/{path}": data for path, data in small(name, tmp_path / "dataset").items()})
    source = open_source(name, f"{root}/part_B/{below}", depth="none")
    assert {source.load(item).split for item in source.items()} == splits


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_source_with_two_copies_is_refused_with_both_paths(name: str, tmp_path: Path) -> None:
    files = small(name, tmp_path / "dataset")
    root = in_bucket({f"{copy}/{path}": data for path, data in files.items() for copy in ("first", "second")})
    with pytest.raises(UserError, match=rf"{root}/first.*{root}/second"):
        open_source(name, root).items()


def test_source_with_two_images_of_one_name_is_refused(tmp_path: Path) -> None:
    files = small("shanghaitech", tmp_path / "dataset")
    files["train_data/images/IMG_1.png"] = files["train_data/images/IMG_1.jpg"]
    with pytest.raises(DataError, match=r"IMG_1\.jpg and .*IMG_1\.png have the same name; remove one"):
        open_source("shanghaitech", in_bucket(files)).items()


def test_source_of_packed_archives_says_to_unpack_them() -> None:
    root = in_bucket({"images_part1.zip": b"PK", "train.zip": b"PK"})
    for source in (root, f"{root}/images_part1.zip"):
        with pytest.raises(UserError, match=rf"train\.txt; unpack {root}/images_part1\.zip first"):
            open_source("nwpu", source)


def test_source_follows_links_to_folders(tmp_path: Path) -> None:
    part = make_shanghaitech(tmp_path / "disk" / "part_B", count=3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/part_B").symlink_to(part)
    (part / "train_data/again").symlink_to(part)  # a loop
    assert len(samples("shanghaitech", str(tmp_path / "data"))) == 3


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_shanghaitech_of_other_software_reads_as_published(rows: int, tmp_path: Path) -> None:
    folder = make_shanghaitech(tmp_path / "part_B", count=1) / "train_data/ground_truth"
    points, number = heads(5, rows), rows
    info = {"location": points, "number": number}
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["image_info/location"], file["image_info/number"] = points, number
    written = [
        mat(image_info=info),
        mat(image_info={"location": points}),
        mat(image_info={"location": points.T} | {"number": np.uint16(number)}),
        hdf5(image_info=info),
        hdf5(image_info=[info]),
        buffer.getvalue(),
    ]
    for content in written:
        (folder / "GT_IMG_1.mat").write_bytes(content)
        source = open_source("shanghaitech", str(tmp_path))
        np.testing.assert_allclose(source.load(source.items()[0]).points, points, rtol=1e-6)


@pytest.mark.parametrize("shape", ["rows", "columns", "HDF5"])
def test_ucf_qnrf_of_other_software_reads_as_published(shape: str) -> None:
    points = heads(1, 9)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["annPoints"] = points
    content = {"rows": mat(annPoints=points), "columns": mat(annPoints=points.T), "HDF5": buffer.getvalue()}[shape]
    source = open_source("ucf-qnrf", in_bucket(ucf_qnrf() | {"Train/img_0001_ann.mat": content}))
    np.testing.assert_allclose(source.load(source.items()[0]).points, points - 0.5, rtol=1e-6)
