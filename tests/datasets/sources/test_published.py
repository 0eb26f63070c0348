"""The published datasets: each layout is read as it is, quirk by quirk, from folders and from buckets."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import crowdray
from crowdray.data.sample import Sample, decode_depth, decode_image, decode_roi
from crowdray.data.shards import Dataset
from crowdray.datasets import conversion
from crowdray.datasets.sources import SOURCES, Item, Source, open_source, source_options
from crowdray.datasets.sources import ucsd as ucsd_module
from crowdray.datasets.sources import worldexpo as worldexpo_module
from crowdray.errors import DataError, UserError

from ...support import published
from ...support.builders import HEIGHT, WIDTH, jpeg
from ...support.published import BAD_TEST, BAD_TRAIN, HEADS, OUTSIDE, S1, S2, SCENE_A, SCENE_DASH, Files, in_bucket, mat

MATLAB = np.array(HEADS) - 0.5
"""HEADS as continuous pixels where a file counts the first pixel's centre as 1."""

LAYOUTS = {
    "worldexpo": published.worldexpo,
    "ucsd": published.ucsd,
    "ucf-cc-50": published.ucf_cc_50,
    "ucf-qnrf": published.ucf_qnrf,
    "jhu": published.jhu,
    "nwpu": published.nwpu,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of 24x32; clips of two frames, so that the same clips train as in clips of 200."""
    monkeypatch.setattr(worldexpo_module, "SIZE", (HEIGHT, WIDTH))
    monkeypatch.setattr(ucsd_module, "CLIP_FRAMES", 2)
    monkeypatch.setattr(ucsd_module, "TRAIN_FRAMES", range(7, 15))


def opened(name: str, files: Files, **options: Any) -> Source:
    return open_source(name, in_bucket(files), **options)


def image_name(item: Item) -> str:
    """The file name of an item's image."""
    assert item.image is not None
    return item.image.rsplit("/", 1)[-1]


def loaded(source: Source, split: str) -> list[Sample]:
    return [source.load(item) for item in source.items([split])]


def test_worldexpo_knows_its_scenes_and_leaves_out_bad_labels() -> None:
    source = opened("worldexpo", published.worldexpo())
    assert [(item.split, item.name, item.scene) for item in source.items()] == [
        ("train", SCENE_A, "100156"),
        ("train", SCENE_DASH, "104242"),
        ("test", S1, "S1"),
        ("test", S2, "S2"),
    ]
    assert source.notes() == [f"2 frames with labels known to be bad are left out: {BAD_TEST}, {BAD_TRAIN}"]
    assert len(worldexpo_module.BAD) == 6 and list(worldexpo_module.TEST_SCENES.values()) == [
        "S1",
        "S2",
        "S3",
        "S4",
        "S5",
    ]


def test_worldexpo_s_two_kinds_of_files_read_alike_and_keep_heads_outside_the_region() -> None:
    source = opened("worldexpo", published.worldexpo())
    samples = [*loaded(source, "train"), *loaded(source, "test")]
    # The second label and the third are HDF5, the third holds nobody; heads outside the polygon stay.
    for sample, expected in zip(samples, [MATLAB, MATLAB[:2], MATLAB[:0], MATLAB[1:]], strict=True):
        np.testing.assert_array_equal(sample.points, expected)
        # Corners at (5, 3) and (21, 15), the first centre being (1, 1): that row and column are in, the last are not.
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask[2:14, 4:20] = True
        assert sample.roi is not None and sample.depth is not None
        np.testing.assert_array_equal(decode_roi(sample.roi), mask)
        np.testing.assert_allclose(decode_depth(sample.depth), 2 / published.pixels_per_metre(), atol=1e-4)
    assert source.depth_teacher == "perspective-1"


def test_worldexpo_without_perspective_or_test_frames() -> None:
    files = {path: data for path, data in published.worldexpo().items() if path.startswith(("train_f", "train_l"))}
    source = opened("worldexpo", files)
    assert source.depth_teacher == "points-1" and len(source.items()) == 2
    assert [note.split(":")[0] for note in source.notes()] == [
        "this copy has no test split",
        "train_perspective is missing",
        "1 frames with labels known to be bad are left out",
    ]
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        source.items(["test"])


@pytest.mark.parametrize(
    ("number", "split"), [(1, "test"), (600, "test"), (601, "train"), (1400, "train"), (1401, "test")]
)
def test_ucsd_trains_on_frames_601_to_1400(monkeypatch: pytest.MonkeyPatch, number: int, split: str) -> None:
    monkeypatch.undo()
    assert ucsd_module._split(number) == split


def test_ucsd_reads_both_spellings() -> None:
    source = opened("ucsd", published.ucsd())
    for split, clips in (("train", [3, 4, 5, 6]), ("test", [0, 1, 2, 7, 8, 9])):
        samples = loaded(source, split)
        assert [s.name for s in samples] == [f"vidf1_33_{clip:03d}_f{frame:03d}" for clip in clips for frame in (1, 2)]
        for sample, (clip, frame) in zip(samples, [(c, f) for c in clips for f in (0, 1)], strict=True):
            np.testing.assert_array_equal(sample.points, MATLAB[: (clip + frame) % 4])
            assert sample.scene == "ucsd" and sample.roi is not None
            assert decode_roi(sample.roi).sum() == 20 * HEIGHT
            assert (np.ptp(decode_image(sample.image), axis=2) == 0).all()
    assert source.notes() == ["4 heads lie outside the region of interest"]  # those of frames with three


@pytest.mark.parametrize("exponent", [2, -2])
def test_ucsd_is_nearest_at_its_lower_end_whichever_way_its_map_counts(exponent: int) -> None:
    files = published.ucsd()
    size = published.pixels_per_metre()
    files["vidf-cvpr/vidf1_33_dmap3.mat"] = mat(dmap={"pmapxy": size**exponent})
    depth = loaded(opened("ucsd", files), "train")[0].depth
    assert depth is not None
    np.testing.assert_allclose(decode_depth(depth), 2 / size, atol=1e-4)


def test_ucsd_s_depth_from_points_never_sees_the_test_heads() -> None:
    def depth(split: str, files: Files) -> bytes | None:
        depths = {bytes(sample.depth or b"") for sample in loaded(opened("ucsd", files, depth="points"), split)}
        assert len(depths) == 1
        return depths.pop()

    files = published.ucsd()
    before = depth("test", files)
    assert before == depth("train", files)
    for clip in (0, 1, 2, 7, 8, 9):
        heads = np.random.default_rng(clip).uniform(1, [WIDTH, HEIGHT], (30, 2))
        cell = np.empty((1, 2), dtype=object)
        cell[0, :] = [{"loc": heads}, {"loc": heads[:9]}]
        files[f"vidf-cvpr/vidf1_33_{clip:03d}_frame_full.mat"] = mat(frame=cell)
    assert depth("test", files) == before


def test_ucsd_without_some_clips_and_maps() -> None:
    files = published.ucsd()
    gone = (
        "vidf-cvpr/vidf1_33_002",
        "ucsdpeds/vidf/vidf1_33_004",
        "vidf-cvpr/vidf1_33_roi",
        "vidf-cvpr/vidf1_33_dmap3",
    )
    source = opened("ucsd", {path: data for path, data in files.items() if not path.startswith(gone)})
    assert len(source.items(["train"])) == 6 and len(source.items(["test"])) == 10
    assert loaded(source, "train")[0].roi is None and source.depth_teacher == "points-1"
    assert [note.partition(" ")[0] for note in source.notes()] == [
        "clips",
        "vidf1_33_roi_mainwalkway.mat",
        "vidf1_33_dmap3.mat",
    ]
    assert source.notes()[0].startswith("clips 2, 4 are left out")
    only = {path: data for path, data in files.items() if "_003" in path}
    assert opened("ucsd", only).notes()[0] == "this copy has no test split"


def test_ucf_cc_50_tests_one_fold_and_trains_on_the_others() -> None:
    files = published.ucf_cc_50()
    assert opened("ucf-cc-50", files).name == "ucf-cc-50-fold1"
    tested = []
    for fold in range(1, 6):
        source = opened("ucf-cc-50", files, fold=fold)
        names = [int(item.name) for item in source.items(["test"])]
        assert names == list(range(10 * fold - 9, 10 * fold + 1))
        assert {int(item.name) for item in source.items(["train"])} == set(range(1, 51)) - set(names)
        assert f"images {10 * fold - 9} to {10 * fold} test" in source.notes()[0]
        tested += names
    assert sorted(tested) == list(range(1, 51))
    with pytest.raises(UserError, match="no fold 6; choose one from 1 to 5"):
        opened("ucf-cc-50", files, fold=6)


def test_ucf_cc_50_keeps_heads_outside_their_image(tmp_path: Path) -> None:
    source = opened("ucf-cc-50", published.ucf_cc_50())
    np.testing.assert_array_equal(loaded(source, "test")[6].points, np.array(OUTSIDE) - 0.5)
    assert loaded(source, "test")[2].points.shape == (0, 2)
    index = conversion.convert(source, str(tmp_path / "made"))
    assert index.splits["test"] == {"rows": 10, "heads": 1 + 2 + 0 + 1 + 2 + 0 + 2 + 2 + 0 + 1}
    assert "2 heads lie outside their image and are kept, in 1 images: test/7 (2)" in index.notes


def test_ucf_qnrf_shrinks_what_is_too_large_and_its_heads_along() -> None:
    files = published.ucf_qnrf()
    source = opened("ucf-qnrf", files, longest=100)
    first, second = loaded(source, "train")
    assert first.image == files["Train/img_0001.jpg"]
    np.testing.assert_array_equal(first.points, MATLAB)
    assert (second.height, second.width) == (45, 100) and decode_image(second.image).shape == (45, 100, 3)
    np.testing.assert_array_equal(second.points, [[50.0, 22.5], [100.0, 45.0]])
    assert second.image == loaded(opened("ucf-qnrf", files, longest=100), "train")[1].image
    whole = Image.open(io.BytesIO(files["Train/img_0002.jpg"]))
    small = np.asarray(whole.resize((100, 45), Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(decode_image(second.image) - small).mean() < 5  # of 255: what the encoding costs pure noise
    for longest in (0, 200):
        kept = loaded(opened("ucf-qnrf", files, longest=longest), "train")[1]
        assert kept.image == files["Train/img_0002.jpg"]
        np.testing.assert_array_equal(kept.points, [[100.0, 45.0], [200.0, 90.0]])
    assert source_options("ucf-qnrf")["longest"].default == 1536
    with pytest.raises(UserError, match="--longest 5: give at least 64"):
        opened("ucf-qnrf", files, longest=5)


def test_jhu_reads_empty_files_and_scenes_with_commas() -> None:
    source = opened("jhu", published.jhu())
    samples = [source.load(item) for item in source.items()]
    assert [(s.split, s.name, s.scene) for s in samples] == [
        ("train", "0001", "street, market, night"),
        ("train", "0002", "stadium"),
        ("val", "0003", "stadium"),
        ("test", "0004", "protest"),
    ]
    expected = [np.zeros((0, 2)), [[3.5, 4.5], [10.5, 20.5]], [[31.5, 23.5]], [[0.5, 0.5]]]
    for sample, points in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(sample.points, points)
    assert source.notes() == []
    unlabelled = opened("jhu", {path: data for path, data in published.jhu().items() if path != "val/image_labels.txt"})
    assert loaded(unlabelled, "val")[0].scene == "val/0003"
    assert unlabelled.notes() == ["val/image_labels.txt is missing: each image is a scene of its own"]


def test_nwpu_trusts_its_lists_and_reads_either_annotation() -> None:
    source = opened("nwpu", published.nwpu())
    assert [(item.split, item.name) for item in source.items()] == [
        ("train", "0002"),
        ("train", "0003"),
        ("val", "0001"),
    ]
    for sample, count in zip([source.load(item) for item in source.items()], (0, 3, 2), strict=True):
        np.testing.assert_array_equal(sample.points, np.array(HEADS)[:count])
    assert source.notes() == ["the 2 images of test.txt are left out: they have no labels"]
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        source.items(["test"])


MISTAKES = [
    (
        "worldexpo",
        f"train_label/100156/{SCENE_A}.mat",
        mat(point_position=np.ones((2, 2)), point_num=3),
        "`point_num` is",
    ),
    ("worldexpo", f"train_label/100156/{SCENE_A}.mat", mat(point_position=np.ones((2, 1)), point_num=2), r"\(2, 1\)"),
    ("worldexpo", "train_label/100156/roi.mat", mat(maskVerticesXCoordinates=[1.0]), "maskVerticesYCoordinates"),
    ("worldexpo", "train_perspective/100156.mat", mat(pMap=np.ones((3, 4))), r"\(24, 32\).*\(3, 4\)"),
    ("worldexpo", "train_perspective/100156.mat", mat(pMap=np.full((HEIGHT, WIDTH), np.nan)), "not finite"),
    ("worldexpo", f"train_frame/{SCENE_A}.jpg", jpeg(1)[:200], "cannot be decoded"),
    ("ucsd", "vidf-cvpr/vidf1_33_roi_mainwalkway.mat", mat(roi={"xi": 1.0}), "`roi` with `mask`"),
    ("ucsd", "vidf-cvpr/vidf1_33_000_frame_full.mat", b"", "`frame` or `fgt.frame`"),
    ("ucf-cc-50", "7_ann.mat", mat(annPoints=np.array([[np.nan, 1.0]])), "1 of 1 points are not finite"),
    ("ucf-cc-50", "7_ann.mat", mat(annPoints=np.array([[1e30, 1.0]])), r"1e\+30 pixels from"),
    ("ucf-qnrf", "Train/img_0002_ann.mat", published.hdf5(other=1.0), "`annPoints` with x and y"),
    ("ucf-qnrf", "Train/img_0002.jpg", b"no photo", "it is no image"),
    ("jhu", "train/gt/0002.txt", b"3 4 5 6 1 0\n1 2 3 4\n", "a line has 4 fields"),
    ("jhu", "train/gt/0002.txt", b"3 4 5 6 1 0\n", "holds 1 heads, but image_labels.txt says 2"),
    ("jhu", "train/gt/0002.txt", b"\xff\xfe", "is no text"),
    ("jhu", "train/image_labels.txt", b"0001,many,street,0,0\n", "line 1 is '0001,many"),
    ("nwpu", "jsons/0003.json", b'{"human_num": 2, "points": [[1, 2]]}', "`human_num` is 2, but 1 points"),
    ("nwpu", "jsons/0003.json", b'{"human_num": 1, "points": [[1, 2]]}', "holds 1 heads, but .*0003.mat 3"),
    ("nwpu", "jsons/0003.json", b'{"points": [[1, 2]]', "does not hold `human_num` and `points`"),
    ("nwpu", "train.txt", b"0099 1 1\n", "1 images of train.txt are missing .* such as 0099"),
]


@pytest.mark.parametrize(("name", "path", "content", "message"), MISTAKES)
def test_a_broken_file_is_named_with_its_mend(name: str, path: str, content: bytes, message: str) -> None:
    root = in_bucket({**LAYOUTS[name](), path: content})
    with pytest.raises(DataError, match=message) as caught:
        source = open_source(name, root)
        for item in source.items():
            source.load(item)
    assert path.rsplit("/", 1)[-1] in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_folder_and_bucket_give_one_dataset_and_sources_travel(name: str, tmp_path: Path) -> None:
    files = LAYOUTS[name]()
    for path, content in files.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(content)
    here, there = open_source(name, str(tmp_path / "in")), opened(name, files)
    index = conversion.convert(here, str(tmp_path / "here"))
    assert conversion.convert(there, str(tmp_path / "there")) == index
    assert Dataset.open(str(tmp_path / "there")).digest == index.digest
    item = here.items()[-1]
    fresh, travelled = pickle.loads(pickle.dumps((here, item)))
    assert fresh.load(travelled).sha256 == here.load(item).sha256
    assert len(pickle.dumps((open_source(name, str(tmp_path / "in")), item))) < 10_000


@pytest.mark.parametrize("name", LAYOUTS)
def test_image_names_and_annotations_are_refused_one_by_one(name: str) -> None:
    files = LAYOUTS[name]()
    source = opened(name, files)
    item = source.items()[0]
    assert item.image is not None and item.annotation is not None
    lost = item.image.split("/", 3)[-1]
    broken = opened(name, {path: data for path, data in files.items() if path != lost})
    (again,) = [other for other in broken.items() if (other.split, other.name) == (item.split, item.name)]
    with pytest.raises(DataError, match=f"{item.annotation.rsplit('/', 1)[-1]} annotates {item.name}, whose image"):
        broken.load(again)
    if name != "ucsd":  # one file annotates a clip, and a clip without it is left out
        lost = item.annotation.split("/", 3)[-1]
        broken = opened(name, {path: data for path, data in files.items() if path != lost})
        (again,) = [other for other in broken.items() if (other.split, other.name) == (item.split, item.name)]
        with pytest.raises(DataError, match=f"{image_name(again)} has no annotation"):
            broken.load(again)


def test_only_the_adapter_that_is_asked_for_is_imported() -> None:
    code = "import sys; from crowdray.datasets.sources import SOURCES, source_options; source_options('jhu'); "
    code += "paths = {name: known.path.split(':')[0] for name, known in SOURCES.items()}; "
    code += "print([name for name, path in paths.items() if f'crowdray.datasets.sources.{path}' in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(crowdray.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "['jhu']"


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "synthetic"])
def test_a_folder_of_something_else_is_said_to_be_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        open_source(name, str(tmp_path))
