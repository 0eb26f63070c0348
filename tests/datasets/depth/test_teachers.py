"""Precomputed maps and ONNX networks as depth teachers equal an independent computation."""

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
from crowdray.datasets.depth import open_teacher
from crowdray.datasets.depth.inverse import depth_of_inverse
from crowdray.datasets.depth.onnx import OnnxDepth
from crowdray.datasets.depth.precomputed import PrecomputedDepth
from crowdray.datasets.depth.teacher import DepthInput
from crowdray.datasets.sources import open_source
from crowdray.errors import DataError, UserError

from ...support.builders import HEIGHT, WIDTH, make_depth_input, make_mall, make_shanghaitech

Map = NDArray[np.float32]
RGB = np.array([1.0, 2.0, 4.0])
"""Channel weights of the network below; all differ, so that swapped channels are detected."""
IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


def pixels(height: int = 42, width: int = 56) -> NDArray[np.uint8]:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def compute(choice: str, inputs: DepthInput) -> Map:
    depth = open_teacher(choice, ()).depth(inputs)
    assert depth is not None and depth.dtype == np.float32
    return depth


def network(
    path: Path,
    sides: Sequence[int | str] = ("h", "w"),
    *,
    inputs: int = 1,
    outputs: Sequence[str] = ("y",),
    keepdims: int = 1,
    then: Sequence[Any] = (),
    metadata: dict[str, str] | None = None,
    external: bool = False,
) -> Path:
    """Write an ONNX file: 20 + weighted channels, averaged over 2x2 pixels, then the nodes `then`."""
    weights = numpy_helper.from_array(RGB.reshape(1, 3, 1, 1).astype(np.float32), "w")
    offset = numpy_helper.from_array(np.array([20], np.float32), "offset")
    axis = numpy_helper.from_array(np.array([1]), "axis")
    nodes = [
        helper.make_node("Conv", ["x0", "w", "offset"], ["mixed"]),
        helper.make_node("AveragePool", ["mixed"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        *then,
        helper.make_node("ReduceSum", ["then" if then else "pooled", "axis"], ["summed"], keepdims=keepdims),
        *(helper.make_node("Identity", ["summed"], [name]) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "depth",
        [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, [1, 3, *sides]) for n in range(inputs)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [weights, offset, axis],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path, save_as_external_data=external, size_threshold=0, location="weights")
    return path


def expected_output(image: NDArray[np.uint8], mean: Any = IMAGENET[0], std: Any = IMAGENET[1]) -> NDArray[np.float64]:
    """Output of that network for an image, in float64."""
    mixed = ((image / 255 - mean) / std) @ RGB + 20
    height, width = mixed.shape
    return np.asarray(mixed.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)))


def test_depth_of_inverse_is_invariant_to_scale_and_shift() -> None:
    # A ground plane: inverse depth is linear in the row.
    rows = np.linspace(0, 1, 201)[:, None] * np.ones((1, 7))
    depth = depth_of_inverse(rows, 8)
    np.testing.assert_allclose(depth_of_inverse(rows * 31 - 17, 8), depth, rtol=1e-5)
    assert depth.min() == 1 and depth.max() == 8 and (np.diff(depth, axis=0) <= 0).all()
    # Between the percentiles 0.01 and 0.99 the plane is kept.
    expected = 1 / (1 / 8 + (rows - 0.01) / 0.98 * 7 / 8)
    np.testing.assert_allclose(depth[3:-3], expected[3:-3], rtol=1e-5)
    wild = rows.copy()
    wild[100, 3] = 1e6
    np.testing.assert_allclose(depth_of_inverse(wild, 8)[3:-3], np.where(wild > 1, 1, depth)[3:-3], rtol=2e-2)


def test_onnx_dynamic_network_gets_the_normalised_image_at_the_configured_size(tmp_path: Path) -> None:
    path, image = network(tmp_path / "net.onnx"), pixels()
    depth = compute(f"onnx:{path},metric,side=42", make_depth_input(image))
    np.testing.assert_allclose(depth, expected_output(image), rtol=1e-4)
    # 48x64 with a shorter side of 28: 28 and 37.3, which is nearest to three times 14.
    image = pixels(48, 64)
    small = np.asarray(Image.fromarray(image).resize((42, 28), Image.Resampling.BICUBIC))
    depth = compute(f"onnx:{path},metric,side=28,mean=0,std=0.5/1/2", make_depth_input(image))
    np.testing.assert_allclose(depth, expected_output(small, 0, [0.5, 1, 2]), rtol=1e-4)
    depth = compute(f"onnx:{path},metric,side=28,multiple=8", make_depth_input(image))
    assert depth.shape == (round(28 / 8) * 4, round(28 * 64 / 48 / 8) * 4)
    depth = compute(f"onnx:{path},metric,size=30x20", make_depth_input(image))
    assert depth.shape == (15, 10)
    # Maps larger than the image are averaged down.
    large = np.asarray(Image.fromarray(image).resize((256, 192), Image.Resampling.BICUBIC))
    depth = compute(f"onnx:{path},metric,size=192x256", make_depth_input(image))
    np.testing.assert_allclose(depth, expected_output(large).reshape(48, 2, 64, 2).mean(axis=(1, 3)), rtol=1e-4)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_onnx_metadata_defines_size_normalisation_and_depth_type(keepdims: int, tmp_path: Path) -> None:
    outputs = ("predicted_depth", "confidence")
    metadata = {"image_mean": "[0.1, 0.2, 0.3]", "image_std": "[0.5]", "depth_estimation_type": "relative"}
    path = network(tmp_path / "net.onnx", (14, 28), keepdims=keepdims, outputs=outputs, metadata=metadata)
    image = pixels(20, 30)
    small = np.asarray(Image.fromarray(image).resize((28, 14), Image.Resampling.BICUBIC))
    inverse = expected_output(small, [0.1, 0.2, 0.3], 0.5)
    low, high = np.percentile(inverse, [1, 99])
    nearness = np.clip((inverse - low) / (high - low), 0, 1)
    for options, ratio in (("", 10), (",size=14x28,range=4", 4)):
        depth = OnnxDepth(f"{path}{options}").depth(make_depth_input(image))
        np.testing.assert_allclose(depth, 1 / (1 / ratio + (1 - 1 / ratio) * nearness), rtol=1e-3)
    np.testing.assert_allclose(OnnxDepth(f"{path},metric").depth(make_depth_input(image)), inverse, rtol=1e-4)
    whitened = expected_output(small, [0.1, 0.2, 0.3], [1, 2, 3])
    np.testing.assert_allclose(
        OnnxDepth(f"{path},metric,std=1/2/3").depth(make_depth_input(image)), whitened, rtol=1e-4
    )


NAN = [helper.make_node("Sub", ["pooled", "offset"], ["off"]), helper.make_node("Log", ["off"], ["then"])]
CONSTANT = [helper.make_node("Mul", ["pooled", "zero"], ["then"])]
CLASSES = [helper.make_node("GlobalAveragePool", ["pooled"], ["all"]), helper.make_node("Flatten", ["all"], ["then"])]


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ({}, "", "does not define.*inverse.*metric"),
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
        ({}, "metric,size=14x14,side=14", "size excludes side and multiple"),
        ({"sides": (14, 28)}, "metric,size=14x14", "accepts only 14x28 .*leave size out"),
        ({"sides": (14, 28)}, "metric,side=14", "leave side out"),
        ({"inputs": 2}, "metric", "x0.*; x1.*a depth network has one"),
        ({"outputs": ("y", "z")}, "metric", "has outputs y .*; z "),
        ({"metadata": {"image_std": "0.5"}}, "metric", "image_std is '0.5', expected a list"),
        ({"external": True}, "metric", "net.onnx.*that contains its weights"),
    ],
)
def test_onnx_invalid_file_or_option_raises(made: dict[str, Any], options: str, message: str, tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", **made)
    with pytest.raises(UserError, match=message):
        open_teacher(f"onnx:{path},{options}".rstrip(","), ())


def test_open_teacher_missing_file_or_package_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no protobuf")
    for choice, message in {
        f"onnx:{tmp_path}/net.onnx,metric": "cannot open.*net.onnx",
        f"onnx:{tmp_path}/none.onnx": "none.onnx: it does not exist",
        "onnx": "needs a location",
        "onnx:": "needs a location",
        f"precomputed:{tmp_path}": "contains no file that ends with .png, .npy, .exr",
        f"hf:{tmp_path}/none": "does not exist",
        f"hf:{tmp_path}": "lacks config.json",
    }.items():
        with pytest.raises(UserError, match=message):
            open_teacher(choice, ())
    (tmp_path / "a.exr").touch()
    choices = {"onnx": f"onnx:{network(tmp_path / 'net.onnx')}", "exr": f"precomputed:{tmp_path}"}
    for extra, package in (("onnx", "onnxruntime"), ("exr", "OpenEXR")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"pip install {package}"):
            open_teacher(choices[extra], ())


def test_onnx_teacher_is_identified_by_content_and_pickled_without_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    content, image = network(tmp_path / "net.onnx").read_bytes(), pixels()
    uri = f"memory://{tmp_path.name}-networks/net.onnx"
    with fsspec.open(uri, "wb") as file:
        file.write(content)
    teacher = OnnxDepth(f"{uri},range=5,inverse")
    assert teacher.name == f"onnx-1:{hashlib.sha256(content).hexdigest()[:12]}:inverse,range=5" and not teacher.gpu
    assert teacher.session.get_session_options().intra_op_num_threads == 1
    pickled = pickle.loads(pickle.dumps(teacher))
    fsspec.filesystem("memory").rm(uri)  # this node has a cached copy
    np.testing.assert_array_equal(pickled.depth(make_depth_input(image)), teacher.depth(make_depth_input(image)))
    # A replaced file is detected.
    local = OnnxDepth(f"{tmp_path / 'net.onnx'},inverse")
    pickled = pickle.loads(pickle.dumps(local))
    network(tmp_path / "net.onnx", (14, 14))
    with pytest.raises(DataError, match=r"net\.onnx"):
        pickled.depth(make_depth_input(image))
    assert OnnxDepth(f"{tmp_path / 'net.onnx'},inverse").name != local.name


def test_onnx_with_cuda_needs_a_gpu_from_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = network(tmp_path / "net.onnx")
    teacher = OnnxDepth(f"{path},metric,cuda")
    assert teacher.gpu and teacher.name.endswith(":cuda,metric")
    with pytest.raises(UserError, match=r"onnxruntime-gpu.*leave cuda out"):
        teacher.depth(make_depth_input(pixels()))
    cluster = contextlib.nullcontext(Resources(cpus=2, gpus=0, local=True))
    monkeypatch.setattr(parallel, "connect", lambda: cluster)
    source = open_source("synthetic", train=1, test=0, depth=f"onnx:{path},metric,cuda")
    assert source.teacher.gpu and not open_source("synthetic", depth="own").teacher.gpu
    with pytest.raises(UserError, match="Ray has none"):
        cluster_convert.convert(source, str(tmp_path / "out"))


def write_exr(path: Path, channels: dict[str, Any]) -> None:
    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, channels).write(str(path))


