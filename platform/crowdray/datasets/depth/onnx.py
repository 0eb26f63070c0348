"""Depth from a monocular network in an ONNX file, by way of onnxruntime.

Shape legend: H W image, h w what the network is given, p q what it gives back.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdray import storage
from crowdray.data.sample import decode_image
from crowdray.datasets.depth.inverse import RANGE, depth_map
from crowdray.datasets.depth.options import Arguments, number_from, whole_number
from crowdray.datasets.depth.teacher import DepthTeacher, View
from crowdray.errors import DataError, UserError

SIDE, MULTIPLE = 518, 14
"""Shorter side that an image is given to a network of any size, and what its sides are multiples of: the sizes of
Depth Anything. MiDaS has 384 and 32."""

OPTIONS = {
    "inverse": "",
    "metric": "",
    "range": f"{RANGE:g}",
    "size": "518x686",
    "side": str(SIDE),
    "multiple": str(MULTIPLE),
    "mean": "0.485/0.456/0.406",
    "std": "0.229/0.224/0.225",
    "cuda": "",
}
SIZES = ("size", "side", "multiple")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PREDICTED = "predicted_depth"
"""The output to take where there are several: its name in what is exported from transformers."""

CPU, CUDA = "CPUExecutionProvider", ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "DEFAULT", "use_tf32": "0"})


class Onnx(DepthTeacher):
    """A network that maps RGB (1, 3, h, w), float32 and normalised, to a map (1, p, q) or (1, 1, p, q).

    The file says in its metadata, as a configuration of transformers would, or the options say, what no graph does:
    `image_mean` and `image_std` in [0, 1] (ImageNet's by default), and `depth_estimation_type`, which is `relative` for
    inverse depth and `metric` for depth. The file is pinned by its hash and fetched once per node. One thread computes,
    and sums do not depend on who else does: equal processors give equal bits.
    """

    per_image = True

    def __init__(self, text: str) -> None:
        arguments = Arguments.parse("onnx", text, OPTIONS)
        self._uri = storage.resolve(arguments.place)
        self._sha256, self._bytes = _pinned(self._uri)
        self.name = arguments.identity(1, self._sha256)
        self.gpu = arguments.flag("cuda")
        session = self._open(cuda=False) if self.gpu else self._session
        told = session.get_modelmeta().custom_metadata_map
        self._inverse = _is_inverse(arguments, told, self._uri)
        self._ratio = arguments.value("range", number_from(1), RANGE)
        self._mean, self._std = (_colours(arguments, told, name, self._uri) for name in ("mean", "std"))
        if not (self._std > 0).all():
            raise UserError(f"--depth onnx: std is {self._std.tolist()} for {self._uri}; give numbers above 0")
        self._input, self._output = _layout(session, self._uri)
        self._size = self._given_size(arguments, session.get_inputs()[0].shape[2:])
        self._side = arguments.value("side", whole_number, SIDE)
        self._multiple = arguments.value("multiple", whole_number, MULTIPLE)

    def depth(self, view: View) -> NDArray[np.float32]:
        """The network's depth at its own resolution, at most the image's; a DataError when it fails or is no depth."""
        height, width = self._size or self._fitting(view)
        pixels = Image.fromarray(decode_image(view.image)).resize((width, height), Image.Resampling.BICUBIC)
        values = (np.asarray(pixels, dtype=np.float32) / np.float32(255) - self._mean) / self._std
        session = self._session
        try:
            found = session.run([self._output], {self._input: values.transpose(2, 0, 1)[None].copy()})[0]
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise DataError(
                f"{self.name} fails on {height}x{width} (HxW): {_first_line(error)}; "
                "if it takes multiples of 32 alone, give multiple=32"
            ) from error
        if not (found.ndim in (3, 4) and set(found.shape[:-2]) == {1}):
            raise DataError(f"{self.name} gives {found.shape}, no map (1, height, width); give a depth network")
        try:
            return depth_map(found.reshape(found.shape[-2:]), view, inverse=self._inverse, ratio=self._ratio)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # A session cannot travel; each process opens its own when it is first asked.
        return {key: value for key, value in vars(self).items() if key != "_session"}

    @cached_property
    def _session(self) -> Any:
        return self._open(cuda=self.gpu)

    def _open(self, *, cuda: bool) -> Any:
        runtime = _onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # Ray runs as many of us as there are CPUs
        options.use_deterministic_compute = True
        options.log_severity_level = 4  # its errors come as exceptions too
        if cuda and CUDA[0] not in runtime.get_available_providers():
            raise UserError(
                f"--depth {self.name}: onnxruntime has {', '.join(runtime.get_available_providers())} here; install "
                "onnxruntime-gpu in its place, or leave cuda out"
            )
        # Bytes, not the file's name: weights in a second file would be no part of the hash, and are refused so.
        content = storage.fetch(self._uri, sha256=self._sha256, size=self._bytes).read_bytes()
        try:
            session = runtime.InferenceSession(content, options, providers=[CUDA, CPU] if cuda else [CPU])
        except Exception as error:
            raise UserError(
                f"onnxruntime cannot open {self._uri} ({_first_line(error)}); give an ONNX file that holds its weights"
            ) from error
        if cuda and session.get_providers()[0] != CUDA[0]:
            raise UserError(f"--depth {self.name}: onnxruntime found no usable GPU; free one, or leave cuda out")
        return session

    def _given_size(self, arguments: Arguments, fixed: Sequence[Any]) -> tuple[int, int] | None:
        """(h, w) for every image, from the file or from `size`; None when each image has its own."""
        asked = arguments.value("size", _size, None)
        if asked and (arguments.flag("side") or arguments.flag("multiple")):
            raise UserError("--depth onnx: size says all; leave side and multiple out")
        if not any(isinstance(side, int) for side in fixed):
            return asked
        if not all(isinstance(side, int) for side in fixed):
            raise UserError(f"{self._uri} fixes one side of its input, {fixed} (HxW), not the other; fix both or none")
        size = (int(fixed[0]), int(fixed[1]))
        given = [option for option in SIZES if arguments.flag(option)]
        if given and asked != size:
            raise UserError(f"{self._uri} takes {size[0]}x{size[1]} (HxW) alone; leave {', '.join(given)} out")
        return size

    def _fitting(self, view: View) -> tuple[int, int]:
        """(h, w) with the image's shape: its shorter side as asked for, both rounded to multiples."""
        scale = self._side / min(view.height, view.width) / self._multiple
        height, width = (max(1, round(side * scale)) * self._multiple for side in (view.height, view.width))
        return height, width


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("--depth onnx needs the package onnxruntime: pip install 'crowdray[onnx]'") from error
    return onnxruntime


def _pinned(uri: str) -> tuple[str, int]:
    """The sha256 of a file and its size in bytes, read in pieces."""
    with storage.open_read(uri) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return digest, file.seek(0, 2)


def _layout(session: Any, uri: str) -> tuple[str, str]:
    """Names of the input and the output; a UserError when they are not those of a depth network."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(shape) != 4 or not _may_be(shape[:2], (1, 3)):
        told = "; ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs)
        raise UserError(f"{uri} takes {told}; a depth network takes one image, tensor(float) [1, 3, height, width]")
    maps = [one for one in outputs if one.name == PREDICTED] or outputs
    shape = maps[0].shape
    ranks = (3, 4) if shape else (0,)  # a graph need not say the shape of what it gives
    if len(maps) != 1 or len(shape) not in ranks or not _may_be(shape[:-2], (1, 1)):
        told = "; ".join(f"{one.name} {one.shape}" for one in outputs)
        raise UserError(f"{uri} gives {told}; a depth network gives a map [1, height, width], one or {PREDICTED}")
    return inputs[0].name, maps[0].name


def _may_be(shape: Sequence[Any], expected: Sequence[int]) -> bool:
    """Whether sides that the file fixes are the expected ones; the others are names, or None."""
    return all(not isinstance(side, int) or side == wanted for side, wanted in zip(shape, expected, strict=False))


def _is_inverse(arguments: Arguments, told: dict[str, str], uri: str) -> bool:
    inverse = arguments.inverse()
    if inverse is None:
        inverse = {"relative": True, "metric": False}.get(told.get("depth_estimation_type", ""))
    if inverse is None:
        raise UserError(
            f"{uri} does not say in depth_estimation_type which way its depth runs; add ,inverse (larger is nearer: "
            "MiDaS, Depth Anything) or ,metric (larger is farther)"
        )
    return inverse


def _colours(arguments: Arguments, told: dict[str, str], name: str, uri: str) -> NDArray[np.float32]:
    """(3,) numbers for red, green and blue: from the option, else from the file, else ImageNet's."""
    text = told.get(f"image_{name}")
    if arguments.flag(name) or text is None:
        return arguments.value(name, lambda value: _rgb(value.split("/")), _rgb(IMAGENET[name]))
    try:
        return _rgb(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{uri}: image_{name} is {text!r}, not like [0.5, 0.5, 0.5]; give {name}= instead") from error


def _rgb(numbers: Sequence[str | float]) -> NDArray[np.float32]:
    colours = np.array([float(number) for number in numbers], dtype=np.float32)
    if colours.size not in (1, 3) or not np.isfinite(colours).all():
        raise ValueError("it must be one number or three")
    return np.broadcast_to(colours, 3).copy()


def _size(text: str) -> tuple[int, int]:
    height, width = (whole_number(part) for part in text.split("x"))
    return height, width


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
