"""Published weights of encoders, from any URI, checked against their hash; nothing in a file is run."""

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from crowdray import storage
from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.models.counter import Counter


def pin_weights(config: Config) -> Config:
    """The configuration with the absolute URI of its published weights and their hash: workers start elsewhere, and one
    configuration names one content."""
    model = config.model
    if not model.weights:
        return config
    digest = model.weights_sha256 or hashlib.sha256(storage.read_bytes(model.weights)).hexdigest()
    return replace(config, model=replace(model, weights=storage.resolve(model.weights), weights_sha256=digest))


def load_pretrained(counter: Counter, config: Config) -> None:
    """Give a fresh counter the published weights that its configuration names, if it names any.

    Raises UserError for a file that is not there, has another hash, is no file of tensors, or does not fit; the counter
    is then as it was.
    """
    place, expected = config.model.weights, config.model.weights_sha256
    if not place:
        return
    content = storage.read_bytes(place)
    digest = hashlib.sha256(content).hexdigest()
    if expected and digest != expected:
        raise UserError(
            f"{place} has the SHA-256 {digest}, model.weights_sha256 is {expected}; fetch it again, or give its hash"
        )
    counter.encoder.load_pretrained(_tensors(content, place), place)


def _tensors(content: bytes, place: str) -> Mapping[str, Tensor]:
    try:
        if place.endswith(".safetensors"):
            return load(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if isinstance(loaded, Mapping) and all(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
        problem = "it holds something else"
    except pickle.UnpicklingError:  # torch's own words advise to run what is in it
        problem = "it holds something else"
    except (SafetensorError, RuntimeError, EOFError) as error:
        problem = (str(error) or "it is empty").splitlines()[0]
    raise UserError(f"{place} is no file of named tensors ({problem}); give a .safetensors or a .pth state dict")