WRITERS: dict[str, Callable[[Path, Map], Any]] = {
    ".png": lambda path, depth: Image.fromarray(depth.astype(np.uint16)).save(path),
    ".npy": lambda path, depth: np.save(path, depth.astype(np.float16)),
    ".exr": lambda path, depth: write_exr(path, {"Z": depth}),
}


def integer_map(height: int, width: int) -> Map:
    """A map of integers, which every file format represents exactly."""
    return np.random.default_rng(width).integers(1, 2000, (height, width)).astype(np.float32)


@pytest.mark.parametrize("ending", WRITERS)
def test_precomputed_maps_are_read_as_written(ending: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        # A third of the image's size, rounded either way, is still the whole image.
        WRITERS[ending](tmp_path / split / f"a{ending}", integer_map(14, 19 if split == "train" else 18))
    teacher = pickle.loads(pickle.dumps(open_teacher(f"precomputed:{tmp_path}", ())))
    for split, width in (("train", 19), ("test", 18)):
        np.testing.assert_array_equal(teacher.depth(make_depth_input(pixels(), split=split)), integer_map(14, width))
    inverse = compute(f"precomputed:{tmp_path},inverse,range=20", make_depth_input(pixels()))
    np.testing.assert_array_equal(inverse, depth_of_inverse(integer_map(14, 19), 20))
    WRITERS[ending](tmp_path / f"b{ending}", integer_map(84, 112))
    flat = compute(f"precomputed:{tmp_path},flat", make_depth_input(pixels(), "b"))
    np.testing.assert_allclose(flat, integer_map(84, 112).reshape(42, 2, 56, 2).mean(axis=(1, 3)), rtol=1e-6)


NPY_OF_A_PETABYTE = b"\x93NUMPY\x01\x00\x76\x00" + (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (16000000, 16000000), }".ljust(117) + b"\n"
)


