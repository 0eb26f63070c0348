"""Depth from a network of transformers: a name on the Hugging Face hub, or a folder that save_pretrained left."""

import contextlib
import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdray import storage
from crowdray.data.sample import decode_image
from crowdray.datasets.depth.inverse import RANGE, depth_map
from crowdray.datasets.depth.options import Arguments, number_from
from crowdray.datasets.depth.teacher import DepthTeacher, View
from crowdray.errors import DataError, UserError

OPTIONS = {"inverse": "", "metric": "", "range": f"{RANGE:g}", "cuda": ""}
FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
"""All that is read of a model, and hashed; nothing in it is run."""

INVERSE = {"dpt": True, "glpn": False, "zoedepth": False, "depth_pro": False}
"""Whether larger is nearer for types of models whose configuration does not say it."""


class Hub(DepthTeacher):
    """A model for depth estimation, computed in float32 by one thread, with images prepared by Pillow.

    Whether it gives depth or inverse depth is told by its configuration's `depth_estimation_type` (Depth Anything), or
    by its type: GLPN, ZoeDepth and Depth Pro give depth, DPT gives MiDaS' inverse depth. On a DINOv2 backbone DPT was
    published with heads for depth: there, and for other types, the options must say it.
    """

    per_image = True

    def __init__(self, text: str) -> None:
        arguments = Arguments.parse("hf", text, OPTIONS)
        self.gpu = arguments.flag("cuda")
        self._ratio = arguments.value("range", number_from(1), RANGE)
        self._model, self._commit = arguments.place, ""
        folder = Path(arguments.place).expanduser()
        if folder.is_dir():
            self._model = str(folder.absolute())
        elif arguments.place.startswith((".", "/", "~")):
            raise UserError(f"--depth hf: there is no folder {arguments.place}; check the path")
        else:
            folder = self._folder()
            self._commit = folder.name
        self._sha256 = _digest(folder)
        self.name = arguments.identity(1, self._sha256)
        self._inverse = _is_inverse(arguments, folder)

    def depth(self, view: View) -> NDArray[np.float32]:
        """The model's depth at its own resolution, at most the image's; a DataError when it fails or is no depth."""
        processor, network = self._loaded
        image = Image.fromarray(decode_image(view.image))
        # Only ZoeDepth needs the image's size to take its padding off; the others would resize and so overshoot.
        sizes = {"source_sizes": [(view.height, view.width)]} if network.config.model_type == "zoedepth" else {}
        try:
            with _repeatable():
                inputs = processor(images=image, return_tensors="pt").to(network.device)
                found = processor.post_process_depth_estimation(network(**inputs), **sizes)[0]["predicted_depth"]
        except Exception as error:  # a model's own code may raise anything
            raise DataError(f"{self.name} fails: {type(error).__name__}: {error}") from error
        try:
            return depth_map(found.float().cpu().numpy(), view, inverse=self._inverse, ratio=self._ratio)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # Weights do not travel; each process loads its own when it is first asked.
        return {key: value for key, value in vars(self).items() if key != "_loaded"}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The image processor and the network, of the very content that gave the name."""
        import torch

        if self.gpu and not torch.cuda.is_available():
            raise UserError(f"--depth {self.name}: torch found no GPU here; free one, or leave cuda out")
        library, folder = _transformers(), self._folder()
        if _digest(folder) != self._sha256:
            raise UserError(f"{folder} is not what it was when the conversion began; convert again, on equal folders")
        try:
            # Of the two ways to prepare images this one needs no torchvision, and is the same with it.
            processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil")
            network, report = library.AutoModelForDepthEstimation.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(f"transformers cannot load {self._model}: {error}") from error
        if report["missing_keys"]:
            raise UserError(f"{self._model} lacks weights, such as {min(report['missing_keys'])}; fetch it again")
        return processor, network.eval().to("cuda" if self.gpu else "cpu")

    def _folder(self) -> Path:
        """The folder itself, or this node's copy of the model on the hub, fetched once."""
        if Path(self._model).is_absolute():
            return Path(self._model)
        _transformers()
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self._model, revision=self._commit or None, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            raise UserError(f"--depth hf: cannot fetch {self._model}: {error}; give its name, or a folder") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("--depth hf needs the package transformers: pip install 'crowdray[hf]'") from error
    library: Any = transformers
    library.utils.logging.disable_progress_bar()  # ours is on the screen
    return library


def _digest(folder: Path) -> str:
    """The sha256 over names and contents of all files that make the model."""
    files = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    if not {"config.json", "preprocessor_config.json"} <= {path.name for path in files} or not any(
        path.suffix == ".safetensors" for path in files
    ):
        raise UserError(f"{folder} holds no model: it lacks config.json, preprocessor_config.json or *.safetensors")
    told = [(path.name, storage.hash_file(path)) for path in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _is_inverse(arguments: Arguments, folder: Path) -> bool:
    """Whether larger is nearer; a UserError for a model that estimates no depth or does not say which way it runs."""
    library = _transformers()
    try:
        config = library.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    if type(config) not in library.MODEL_FOR_DEPTH_ESTIMATION_MAPPING:
        raise UserError(f"{arguments.place} is a {config.model_type}, which estimates no depth; give another model")
    inverse = arguments.inverse()
    if inverse is None:
        inverse = {"relative": True, "metric": False}.get(getattr(config, "depth_estimation_type", ""))
    if inverse is None:
        backbone = getattr(getattr(config, "backbone_config", None), "model_type", "")
        kind = config.model_type if backbone != "dinov2" else "dpt on dinov2"
        inverse = INVERSE.get(kind)
    if inverse is None:
        raise UserError(
            f"{arguments.place} ({kind}) does not say which way its depth runs; add ,inverse (larger is nearer) or "
            ",metric (larger is farther)"
        )
    return inverse


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """One thread, since Ray runs as many of us as there are CPUs; the same sums each time; no gradients."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            yield
    finally:
        torch.set_num_threads(threads)
