"""Sources list items in natural order and convert coordinates from their own base."""

from pathlib import Path

import numpy as np
import pytest

from crowdray.data.decoding import decode_image
from crowdray.data.sample import decode_depth
from crowdray.datasets.sources import open_source
from crowdray.datasets.sources.layout import natural_key
from crowdray.errors import UserError

from ...support.builders import HEIGHT, WIDTH, heads, jpeg, make_mall, make_shanghaitech


@pytest.fixture
def mall(tmp_path: Path) -> Path:
    return make_mall(tmp_path / "mall_dataset")


def test_natural_key_orders_numbers_by_value() -> None:
    names = ["IMG_10", "IMG_9", "IMG_1", "a2b10", "a2b9", "10", "9"]
    assert sorted(names, key=natural_key) == ["9", "10", "IMG_1", "IMG_9", "IMG_10", "a2b9", "a2b10"]


def test_open_source_unknown_name_or_source_raises(mall: Path) -> None:
    with pytest.raises(UserError, match="'mal'; choose one of synthetic, mall, shanghaitech, "):
        open_source("mal", str(mall))
    for name in ("mall", "shanghaitech"):
        with pytest.raises(UserError, match=f"{name} needs --source"):
            open_source(name)
    with pytest.raises(UserError, match="leave --source out"):
        open_source("synthetic", "here")


def test_mall_splits_by_frame_and_converts_matlab_coordinates(mall: Path) -> None:
    source = open_source("mall", str(mall))
    loaded = [source.load(item) for item in source.items()]
    splits = ["train"] * 4 + ["test"] * 2
    assert [(s.split, s.name) for s in loaded] == [(split, f"seq_{n:06d}") for n, split in enumerate(splits, 1)]
    for number, sample in enumerate(loaded):
        np.testing.assert_allclose(sample.points, heads(number, number).reshape(-1, 2) - 0.5, rtol=1e-6)
        assert sample.scene == "mall" and sample.image == jpeg(number + 1)
    assert [item.split for item in source.items(["test"])] == ["test", "test"]


def test_mall_depth_is_largest_where_its_map_is_largest(mall: Path) -> None:
    # pMapN is an inverse area: for 1.5 times the height it is 1 / 2.25 as large.
    source = open_source("mall", str(mall))
    sample = source.load(source.items()[0])
    assert sample.depth is not None and sample.roi is not None and source.teacher.name == "perspective-1"
    expected = 0.5 / (0.5 + np.arange(HEIGHT) / HEIGHT)
    np.testing.assert_allclose(decode_depth(sample.depth), np.tile(expected[:, None], WIDTH), atol=1e-4)


def test_depth_none_stores_no_depth(mall: Path) -> None:
    source = open_source("mall", str(mall), depth="none")
    assert source.load(source.items()[3]).depth is None and source.teacher.name == "none"


@pytest.mark.parametrize("annotations", ["ground_truth", "ground-truth"])
@pytest.mark.parametrize("folder", ["part_B_final", "part_B"])
def test_shanghaitech_reads_both_folder_names_from_root_and_part(tmp_path: Path, folder: str, annotations: str) -> None:
    part = make_shanghaitech(tmp_path / folder, annotations=annotations)
    make_shanghaitech(part, "test", 3, annotations)
    for path in (tmp_path, part):
        source = open_source("shanghaitech", str(path))
        assert source.name == "shanghaitech-b" and source.notes() == []
        items = source.items()
        assert [item.name for item in items] == [f"IMG_{n}" for n in (*range(1, 13), *range(1, 4))]
        assert [item.split for item in items] == ["train"] * 12 + ["test"] * 3
        sample = source.load(items[11])
        np.testing.assert_allclose(sample.points, heads(12, 11), rtol=1e-6)
        assert source.load(items[0]).points.shape == (0, 2)


def test_shanghaitech_root_with_both_parts_needs_part(tmp_path: Path) -> None:
    for letter in "AB":
        make_shanghaitech(tmp_path / f"part_{letter}", count=2)
    with pytest.raises(UserError, match=r"parts A and B.*part_A"):
        open_source("shanghaitech", str(tmp_path))
    assert open_source("shanghaitech", str(tmp_path), part="b").name == "shanghaitech-b"
    with pytest.raises(UserError, match="--part C: ShanghaiTech has parts A and B"):
        open_source("shanghaitech", str(tmp_path), part="c")
    with pytest.raises(UserError, match="is part A, but --part is B"):
        open_source("shanghaitech", str(tmp_path / "part_A"), part="B")


def test_sources_ignore_files_that_are_not_images(mall: Path, tmp_path: Path) -> None:
    (mall / "frames" / "Thumbs.db").write_bytes(b"?")
    part = make_shanghaitech(tmp_path / "part_B", count=3)
    (part / "train_data" / "images" / ".DS_Store").write_bytes(b"?")
    assert len(open_source("mall", str(mall)).items()) == 6
    assert len(open_source("shanghaitech", str(part)).items()) == 3


def test_synthetic_images_do_not_depend_on_their_number() -> None:
    few = open_source("synthetic", train=2, test=1, width=96, height=64, cameras=2, max_people=20)
    more = open_source("synthetic", train=3, val=1, test=1, width=96, height=64, cameras=2, max_people=20)
    assert [item.split for item in more.items()] == ["train"] * 3 + ["val", "test"]
    for split in ("train", "test"):
        one, other = (source.load(source.items([split])[0]) for source in (few, more))
        assert one.image == other.image and one.depth == other.depth and one.sha256 == other.sha256
        np.testing.assert_array_equal(one.points, other.points)
        assert (one.height, one.width) == decode_image(one.image).shape[:2] == (64, 96)
        assert one.depth is not None and few.teacher.name == "own-1"
    with pytest.raises(UserError, match="no split 'val'"):
        few.items(["val"])
    with pytest.raises(UserError, match="not 0 for all"):
        open_source("synthetic", train=0, test=0)