def test_precomputed_invalid_map_raises(tmp_path: Path) -> None:
    fits, sky = integer_map(42, 56), integer_map(42, 56)
    sky[:4] = np.inf
    cases: dict[str, tuple[Any, str]] = {
        "nan.npy": (np.where(fits > 1900, np.nan, fits), "nan.npy.*NaN or negative at"),
        "negative.npy": (np.where(fits > 1900, -1, fits), "negative.npy.*NaN or negative at"),
        "flat.npy": (np.ones_like(fits), "flat.npy.*is 1 everywhere"),
        "whole.npy": (fits.astype(np.int64), "int64 of shape \\(42, 56\\), expected floats"),
        "objects.npy": (np.array([{}]), "not an array of numbers"),
        "deep.npy": (fits[None], "\\(1, 42, 56\\)"),
        "turned.npy": (fits.T, "56x42 .*its image 42x56"),
        "cropped.npy": (fits[:, :50], "42x50 .*its image 42x56"),
        "eight.png": (Image.fromarray(fits.astype(np.uint8)), "mode L, expected 16-bit grey PNG"),
        "coloured.png": (Image.fromarray(pixels()), "mode RGB, expected"),
        "huge.npy": (NPY_OF_A_PETABYTE, "huge.npy is not an array of numbers"),
        "broken.png": (b"nothing", "broken.png: not an image"),
        "damaged.exr": (b"nothing", "damaged.exr cannot be read"),
        "colours.exr": ({"R": fits, "G": fits, "B": fits}, "channels B, G, R; write depth alone"),
        "both.npy": (fits, "both.png and both.npy"),
        "both.png": (Image.fromarray(fits.astype(np.uint16)), "both.png and both.npy"),
    }
    for name, (content, _) in (cases | {"sky.npy": (sky, "")}).items():
        if isinstance(content, Image.Image):
            content.save(tmp_path / name)
        elif isinstance(content, dict):
            write_exr(tmp_path / name, content)
        elif isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.save(tmp_path / name, content)
    teacher = PrecomputedDepth(f"{tmp_path},flat")
    found = teacher.depth(make_depth_input(pixels(), "sky"))
    np.testing.assert_array_equal(found, np.where(sky < np.inf, sky, sky[4:].max()))
    for name, (_, message) in (cases | {"gone": (None, "contains none of gone.png, gone.npy, gone.exr$")}).items():
        with pytest.raises(DataError, match=message):
            teacher.depth(make_depth_input(pixels(), Path(name).stem))
    with pytest.raises(DataError, match=r"none of train/sky.png.*option flat"):
        PrecomputedDepth(str(tmp_path)).depth(make_depth_input(pixels(), "sky"))
    with pytest.raises(DataError, match="not finite"):
        PrecomputedDepth(f"{tmp_path},flat,inverse").depth(make_depth_input(pixels(), "sky"))
    np.save(tmp_path / "sky.npy", sky + 1)
    assert PrecomputedDepth(f"{tmp_path},flat").name != teacher.name


