"""Official layouts of public datasets, with their quirks, are read from folders and buckets."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crowdray.data.decoding import decode_image
from crowdray.data.sample import Sample, decode_depth, decode_roi
from crowdray.data.shards import Dataset
from crowdray.datasets import conversion
from crowdray.datasets.sources import SOURCES, Source, open_source, source_options
from crowdray.datasets.sources import ucsd as ucsd_module
from crowdray.errors import DataError, UserError

from ...support import published
from ...support.builders import HEIGHT, WIDTH, jpeg
from ...support.published import (
    BAD_TEST,
    BAD_TRAIN,
    HEADS,
    LAYOUTS,
    OUTSIDE,
    S1,
    S2,
    SCENE_A,
    SCENE_DASH,
    Files,
    below,
    in_bucket,
    mat,
)

MATLAB = np.array(HEADS) - 0.5
"""HEADS as continuous pixels, for files where the centre of the first pixel is 1."""


def open_layout(name: str, files: Files, **options: Any) -> Source:
    return open_source(name, in_bucket(files), **options)


def load_split(source: Source, split: str) -> list[Sample]:
    return [source.load(item) for item in source.items([split])]


def test_worldexpo_names_scenes_and_skips_bad_labels() -> None:
    source = open_layout("worldexpo", published.worldexpo())
    found = [f"{item.split}/{item.name} {item.scene}" for item in source.items()]
    assert found == [f"train/{SCENE_A} 100156", f"train/{SCENE_DASH} 104242", f"test/{S1} S1", f"test/{S2} S2"]
    assert source.notes() == [f"2 frames with labels known to be bad are left out: {BAD_TEST}, {BAD_TRAIN}"]


def test_worldexpo_both_matlab_formats_read_alike_and_keep_all_heads() -> None:
    source = open_layout("worldexpo", published.worldexpo())
    samples = [*load_split(source, "train"), *load_split(source, "test")]
    # The second and third labels are HDF5, the third is empty; heads outside the polygon are kept.
    for sample, expected in zip(samples, [MATLAB, MATLAB[:2], MATLAB[:0], MATLAB[1:]], strict=True):
        np.testing.assert_array_equal(sample.points, expected)
        # Corners (5, 3) and (21, 15), first centre (1, 1): the first row and column are inside, the last not.
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask[2:14, 4:20] = True
        assert sample.roi is not None and sample.depth is not None
        np.testing.assert_array_equal(decode_roi(sample.roi), mask)
        np.testing.assert_allclose(decode_depth(sample.depth), 2 / published.pixels_per_metre(), atol=1e-4)
    assert source.teacher.name == "perspective-1"


def test_worldexpo_notes_missing_perspective_and_test_frames() -> None:
    files = {path: data for path, data in published.worldexpo().items() if path.startswith(("train_f", "train_l"))}
    source = open_layout("worldexpo", files)
    assert source.teacher.name == "points-1" and len(source.items()) == 2
    assert [note.split(":")[0] for note in source.notes()] == [
        "this copy has no test split",
        "train_perspective is missing",
        "1 frames with labels known to be bad are left out",
    ]
    with pytest.raises(UserError, match="no split 'test'; choose from train"):
        source.items(["test"])


def test_ucsd_training_frames_are_601_to_1400(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    splits = [ucsd_module.frame_split(number) for number in (1, 600, 601, 1400, 1401)]
    assert splits == ["test", "test", "train", "train", "test"]


def test_ucsd_reads_both_variable_names() -> None:
    source = open_layout("ucsd", published.ucsd())
    for split, clips in (("train", [3, 4, 5, 6]), ("test", [0, 1, 2, 7, 8, 9])):
        samples = load_split(source, split)
        assert [s.name for s in samples] == [f"vidf1_33_{clip:03d}_f{frame:03d}" for clip in clips for frame in (1, 2)]
        for sample, (clip, frame) in zip(samples, [(c, f) for c in clips for f in (0, 1)], strict=True):
            np.testing.assert_array_equal(sample.points, MATLAB[: (clip + frame) % 4])
            assert sample.scene == "ucsd" and sample.roi is not None
            assert decode_roi(sample.roi).sum() == 20 * HEIGHT
            assert (np.ptp(decode_image(sample.image), axis=2) == 0).all()
    assert source.notes() == []


@pytest.mark.parametrize("exponent", [2, -2])
def test_ucsd_lower_end_is_nearest_for_either_kind_of_map(exponent: int) -> None:
    files = published.ucsd()
    size = published.pixels_per_metre()
    files["vidf-cvpr/vidf1_33_dmap3.mat"] = mat(dmap={"pmapxy": size**exponent})
    depth = load_split(open_layout("ucsd", files), "train")[0].depth
    assert depth is not None
    np.testing.assert_allclose(decode_depth(depth), 2 / size, atol=1e-4)


def test_ucsd_depth_from_points_ignores_test_heads() -> None:
    def depth(split: str, files: Files) -> object:
        (depth,) = {sample.depth for sample in load_split(open_layout("ucsd", files, depth="points"), split)}
        return depth

    files = published.ucsd()
    before = depth("test", files)
    assert before == depth("train", files)
    for clip in (0, 1, 2, 7, 8, 9):
        heads = np.random.default_rng(clip).uniform(1, [WIDTH, HEIGHT], (30, 2))
        cell = np.empty((1, 2), dtype=object)
        cell[0, :] = [{"loc": heads}, {"loc": heads[:9]}]
        files[f"vidf-cvpr/vidf1_33_{clip:03d}_frame_full.mat"] = mat(frame=cell)
    assert depth("test", files) == before


def test_ucsd_notes_missing_clips_and_maps() -> None:
    files = published.ucsd()
    missing = (
        "vidf-cvpr/vidf1_33_002",
        "ucsdpeds/vidf/vidf1_33_004",
        "vidf-cvpr/vidf1_33_roi",
        "vidf-cvpr/vidf1_33_dmap3",
    )
    source = open_layout("ucsd", {path: data for path, data in files.items() if not path.startswith(missing)})
    assert len(source.items(["train"])) == 6 and len(source.items(["test"])) == 10
    assert load_split(source, "train")[0].roi is None and source.teacher.name == "points-1"
    clips, region, perspective = source.notes()
    assert clips.startswith("clips 2, 4 are left out")
    assert region.startswith("vidf1_33_roi_mainwalkway.mat is missing")
    assert perspective.startswith("vidf1_33_dmap3.mat is missing")
    only = {path: data for path, data in files.items() if "_003" in path}
    assert open_layout("ucsd", only).notes()[0] == "this copy has no test split"


def test_ucf_cc_50_folds_partition_the_images() -> None:
    files = published.ucf_cc_50()
    assert open_layout("ucf-cc-50", files).name == "ucf-cc-50-fold1"
    test_names = []
    for fold in range(1, 6):
        source = open_layout("ucf-cc-50", files, fold=fold)
        names = [int(item.name) for item in source.items(["test"])]
        assert names == list(range(10 * fold - 9, 10 * fold + 1))
        assert {int(item.name) for item in source.items(["train"])} == set(range(1, 51)) - set(names)
        assert f"images {10 * fold - 9} to {10 * fold} are for testing" in source.notes()[0]
        test_names += names
    assert sorted(test_names) == list(range(1, 51))
    with pytest.raises(UserError, match="--fold 6: ucf-cc-50 has folds 1 to 5"):
        open_layout("ucf-cc-50", files, fold=6)


def test_ucf_cc_50_keeps_heads_outside_the_image(tmp_path: Path) -> None:
    source = open_layout("ucf-cc-50", published.ucf_cc_50())
    np.testing.assert_array_equal(load_split(source, "test")[6].points, np.array(OUTSIDE) - 0.5)
    assert load_split(source, "test")[2].points.shape == (0, 2)
    index = conversion.convert(source, str(tmp_path / "made"))
    assert index.splits["test"] == {"rows": 10, "heads": 1 + 2 + 0 + 1 + 2 + 0 + 2 + 2 + 0 + 1}
    assert "2 heads outside the image, in 1 image: test/7 (2)" in index.notes


def test_ucf_qnrf_reduces_large_photos_and_scales_their_heads() -> None:
    files = published.ucf_qnrf()
    source = open_layout("ucf-qnrf", files, longest=100)
    first, second = load_split(source, "train")
    assert first.image == files["Train/img_0001.jpg"]
    np.testing.assert_array_equal(first.points, MATLAB)
    assert (second.height, second.width) == (45, 100) and decode_image(second.image).shape == (45, 100, 3)
    np.testing.assert_array_equal(second.points, [[50.0, 22.5], [100.0, 45.0]])
    assert second.image == load_split(open_layout("ucf-qnrf", files, longest=100), "train")[1].image
    whole = Image.open(io.BytesIO(files["Train/img_0002.jpg"]))
    small = np.asarray(whole.resize((100, 45), Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(decode_image(second.image) - small).mean() < 5  # of 255: the encoding error of pure noise
    for longest in (0, 200):
        kept = load_split(open_layout("ucf-qnrf", files, longest=longest), "train")[1]
        assert kept.image == files["Train/img_0002.jpg"]
        np.testing.assert_array_equal(kept.points, [[100.0, 45.0], [200.0, 90.0]])
    assert source_options("ucf-qnrf")["longest"].default == 1536
    with pytest.raises(UserError, match="--longest 5: give at least 64"):
        open_layout("ucf-qnrf", files, longest=5)


def test_jhu_reads_empty_files_and_scenes_with_commas() -> None:
    source = open_layout("jhu", published.jhu())
    samples = [source.load(item) for item in source.items()]
    assert [f"{sample.split}/{sample.name}" for sample in samples] == [
        "train/0001",
        "train/0002",
        "val/0003",
        "test/0004",
    ]
    assert [sample.scene for sample in samples] == ["street, market, night", "stadium", "stadium", "protest"]
    expected = [np.zeros((0, 2)), [[3.5, 4.5], [10.5, 20.5]], [[31.5, 23.5]], [[0.5, 0.5]]]
    for sample, points in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(sample.points, points)
    assert source.notes() == []
    files = published.jhu()
    del files["val/image_labels.txt"]
    unlabelled = open_layout("jhu", files)
    assert load_split(unlabelled, "val")[0].scene == "val/0003"
    assert unlabelled.notes() == ["val/image_labels.txt is missing: each image is a scene of its own"]


def test_nwpu_follows_its_lists_and_reads_either_annotation() -> None:
    source = open_layout("nwpu", published.nwpu())
    assert [f"{item.split}/{item.name}" for item in source.items()] == ["train/0002", "train/0003", "val/0001"]
    for sample, count in zip([source.load(item) for item in source.items()], (0, 3, 2), strict=True):
        np.testing.assert_array_equal(sample.points, np.array(HEADS)[:count])
    assert source.notes() == ["the 2 images of test.txt are left out: they have no labels"]
    with pytest.raises(UserError, match="no split 'test'; choose from train, val"):
        source.items(["test"])


LABEL = f"train_label/100156/{SCENE_A}.mat"
CELL = np.empty((1, 2), dtype=object)
CELL[0, :] = [{"loc": np.ones((3, 2))}, {"loc": np.ones((4, 2))}]
FAULTS = [
    ("worldexpo", LABEL, mat(point_position=np.ones((2, 2)), point_num=3), "`point_num` is"),
    ("worldexpo", LABEL, mat(point_position=np.ones((3, 5)), point_num=3), r"\(3, 5\)"),
    ("worldexpo", "train_label/100156/roi.mat", mat(maskVerticesXCoordinates=[1.0]), "maskVerticesYCoordinates"),
    ("worldexpo", "train_perspective/100156.mat", mat(pMap=np.ones((3, 4))), r"\(24, 32\).*\(3, 4\)"),
    ("worldexpo", "train_perspective/100156.mat", mat(pMap=np.full((HEIGHT, WIDTH), np.nan)), "not finite"),
    ("worldexpo", f"train_frame/{SCENE_A}.jpg", jpeg(1)[:200], "cannot be decoded"),
    ("ucsd", "vidf-cvpr/vidf1_33_roi_mainwalkway.mat", mat(roi={"xi": 1.0}), "`roi` with `mask`"),
    ("ucsd", "vidf-cvpr/vidf1_33_000_frame_full.mat", b"", "`frame` or `fgt.frame`"),
    ("ucf-cc-50", "7_ann.mat", mat(annPoints=np.array([[np.nan, 1.0]])), "1 of 1 points are not finite"),
    ("ucf-cc-50", "7_ann.mat", mat(annPoints=np.array([[1e30, 1.0]])), r"1e\+30 pixels from"),
    ("ucf-qnrf", "Train/img_0002_ann.mat", published.hdf5(other=1.0), "`annPoints` with x and y"),
    ("ucf-qnrf", "Train/img_0002.jpg", b"no photo", " image"),
    ("jhu", "train/gt/0002.txt", b"3 4 5 6 1 0\n1 2 3 4\n", "a line has 4 fields"),
    ("jhu", "train/gt/0002.txt", b"3 4 5 6 1 0\n", "contains 1 heads, image_labels.txt says 2"),
    ("jhu", "train/gt/0002.txt", b"\xff\xfe", "is not a text file"),
    ("jhu", "train/image_labels.txt", b"0001,many,street,0,0\n", "line 1 is '0001,many"),
    (
        "mall",
        "mall_gt.mat",
        mat(frame=CELL, count=np.array([[3], [5]])),
        "frame 2: `count` is 5, but there are 4 heads",
    ),
    ("mall", "mall_gt.mat", mat(frame=CELL, count=np.array([[3]])), "`frame` has 2 frames, but `count` 1"),
    ("shanghaitech", "train_data/ground_truth/GT_IMG_2.mat", mat(something=1.0), "does not contain `image_info`"),
    (
        "shanghaitech",
        "train_data/ground_truth/GT_IMG_2.mat",
        mat(image_info={"location": np.ones((3, 2)), "number": 4}),
        "`number` is 4, but there are 3 heads",
    ),
    ("shanghaitech", "train_data/ground_truth/GT_IMG_2.mat", b"MATLAB 5.0 but not really", "contain `image_info`"),
    ("nwpu", "jsons/0003.json", b'{"human_num": 2, "points": [[1, 2]]}', "`human_num` is 2, but there are 1 heads"),
    ("nwpu", "jsons/0003.json", b'{"points": [[1, 2]]', "does not contain `human_num` and `points`"),
    ("nwpu", "train.txt", b"0099 1 1\n", "1 images of train.txt and their annotations are missing, such as 0099"),
]


@pytest.mark.parametrize(("name", "path", "content", "message"), FAULTS)
def test_damaged_file_raises_with_its_name(name: str, path: str, content: bytes, message: str, tmp_path: Path) -> None:
    root = in_bucket({**LAYOUTS[name](tmp_path / "made"), path: content})
    with pytest.raises(DataError, match=message) as caught:
        source = open_source(name, root)
        for item in source.items():
            source.load(item)
    assert path.rsplit("/", 1)[-1] in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_folder_and_bucket_convert_equally_and_sources_are_picklable(name: str, tmp_path: Path) -> None:
    files = LAYOUTS[name](tmp_path / "made")
    for path, content in files.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(content)
    local, remote = open_source(name, str(tmp_path / "in")), open_layout(name, files)
    index = conversion.convert(local, str(tmp_path / "local"))
    assert conversion.convert(remote, str(tmp_path / "remote")) == index
    assert Dataset.open(str(tmp_path / "remote")).digest == index.digest
    pickled = pickle.dumps((local, local.items()[-1]))
    copy, item = pickle.loads(pickled)
    assert copy.load(item).sha256 == local.load(item).sha256 and len(pickled) < 10_000


@pytest.mark.parametrize("missing", ["image", "annotation"])
@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"mall"}))  # all of Mall's annotations are one file
def test_load_item_without_image_or_annotation_raises(name: str, missing: str, tmp_path: Path) -> None:
    files = LAYOUTS[name](tmp_path / "made")
    item = open_layout(name, files).items()[0]
    del files[below(getattr(item, missing))]
    broken = open_layout(name, files)
    found = [other for other in broken.items() if (other.split, other.name) == (item.split, item.name)]
    if (name, missing) == ("ucsd", "annotation"):  # a clip without its annotation file is left out
        assert not found
        return
    message = rf"{below(item.image)} has no annotation"
    if missing == "image":
        message = f"{below(item.annotation)} annotates {item.name}, whose image is missing"
    with pytest.raises(DataError, match=message):
        broken.load(found[0])


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "synthetic"])
def test_open_source_of_another_folder_raises(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        open_source(name, str(tmp_path))
