"""Pretrained encoder weights from any URI, checked against their hash; no code in a file is executed."""

import hashlib
import importlib.resources
import io
import pickle
from collections.abc import Mapping
from dataclasses import replace

import torch
from safetensors.torch import load
from torch import Tensor

from crowdray import storage
from crowdray.config import IMAGENET, Config
from crowdray.errors import UserError, missing_package
from crowdray.models.build import backbone_class
from crowdray.models.counter import Counter


def pin_weights(config: Config) -> Config:
    """Record the absolute URI and the hash of the pretrained weights in the configuration.

    Workers have other working directories, and equal configurations must mean equal weights. IMAGENET stays as it is:
    each node has its own copy of the package.
    """
    model = config.model
    if not model.weights:
        return config
    uri = _weights_uri(config)
    digest = model.weights_sha256 or hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    recorded = IMAGENET if model.weights == IMAGENET else uri
    return replace(config, model=replace(model, weights=recorded, weights_sha256=digest))


def load_pretrained(counter: Counter, config: Config) -> None:
    """Load the configured pretrained weights, if any, into a new counter.

    Raises:
        UserError: If the file is missing, has another hash, does not contain tensors, or does not fit the encoder; the
            counter is unchanged then.
    """
    if not config.model.weights:
        return
    uri, expected = _weights_uri(config), config.model.weights_sha256
    content = storage.read_bytes(uri)
    digest = hashlib.sha256(content).hexdigest()
    if expected and digest != expected:
        raise UserError(
            f"{uri} has SHA-256 {digest}, but model.weights_sha256 is {expected}; download it again or correct the hash"
        )
    counter.encoder.load_pretrained(_parse_tensors(content, uri), uri)


def _weights_uri(config: Config) -> str:
    """Absolute URI of the configured weights."""
    uri, backbone = config.model.weights, backbone_class(config)
    if uri != IMAGENET:
        return storage.resolve(uri)
    if not backbone.imagenet_package:
        raise UserError(
            f"model.weights is {IMAGENET}, but no package has ImageNet weights of {backbone.__name__}; give the path "
            "or URI of a file, or --model.weights '' for a random initialization"
        )
    try:
        folder = importlib.resources.files(backbone.imagenet_package) / "models"
    except ModuleNotFoundError as error:
        raise UserError(f"model.weights is {IMAGENET}: {missing_package(error)}") from error
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(".pth"):
            return str(file)
    raise UserError(f"model.weights is {IMAGENET}, but {folder} has no .pth file; give the path or URI of a file")


def _parse_tensors(content: bytes, uri: str) -> Mapping[str, Tensor]:
    try:
        if uri.endswith(".safetensors"):
            return load(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if isinstance(loaded, Mapping) and all(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
        problem = "it contains other objects"
    except pickle.UnpicklingError:  # torch's message recommends weights_only=False, which executes code
        problem = "it contains other objects"
    except Exception as error:  # the content is data: whatever its parser raises is about the file
        problem = (str(error) or "it is empty").splitlines()[0]
    raise UserError(f"{uri} is not a file of named tensors ({problem}); give a .safetensors or .pth state dict")
