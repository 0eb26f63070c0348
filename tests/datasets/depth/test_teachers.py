"""Stored maps and networks as depth teachers: their answers are computed anew by other means, mistakes explained."""

import contextlib
import hashlib
import io
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import onnx
import OpenEXR
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from crowdray.cluster import convert as cluster_convert
from crowdray.cluster import parallel
from crowdray.cluster.runtime import Resources
from crowdray.data.sample import decode_depth
from crowdray.data.shards import Dataset
from crowdray.datasets.conversion import convert
from crowdray.datasets.depth import Onnx, Precomputed, View, open_teacher
from crowdray.datasets.depth.inverse import depth_of_inverse
from crowdray.datasets.sources import open_source
from crowdray.errors import DataError, UserError

from ...support.builders import HEIGHT, WIDTH, make_mall, make_shanghaitech

Map = NDArray[np.float32]
RGB = np.array([1.0, 2.0, 4.0])
"""Weights of the channels in the network below: no two may be exchanged unseen."""
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


def pixels(height: int = 42, width: int = 56) -> NDArray[np.uint8]:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def view(image: NDArray[np.uint8], name: str = "a", split: str = "train") -> View:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    height, width = image.shape[:2]
    points = np.zeros((0, 2))
    return View(image=buffer.getvalue(), height=height, width=width, points=points, split=split, name=name)


def ask(choice: str, shown: View) -> Map:
    depth = open_teacher(choice, ()).depth(shown)
    assert depth is not None and depth.dtype == np.float32
    return depth


