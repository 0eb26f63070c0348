"""Warm start: training from the weights of a packaged counter, which the driver stores where all workers read them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from crowdray import storage
from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter, weights_digest
from crowdray.models.initial import InitialWeights
from crowdray.registry.loading import LoadedCounter, load_counter, resolve_uri
from crowdray.registry.packaging import same_density

_PREFIX = "counter."
"""Start of the names of a counter's tensors in its package."""


def pin_init(config: Config, folder: str, tracking_uri: str | None) -> tuple[Config, str]:
    """Store the weights of the counter that model.init names, and record its resolved URI and their hash.

    Args:
        folder: Folder or URI that all workers read; the file's name in it is the hash.
        tracking_uri: MLflow server or database of models:/ and runs:/.

    Returns:
        The configuration, and the URI of the file; "" without model.init.

    Raises:
        UserError: The counter does not exist, does not fit the configuration, or has another hash than the recorded.
    """
    model = config.model
    if not model.init:
        return config, ""
    uri = resolve_uri(model.init, tracking_uri)
    package = load_counter(uri, tracking_uri=tracking_uri)
    weights, digest = extract_weights(package, config, uri)
    if model.init_sha256 not in ("", digest):
        raise UserError(
            f"{uri} has weights of SHA-256 {digest}, but model.init_sha256 is {model.init_sha256}; give the counter "
            "that was recorded, or --init for another one"
        )
    file = storage.join(storage.resolve(folder), "initial", f"{digest}.safetensors")
    storage.write_bytes(file, weights.to_bytes())
    return replace(config, model=replace(model, init=uri, init_sha256=digest)), file


def read_init(file: str) -> InitialWeights | None:
    """Read a file that `pin_init` stored; None for ""."""
    return InitialWeights.from_bytes(storage.read_bytes(file), file) if file else None


def extract_weights(package: LoadedCounter, config: Config, uri: str) -> tuple[InitialWeights, str]:
    """Return a packaged counter's weights and their hash, for a counter of the configuration.

    Raises:
        UserError: The configuration's counter has other tensors, or predicts another density with these.
    """
    tensors = {name.removeprefix(_PREFIX): value for name, value in package.graph.state_dict().items()}
    weights = InitialWeights(tensors, _density_scale(package.graph, uri), uri)
    counter = build_counter(config, weights.density_scale).eval()
    if mismatches := weights.mismatches(counter):
        raise UserError(
            f"{uri} does not fit the configuration{_backbones(package.metadata, config)}; tensors {mismatches}"
        )
    counter.strip().load_state_dict(tensors)
    exported = ExportedCounter(counter, package.geometry.downsample).eval()
    image = torch.randint(0, 256, (1, 3, 128, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        density = exported(image)
    if not same_density(package(image), density):
        raise UserError(
            f"{uri} does not fit the configuration{_backbones(package.metadata, config)}: its weights predict another "
            "density there; use the backbone's code with which it was trained"
        )
    return weights, weights_digest(exported)


def _backbones(metadata: Mapping[str, Any], config: Config) -> str:
    """Say which backbones differ, if they do."""
    own = recorded = config.model.backbone
    with suppress(KeyError, TypeError):
        recorded = str(metadata["config"]["model"]["backbone"])
    fix = f" (this counter has backbone {recorded}, the configuration {own}: give --model.backbone {recorded})"
    return fix if recorded != own else ""


def _density_scale(graph: nn.Module, uri: str) -> float:
    """The divisor of the exported program's last operation, which turns the decoder's output into heads per cell."""
    *_, last, _ = graph.graph.nodes  # type: ignore[union-attr, misc]
    divisor = last.args[1] if last.target is torch.ops.aten.div.Tensor else None
    if not isinstance(divisor, float | int) or divisor <= 0:
        raise UserError(f"{uri} does not end in the division by its density scale; give a counter of this version")
    return float(divisor)
