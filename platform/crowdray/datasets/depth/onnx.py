"""Depth from a monocular network in an ONNX file, computed by onnxruntime.

Shape legend: H W image, h w network input, p q network output.
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
from crowdray.data.decoding import decode_image
from crowdray.data.sample import Sample
from crowdray.datasets.depth.inverse import RANGE, depth_map
from crowdray.datasets.depth.options import IS_INVERSE, TeacherOptions, positive_int
from crowdray.datasets.depth.teacher import DepthInput, DepthTeacher
from crowdray.datasets.extras import import_extra
from crowdray.errors import DataError, UserError

SIDE, MULTIPLE = 518, 14
"""Shorter side of the input of a network of any size, and what its sides are multiples of, as for Depth Anything.
MiDaS uses 384 and 32."""

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
"""The output to use if there are several: its name in exports from transformers."""

CPU, CUDA = "CPUExecutionProvider", ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "DEFAULT", "use_tf32": "0"})


class OnnxDepth(DepthTeacher):
    """A network that maps RGB (1, 3, h, w), float32 and normalised, to a map (1, p, q) or (1, 1, p, q).

    What the graph does not say comes from the file's metadata, named as in a configuration of transformers, or from
    the options: `image_mean` and `image_std` in [0, 1] (default: ImageNet's), and `depth_estimation_type`, `relative`
    for inverse depth or `metric` for depth. The file is verified by its hash and fetched once per node. A single thread
    computes each map, so equal processors return equal bits.
    """

    per_image = True

    def __init__(self, text: str) -> None:
        options = TeacherOptions.parse("onnx", text, OPTIONS)
        self._uri = storage.resolve(options.location)
        self._sha256, self._bytes = _hash_and_size(self._uri)
        self.name = options.identity(1, self._sha256)
        self.gpu = options.flag("cuda")
        session = self._open(cuda=False) if self.gpu else self.session
        metadata = session.get_modelmeta().custom_metadata_map
        self._inverse = options.inverse(IS_INVERSE.get(metadata.get("depth_estimation_type", "")), self._uri)
        self._ratio = options.ratio()
        self._mean, self._std = (_channels(options, metadata, name, self._uri) for name in ("mean", "std"))
        if not (self._std > 0).all():
            raise UserError(f"--depth onnx: std is {self._std.tolist()} for {self._uri}; give numbers above 0")
        self._input, self._output = _layout(session, self._uri)
        self._size = self._given_size(options, session.get_inputs()[0].shape[2:])
        self._side = options.value("side", positive_int, SIDE)
        self._multiple = options.value("multiple", positive_int, MULTIPLE)

    def depth(self, inputs: DepthInput) -> NDArray[np.float32]:
        """Depth at the network's resolution, at most the image's; DataError if the network fails."""
        height, width = self._size or self._input_size(inputs.sample)
        pixels = Image.fromarray(decode_image(inputs.sample.image)).resize((width, height), Image.Resampling.BICUBIC)
        values = (np.asarray(pixels, dtype=np.float32) / np.float32(255) - self._mean) / self._std
        session = self.session
        try:
            found = session.run([self._output], {self._input: values.transpose(2, 0, 1)[None].copy()})[0]
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise DataError(
                f"{self.name} fails on {height}x{width} (HxW): {_first_line(error)}; "
                "if it accepts only multiples of 32, give multiple=32"
            ) from error
        if not (found.ndim in (3, 4) and set(found.shape[:-2]) == {1}):
            raise DataError(f"{self.name} returns {found.shape}, not a map (1, height, width); give a depth network")
        values = found.reshape(found.shape[-2:])
        return depth_map(values, inputs.sample, self.name, inverse=self._inverse, ratio=self._ratio)

    def __getstate__(self) -> dict[str, Any]:
        # A session cannot be pickled; each process opens its own on first use.
        return {key: value for key, value in vars(self).items() if key != "session"}

    @cached_property
    def session(self) -> Any:
        """This process's onnxruntime session, opened on first use."""
        return self._open(cuda=self.gpu)

    def _open(self, *, cuda: bool) -> Any:
        runtime = import_extra("onnxruntime", "--depth onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # Ray runs one task per CPU
        options.use_deterministic_compute = True
        options.log_severity_level = 4  # errors are raised as exceptions anyway
        if cuda and CUDA[0] not in runtime.get_available_providers():
            raise UserError(
                f"--depth {self.name}: onnxruntime provides {', '.join(runtime.get_available_providers())}; "
                "install onnxruntime-gpu instead, or leave cuda out"
            )
        # Content instead of a path: weights in a second file would escape the hash, and are refused this way.
        content = storage.fetch(self._uri, sha256=self._sha256, size=self._bytes).read_bytes()
        try:
            session = runtime.InferenceSession(content, options, providers=[CUDA, CPU] if cuda else [CPU])
        except Exception as error:
            raise UserError(
                f"onnxruntime cannot open {self._uri} ({_first_line(error)}); give a file that contains its weights"
            ) from error
        if cuda and session.get_providers()[0] != CUDA[0]:
            raise UserError(f"--depth {self.name}: onnxruntime found no usable GPU; free one, or leave cuda out")
        return session

    def _given_size(self, options: TeacherOptions, fixed: Sequence[Any]) -> tuple[int, int] | None:
        """(h, w) of the input, fixed by the file or by `size`; None if it depends on the image."""
        requested = options.value("size", _size, None)
        if requested and (options.flag("side") or options.flag("multiple")):
            raise UserError("--depth onnx: size excludes side and multiple; leave them out")
        if not all(isinstance(side, int) for side in fixed):
            return requested
        size = (int(fixed[0]), int(fixed[1]))
        given = [option for option in SIZES if options.flag(option)]
        if given and requested != size:
            raise UserError(f"{self._uri} accepts only {size[0]}x{size[1]} (HxW); leave {', '.join(given)} out")
        return size

    def _input_size(self, sample: Sample) -> tuple[int, int]:
        """(h, w) with the image's aspect ratio: the shorter side as configured, both rounded to multiples."""
        scale = self._side / min(sample.height, sample.width) / self._multiple
        height, width = (max(1, round(side * scale)) * self._multiple for side in (sample.height, sample.width))
        return height, width


def _hash_and_size(uri: str) -> tuple[str, int]:
    """sha256 of a file and its size in bytes."""
    with storage.open_read(uri) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return digest, file.seek(0, 2)


def _layout(session: Any, uri: str) -> tuple[str, str]:
    """Names of input and output; UserError if they are not those of a depth network."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = "; ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs)
        raise UserError(f"{uri} has inputs {found}; a depth network has one, tensor(float) [1, 3, height, width]")
    maps = [one for one in outputs if one.name == PREDICTED] or outputs
    if len(maps) != 1:
        found = "; ".join(f"{one.name} {one.shape}" for one in outputs)
        raise UserError(f"{uri} has outputs {found}; give a network with one map [1, height, width] or {PREDICTED}")
    return inputs[0].name, maps[0].name


def _channels(options: TeacherOptions, metadata: dict[str, str], name: str, uri: str) -> NDArray[np.float32]:
    """(3,) numbers for red, green and blue: from the option, else the file, else ImageNet's."""
    text = metadata.get(f"image_{name}")
    if options.flag(name) or text is None:
        return options.value(name, lambda value: _rgb(value.split("/")), _rgb(IMAGENET[name]))
    try:
        return _rgb(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{uri}: image_{name} is {text!r}, expected a list of numbers; set {name}= instead") from error


def _rgb(numbers: Sequence[str | float]) -> NDArray[np.float32]:
    colours = np.array([float(number) for number in numbers], dtype=np.float32)
    if colours.size not in (1, 3) or not np.isfinite(colours).all():
        raise ValueError("it must be one number or three")
    return np.broadcast_to(colours, 3).copy()


def _size(text: str) -> tuple[int, int]:
    height, width = (positive_int(part) for part in text.split("x"))
    return height, width


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