def network(
    path: Path,
    sides: Sequence[int | str] = ("h", "w"),
    *,
    batch: int = 1,
    channels: int = 3,
    kind: int = TensorProto.FLOAT,
    inputs: int = 1,
    outputs: Sequence[str] = ("y",),
    keepdims: int = 1,
    then: Sequence[Any] = (),
    says: dict[str, str] | None = None,
    external: bool = False,
) -> Path:
    """An ONNX file: y = 20 + sum of weighted channels, averaged over 2x2 pixels, then what `then` makes of it."""
    weights = numpy_helper.from_array(np.resize(RGB, (1, channels, 1, 1)).astype(np.float32), "w")
    offset = numpy_helper.from_array(np.array([20], np.float32), "offset")
    axis = numpy_helper.from_array(np.array([1]), "axis")
    nodes = [
        helper.make_node("Cast", ["x0"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["cast", "w", "offset"], ["mixed"]),
        helper.make_node("AveragePool", ["mixed"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        *then,
        helper.make_node("ReduceSum", ["then" if then else "pooled", "axis"], ["summed"], keepdims=keepdims),
        *(helper.make_node("Identity", ["summed"], [name]) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "depth",
        [helper.make_tensor_value_info(f"x{n}", kind, [batch, channels, *sides]) for n in range(inputs)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [weights, offset, axis],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    helper.set_model_props(model, says or {})
    onnx.save(model, path, save_as_external_data=external, size_threshold=0, location="weights")
    return path


def answer(image: NDArray[np.uint8], mean: Any = IMAGENET[0], std: Any = IMAGENET[1]) -> NDArray[np.float64]:
    """What that network says of an image, in float64."""
    mixed = ((image / 255 - mean) / std) @ RGB + 20
    height, width = mixed.shape
    return np.asarray(mixed.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)))


def test_inverse_depth_gives_one_depth_for_any_scale_and_shift() -> None:
    # A ground plane: inverse depth is linear in the row.
    rows = np.linspace(0, 1, 201)[:, None] * np.ones((1, 7))
    depth = depth_of_inverse(rows, 8)
    np.testing.assert_allclose(depth_of_inverse(rows * 31 - 17, 8), depth, rtol=1e-5)
    assert depth.min() == 1 and depth.max() == 8 and (np.diff(depth, axis=0) <= 0).all()
    # Between the percentiles, at 0.01 and 0.99, it stays a plane.
    expected = 1 / (1 / 8 + (rows - 0.01) / 0.98 * 7 / 8)
    np.testing.assert_allclose(depth[3:-3], expected[3:-3], rtol=1e-5)
    wild = rows.copy()
    wild[100, 3] = 1e6
    np.testing.assert_allclose(depth_of_inverse(wild, 8)[3:-3], np.where(wild > 1, 1, depth)[3:-3], rtol=2e-2)


def test_a_network_of_any_size_sees_the_normalised_image_at_the_size_asked_for(tmp_path: Path) -> None:
    place, image = network(tmp_path / "net.onnx"), pixels()
    taught = ask(f"onnx:{place},metric,side=42", view(image))
    np.testing.assert_allclose(taught, answer(image), rtol=1e-4)
    # 48x64 with a shorter side of 28: 28 and 37.3, which is nearest to three times 14.
    image = pixels(48, 64)
    small = np.asarray(Image.fromarray(image).resize((42, 28), Image.Resampling.BICUBIC))
    taught = ask(f"onnx:{place},metric,side=28,mean=0,std=0.5/1/2", view(image))
    np.testing.assert_allclose(taught, answer(small, 0, [0.5, 1, 2]), rtol=1e-4)
    taught = ask(f"onnx:{place},metric,side=28,multiple=8", view(image))
    assert taught.shape == (round(28 / 8) * 4, round(28 * 64 / 48 / 8) * 4)
    taught = ask(f"onnx:{place},metric,size=30x20", view(image))
    assert taught.shape == (15, 10)
    # What is larger than the image is averaged down to it.
    large = np.asarray(Image.fromarray(image).resize((256, 192), Image.Resampling.BICUBIC))
    taught = ask(f"onnx:{place},metric,size=192x256", view(image))
    np.testing.assert_allclose(taught, answer(large).reshape(48, 2, 64, 2).mean(axis=(1, 3)), rtol=1e-4)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_file_says_its_size_its_normalisation_and_which_way_it_runs(keepdims: int, tmp_path: Path) -> None:
    outputs = ("predicted_depth", "confidence")
    says = {"image_mean": "[0.1, 0.2, 0.3]", "image_std": "[0.5]", "depth_estimation_type": "relative"}
    place = network(tmp_path / "net.onnx", (14, 28), keepdims=keepdims, outputs=outputs, says=says)
    image = pixels(20, 30)
    small = np.asarray(Image.fromarray(image).resize((28, 14), Image.Resampling.BICUBIC))
    inverse = answer(small, [0.1, 0.2, 0.3], 0.5)
    low, high = np.percentile(inverse, [1, 99])
    nearness = np.clip((inverse - low) / (high - low), 0, 1)
    for options, ratio in (("", 10), (",size=14x28,range=4", 4)):
        taught = Onnx(f"{place}{options}").depth(view(image))
        np.testing.assert_allclose(taught, 1 / (1 / ratio + (1 - 1 / ratio) * nearness), rtol=1e-3)
    np.testing.assert_allclose(Onnx(f"{place},metric").depth(view(image)), inverse, rtol=1e-4)
    whitened = answer(small, [0.1, 0.2, 0.3], [1, 2, 3])
    np.testing.assert_allclose(Onnx(f"{place},metric,std=1/2/3").depth(view(image)), whitened, rtol=1e-4)


NAN = [helper.make_node("Sub", ["pooled", "offset"], ["off"]), helper.make_node("Log", ["off"], ["then"])]
CONSTANT = [helper.make_node("Mul", ["pooled", "zero"], ["then"])]
CLASSES = [helper.make_node("GlobalAveragePool", ["pooled"], ["all"]), helper.make_node("Flatten", ["all"], ["then"])]
UNSAID = [helper.make_node("Squeeze", ["pooled"], ["then"])]


@pytest.mark.parametrize(
    ("made", "options", "complaint"),
    [
        ({}, "", "does not say.*inverse.*metric"),
        ({}, "inverse,metric", "exclude each other"),
        ({}, "metric,near=1", "'near=1' is unknown.*range=10"),
        ({}, "metric,metric", "'metric' is unknown, repeated"),
        ({}, "metric=1", "'metric=1'"),
        ({}, "metric,size", "'size' is unknown, repeated, or lacks its value"),
        ({}, "metric,size=5", "size=5 is not like size=518x686"),
        ({}, "metric,multiple=0", "multiple=0 is not like.*at least 1"),
        ({}, "metric,mean=1/2", "mean=1/2 is not like.*one number or three"),
        ({}, "metric,std=0", "std is"),
        ({}, "inverse,range=1", "range=1 is not like range=10.*larger than 1"),
        ({}, "metric,size=14x14,side=14", "leave side and multiple out"),
        ({"sides": (14, 28)}, "metric,size=14x14", "takes 14x28 .*leave size out"),
        ({"sides": (14, 28)}, "metric,side=14", "leave side out"),
        ({"sides": (14, "w")}, "metric", "fixes one side"),
        ({"channels": 4}, "metric", "takes x0: tensor\\(float\\) \\[1, 4"),
        ({"batch": 2}, "metric", "takes x0: tensor\\(float\\) \\[2, 3"),
        ({"kind": TensorProto.UINT8}, "metric", "tensor\\(uint8\\)"),
        ({"inputs": 2}, "metric", "x0.*; x1.*takes one image"),
        ({"outputs": ("y", "z")}, "metric", "gives y .*; z "),
        ({"then": CLASSES}, "metric", "gives y \\[1, 1\\]"),
        ({"says": {"image_std": "0.5"}}, "metric", "image_std is '0.5', not like"),
        ({"external": True}, "metric", "net.onnx.*that holds its weights"),
    ],
)
def test_a_file_or_an_option_that_cannot_be_is_refused_at_once(
    made: dict[str, Any], options: str, complaint: str, tmp_path: Path
) -> None:
    place = network(tmp_path / "net.onnx", **made)
    with pytest.raises(UserError, match=complaint):
        open_teacher(f"onnx:{place},{options}".rstrip(","), ())


def test_what_is_no_network_and_what_is_not_installed_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no protobuf")
    for choice, complaint in {
        f"onnx:{tmp_path}/net.onnx,metric": "cannot open.*net.onnx",
        f"onnx:{tmp_path}/none.onnx": "none.onnx: it does not exist",
        "onnx": "needs a place",
        "onnx:": "needs a place",
        f"precomputed:{tmp_path}": "holds no file that ends with .png, .npy, .exr",
        f"hf:{tmp_path}/none": "no folder",
        f"hf:{tmp_path}": "lacks config.json",
    }.items():
        with pytest.raises(UserError, match=complaint):
            open_teacher(choice, ())
    (tmp_path / "a.exr").touch()
    choices = {"onnx": f"onnx:{network(tmp_path / 'net.onnx')}", "exr": f"precomputed:{tmp_path}"}
    for extra, package in (("onnx", "onnxruntime"), ("exr", "OpenEXR")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"pip install 'crowdray\[{extra}\]'"):
            open_teacher(choices[extra], ())


def test_a_network_is_known_by_its_content_and_travels_without_its_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    content, image = network(tmp_path / "net.onnx").read_bytes(), pixels()
    uri = f"memory://{tmp_path.name}-networks/net.onnx"
    with fsspec.open(uri, "wb") as file:
        file.write(content)
    teacher = Onnx(f"{uri},range=5,inverse")
    assert teacher.name == f"onnx-1:{hashlib.sha256(content).hexdigest()[:12]}:inverse,range=5" and not teacher.gpu
    assert teacher._session.get_session_options().intra_op_num_threads == 1
    travelled = pickle.loads(pickle.dumps(teacher))
    fsspec.filesystem("memory").rm(uri)  # this node has it already
    np.testing.assert_array_equal(travelled.depth(view(image)), teacher.depth(view(image)))
    # Another file in its place is not taken for it.
    local = Onnx(f"{tmp_path / 'net.onnx'},inverse")
    travelled = pickle.loads(pickle.dumps(local))
    network(tmp_path / "net.onnx", (14, 14))
    with pytest.raises(DataError, match=r"net\.onnx"):
        travelled.depth(view(image))
    assert Onnx(f"{tmp_path / 'net.onnx'},inverse").name != local.name


def test_a_gpu_is_asked_of_ray_and_missed_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = network(tmp_path / "net.onnx")
    teacher = Onnx(f"{place},metric,cuda")
    assert teacher.gpu and teacher.name.endswith(":cuda,metric")
    with pytest.raises(UserError, match=r"onnxruntime-gpu.*leave cuda out"):
        teacher.depth(view(pixels()))
    cluster = contextlib.nullcontext(Resources(cpus=2, gpus=0, local=True))
    monkeypatch.setattr(parallel, "connect", lambda: cluster)
    source = open_source("synthetic", train=1, test=0, depth=f"onnx:{place},metric,cuda")
    assert source.gpu and not open_source("synthetic", depth="own").gpu
    with pytest.raises(UserError, match="Ray has none here"):
        cluster_convert.convert(source, str(tmp_path / "out"))


def write_exr(path: Path, channels: dict[str, Any]) -> None:
    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, channels).write(str(path))


WRITERS: dict[str, Callable[[Path, Map], Any]] = {
    ".png": lambda path, depth: Image.fromarray(depth.astype(np.uint16)).save(path),
    ".npy": lambda path, depth: np.save(path, depth.astype(np.float16)),
    ".exr": lambda path, depth: write_exr(path, {"Z": depth}),
}


def whole(height: int, width: int) -> Map:
    """A map of whole numbers, which every kind of file holds exactly."""
    return np.random.default_rng(width).integers(1, 2000, (height, width)).astype(np.float32)


@pytest.mark.parametrize("ending", WRITERS)
def test_stored_maps_are_read_as_they_were_written(ending: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        # A third of the image's size, rounded either way, is still the whole image.
        WRITERS[ending](tmp_path / split / f"a{ending}", whole(14, 19 if split == "train" else 18))
    teacher = pickle.loads(pickle.dumps(open_teacher(f"precomputed:{tmp_path}", ())))
    for split, width in (("train", 19), ("test", 18)):
        np.testing.assert_array_equal(teacher.depth(view(pixels(), split=split)), whole(14, width))
    inverse = ask(f"precomputed:{tmp_path},inverse,range=20", view(pixels()))
    np.testing.assert_array_equal(inverse, depth_of_inverse(whole(14, 19), 20))
    WRITERS[ending](tmp_path / f"b{ending}", whole(84, 112))
    flat = ask(f"precomputed:{tmp_path},flat", view(pixels(), "b"))
    np.testing.assert_allclose(flat, whole(84, 112).reshape(42, 2, 56, 2).mean(axis=(1, 3)), rtol=1e-6)


def test_a_stored_map_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    fits, sky = whole(42, 56), whole(42, 56)
    sky[:4] = np.inf
    np.save(tmp_path / "sky.npy", sky)
    for name, wrong in {"nan": np.nan, "negative": -1.0}.items():
        np.save(tmp_path / f"{name}.npy", np.where(fits > 1900, wrong, fits))
    np.save(tmp_path / "flat.npy", np.ones_like(fits))
    np.save(tmp_path / "whole.npy", fits.astype(np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}]))
    np.save(tmp_path / "deep.npy", fits[None])
    np.save(tmp_path / "turned.npy", fits.T)
    np.save(tmp_path / "cropped.npy", fits[:, :50])
    np.save(tmp_path / "both.npy", fits)
    Image.fromarray(fits.astype(np.uint16)).save(tmp_path / "both.png")
    Image.fromarray(fits.astype(np.uint8)).save(tmp_path / "eight.png")
    Image.fromarray(pixels()).save(tmp_path / "coloured.png")
    for name in ("broken.png", "broken.exr"):
        (tmp_path / name).write_bytes(b"nothing")
    (tmp_path / "broken.exr").rename(tmp_path / "broken2.exr")
    write_exr(tmp_path / "colours.exr", {"R": fits, "G": fits, "B": fits})
    teacher = Precomputed(f"{tmp_path},flat")
    np.testing.assert_array_equal(teacher.depth(view(pixels(), "sky")), np.where(sky < np.inf, sky, sky[4:].max()))
    for name, complaint in {
        "nan": "nan.npy.*no number, or negative, at",
        "negative": "negative.npy.*no number, or negative, at",
        "flat": "flat.npy.*is 1 everywhere",
        "whole": "int64 of shape \\(42, 56\\), expected floats",
        "objects": "no array of numbers",
        "deep": "\\(1, 42, 56\\)",
        "turned": "56x42 .*its image 42x56",
        "cropped": "42x50 .*its image 42x56",
        "both": "both.png and both.npy",
        "eight": "mode L, expected grey with 16 bits",
        "coloured": "mode RGB, expected",
        "broken": "broken.png is no PNG",
        "broken2": "broken2.exr cannot be read",
        "colours": "channels B, G, R; write depth alone",
        "gone": "holds none of gone.png, gone.npy, gone.exr$",
        "": "does not name its images",
    }.items():
        with pytest.raises(DataError, match=complaint):
            teacher.depth(view(pixels(), name))
    with pytest.raises(DataError, match=r"none of train/sky.png.*option flat"):
        Precomputed(str(tmp_path)).depth(view(pixels(), "sky"))
    with pytest.raises(DataError, match="not finite"):
        Precomputed(f"{tmp_path},flat,inverse").depth(view(pixels(), "sky"))
    np.save(tmp_path / "sky.npy", sky + 1)
    assert Precomputed(f"{tmp_path},flat").name != teacher.name


def test_stored_maps_come_through_a_conversion(place: str, tmp_path: Path) -> None:
    source = make_shanghaitech(tmp_path / "part_B_final", count=4)
    maps = {f"IMG_{n}": whole(HEIGHT, WIDTH) + n for n in range(1, 5)}
    for name, depth in maps.items():
        buffer = io.BytesIO()
        np.save(buffer, depth)
        with fsspec.open(f"{place}/train/{name}.npy", "wb", auto_mkdir=True) as file:
            file.write(buffer.getvalue())
    opened = open_source("shanghaitech", str(source), depth=f"precomputed:{place}")
    index = convert(opened, str(tmp_path / "out"))
    assert index.depth_teacher == opened.depth_teacher and index.depth_teacher.startswith("precomputed-1:")
    dataset = Dataset.open(str(tmp_path / "out"))
    for row, depth in enumerate(maps.values()):
        stored = dataset.sample(row).depth
        assert stored is not None
        np.testing.assert_allclose(decode_depth(stored), depth / depth.max(), rtol=0, atol=0.5001 / 65535)


def test_a_network_s_dataset_is_its_own_and_the_same_again(tmp_path: Path) -> None:
    source = str(make_shanghaitech(tmp_path / "part_B_final", count=3))
    place = network(tmp_path / "net.onnx")
    choices = ["none", "points", *(f"onnx:{place},side=24,multiple=8{option}" for option in (",metric", ",inverse"))]
    made = [
        [convert(open_source("shanghaitech", source, depth=choice), str(tmp_path / f"{n}-{copy}")) for copy in (0, 1)]
        for n, choice in enumerate(choices)
    ]
    assert all(first == second for first, second in made)
    assert len({index.digest for index, _ in made}) == len({index.depth_teacher for index, _ in made}) == len(choices)


@pytest.mark.parametrize(
    ("then", "complaint"),
    [
        (NAN, "its depth is no number"),
        (CONSTANT, "its depth is 0 everywhere"),
        (UNSAID, r"gives \(14, 1\), no map"),
    ],
)
def test_a_network_that_fails_publishes_nothing_and_names_itself_and_the_image(
    then: Sequence[Any], complaint: str, tmp_path: Path
) -> None:
    source = str(make_shanghaitech(tmp_path / "part_B_final", count=2))
    zero = helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.zeros(1, np.float32)))
    place = network(tmp_path / "net.onnx", then=[zero, *then])
    with pytest.raises(DataError, match=rf"train/IMG_1: onnx-1:[0-9a-f]{{12}}:metric,side=28:? {complaint}"):
        convert(open_source("shanghaitech", source, depth=f"onnx:{place},metric,side=28"), str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_frames_of_one_camera_have_each_their_own_depth(tmp_path: Path) -> None:
    place = network(tmp_path / "net.onnx")
    source = open_source("mall", str(make_mall(tmp_path / "mall")), depth=f"onnx:{place},metric,side=24,multiple=8")
    travelled = pickle.loads(pickle.dumps(source))
    depths = [travelled.load(item).depth for item in source.items()]
    assert len(set(depths)) == len(depths) == 6 and travelled.gpu is False
