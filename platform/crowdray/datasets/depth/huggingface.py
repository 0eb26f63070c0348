"""Depth from a model of transformers, on the Hugging Face hub or in a local folder."""

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
from crowdray.data.decoding import decode_image
from crowdray.datasets.depth.inverse import RANGE, depth_map
from crowdray.datasets.depth.options import IS_INVERSE, TeacherOptions
from crowdray.datasets.depth.teacher import DepthInput, DepthTeacher
from crowdray.datasets.extras import import_extra
from crowdray.errors import DataError, UserError, missing_package

OPTIONS = {"inverse": "", "metric": "", "range": f"{RANGE:g}", "cuda": ""}
FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
"""Files of a model that are read and hashed; no code in it is run."""

INVERSE = {"dpt": True, "glpn": False, "zoedepth": False, "depth_pro": False}
"""Whether larger is nearer, for model types whose configuration does not say it."""


class HuggingFaceDepth(DepthTeacher):
    """A depth estimation model, run in float32 by a single thread, with images prepared by Pillow.

    Whether it predicts depth or inverse depth follows from `depth_estimation_type` in its configuration (Depth
    Anything) or from its type: GLPN, ZoeDepth and Depth Pro predict depth, DPT predicts MiDaS' inverse depth. DPT on a
    DINOv2 backbone exists with depth heads too: for it and for other types, an option must say it.
    """

    per_image = True

    def __init__(self, text: str) -> None:
        options = TeacherOptions.parse("hf", text, OPTIONS)
        self.gpu = options.flag("cuda")
        self._ratio = options.ratio()
        self._model, self._commit = options.location, ""
        folder = Path(options.location).expanduser()
        if folder.is_dir():
            self._model = str(folder.absolute())
        elif options.location.startswith((".", "/", "~")):
            raise UserError(f"--depth hf: the folder {options.location} does not exist; check the path")
        else:
            folder = self._folder()
            self._commit = folder.name
        self._sha256 = _digest(folder)
        self.name = options.identity(1, self._sha256)
        self._inverse = _is_inverse(options, folder)

    def depth(self, inputs: DepthInput) -> NDArray[np.float32]:
        """Depth at the model's resolution, at most the image's; DataError if the model fails."""
        processor, network = self._loaded
        sample = inputs.sample
        image = Image.fromarray(decode_image(sample.image))
        # Only ZoeDepth needs the image's size, to remove its padding; other models would resize with overshoot.
        sizes = {"source_sizes": [(sample.height, sample.width)]} if network.config.model_type == "zoedepth" else {}
        try:
            with deterministic_inference():
                tensors = processor(images=image, return_tensors="pt").to(network.device)
                found = processor.post_process_depth_estimation(network(**tensors), **sizes)[0]["predicted_depth"]
        except ImportError as error:
            raise UserError(f"--depth {self.name} cannot be used: {missing_package(error)}") from error
        except Exception as error:  # a model's own code may raise anything
            raise DataError(f"{self.name} fails: {type(error).__name__}: {error}") from error
        values = found.float().cpu().numpy()
        return depth_map(values, sample, self.name, inverse=self._inverse, ratio=self._ratio)

    def __getstate__(self) -> dict[str, Any]:
        # Weights are not pickled; each process loads its own on first use.
        return {key: value for key, value in vars(self).items() if key != "_loaded"}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The image processor and the network, verified against the hash in the teacher's name."""
        import torch

        if self.gpu and not torch.cuda.is_available():
            raise UserError(f"--depth {self.name}: torch finds no GPU; free one, or leave cuda out")
        library, folder = _transformers(), self._folder()
        if _digest(folder) != self._sha256:
            raise UserError(f"{folder} changed during the conversion, or differs between nodes; convert again")
        try:
            # The Pillow backend does not need torchvision, and its result is the same.
            processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil")
            network, report = library.AutoModelForDepthEstimation.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
        except ImportError as error:
            raise UserError(f"--depth {self.name} cannot be used: {missing_package(error)}") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"transformers cannot load {self._model}: {error}") from error
        if report["missing_keys"]:
            raise UserError(f"{self._model} lacks weights, such as {min(report['missing_keys'])}; download it again")
        return processor, network.eval().to("cuda" if self.gpu else "cpu")

    def _folder(self) -> Path:
        """The given folder, or this node's cached copy of the model on the hub."""
        if Path(self._model).is_absolute():
            return Path(self._model)
        _transformers()
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self._model, revision=self._commit or None, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            raise UserError(f"--depth hf: cannot download {self._model}: {error}; check its name") from error


def _transformers() -> Any:
    library = import_extra("transformers", "--depth hf")
    library.utils.logging.disable_progress_bar()  # the conversion shows its own
    return library


def _digest(folder: Path) -> str:
    """sha256 over names and contents of all files of the model."""
    files = sorted({path for pattern in FILES for path in folder.glob(pattern)})
    if not {"config.json", "preprocessor_config.json"} <= {path.name for path in files} or not any(
        path.suffix == ".safetensors" for path in files
    ):
        raise UserError(f"{folder} lacks config.json, preprocessor_config.json or *.safetensors; check --depth")
    hashes = [(path.name, storage.hash_file(path)) for path in files]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def _is_inverse(options: TeacherOptions, folder: Path) -> bool:
    """Whether larger is nearer; UserError if the model does not estimate depth or does not say."""
    library = _transformers()
    try:
        config = library.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    if type(config) not in library.MODEL_FOR_DEPTH_ESTIMATION_MAPPING:
        raise UserError(f"{options.location} is a {config.model_type}, which does not estimate depth; use another")
    backbone = getattr(getattr(config, "backbone_config", None), "model_type", "")
    kind = config.model_type if backbone != "dinov2" else "dpt on dinov2"
    known = IS_INVERSE.get(getattr(config, "depth_estimation_type", ""), INVERSE.get(kind))
    return options.inverse(known, f"{options.location} ({kind})")


@contextlib.contextmanager
def deterministic_inference() -> Iterator[None]:
    """Context of a single thread, deterministic kernels and no gradients.

    Ray runs one task per CPU, so more threads would compete.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            yield
    finally:
        torch.set_num_threads(threads)