def test_convert_stores_precomputed_maps(root_uri: str, tmp_path: Path) -> None:
    part = make_shanghaitech(tmp_path / "part_B_final", count=4)
    maps = {f"IMG_{n}": integer_map(HEIGHT, WIDTH) + n for n in range(1, 5)}
    for name, depth in maps.items():
        buffer = io.BytesIO()
        np.save(buffer, depth)
        with fsspec.open(f"{root_uri}/train/{name}.npy", "wb", auto_mkdir=True) as file:
            file.write(buffer.getvalue())
    source = open_source("shanghaitech", str(part), depth=f"precomputed:{root_uri}")
    index = convert(source, str(tmp_path / "out"))
    assert index.depth_teacher == source.teacher.name and index.depth_teacher.startswith("precomputed-1:")
    dataset = Dataset.open(str(tmp_path / "out"))
    for row, depth in enumerate(maps.values()):
        stored = dataset.sample(row).depth
        assert stored is not None
        np.testing.assert_allclose(decode_depth(bytes(stored)), depth / depth.max(), rtol=0, atol=0.5001 / 65535)


def test_convert_with_network_is_reproducible_and_depends_on_the_teacher(tmp_path: Path) -> None:
    source = str(make_shanghaitech(tmp_path / "part_B_final", count=3))
    path = network(tmp_path / "net.onnx")
    choices = ["none", "points", *(f"onnx:{path},side=24,multiple=8{option}" for option in (",metric", ",inverse"))]
    made = [
        [convert(open_source("shanghaitech", source, depth=choice), str(tmp_path / f"{n}-{copy}")) for copy in (0, 1)]
        for n, choice in enumerate(choices)
    ]
    assert all(first == second for first, second in made)
    assert len({index.digest for index, _ in made}) == len({index.depth_teacher for index, _ in made}) == len(choices)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (NAN, "its depth is NaN"),
        (CONSTANT, "its depth is 0 everywhere"),
        (CLASSES, r"returns \(1, 1\), not a map"),
    ],
)
def test_convert_with_failing_network_names_it_and_publishes_nothing(
    then: Sequence[Any], message: str, tmp_path: Path
) -> None:
    source = str(make_shanghaitech(tmp_path / "part_B_final", count=2))
    zero = helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.zeros(1, np.float32)))
    path = network(tmp_path / "net.onnx", then=[zero, *then])
    with pytest.raises(DataError, match=rf"train/IMG_1: onnx-1:[0-9a-f]{{12}}:metric,side=28:? {message}"):
        convert(open_source("shanghaitech", source, depth=f"onnx:{path},metric,side=28"), str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_network_depth_differs_between_frames_of_one_camera(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    source = open_source("mall", str(make_mall(tmp_path / "mall")), depth=f"onnx:{path},metric,side=24,multiple=8")
    pickled = pickle.loads(pickle.dumps(source))
    depths = [pickled.load(item).depth for item in source.items()]
    assert len(set(depths)) == len(depths) == 6 and pickled.teacher.gpu is False
