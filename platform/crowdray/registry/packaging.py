"""Packaging of a counter: an exported graph in MLflow's format that loads without crowdray and without pickle.

Shape legend: B batch, H W image, h w density (H and W divided by the side of a cell).
"""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from crowdray.errors import UserError
from crowdray.models.export import ExportedCounter, weights_digest
from crowdray.registry.connection import configure_mlflow, silence_mlflow
from crowdray.registry.interval import INTERVAL, CountInterval
from crowdray.registry.loading import LoadedCounter, load_counter
from crowdray.registry.training_data import TRAINING_DATA, TrainingData

# Batch and sizes of test images: larger and smaller than the example, odd, multiples of 4 and of 16.
_PROBES = ((1, 64, 64), (3, 50, 97), (2, 33, 132), (1, 128, 81))
_EXAMPLE_SIDES = (64, 84)


@dataclass(frozen=True, eq=False)
class Package:
    """A counter exported to a local folder, and verified to return the same density there."""

    path: Path
    """Folder in MLflow's model format: `mlflow.pytorch.load_model(path)` opens it."""
    weights: str
    """sha256 over the names, shapes and values of all parameters and buffers."""
    parameters: int
    """Number of parameters."""
    metrics: Mapping[str, float]
    """Metrics of the counter in heads, such as "val/mae" and "test/rmse"."""
    tags: Mapping[str, str]
    """Provenance: data digest, dataset URI, git revision."""
    example: Tensor
    """Input example, uint8 (2, 3, H, W) RGB."""
    density: Tensor
    """Density of the example from the original counter, float32 (2, 1, h, w)."""


def package_counter(
    counter: ExportedCounter,
    example: Tensor,
    dest: Path,
    *,
    config: Mapping[str, object],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    training_data: TrainingData | None = None,
    interval: CountInterval | None = None,
) -> Package:
    """Export a copy of a counter to the new folder `dest` in MLflow's format and verify the export.

    The export accepts any batch, height and width, and uint8 as well as float32. The metadata contains the config,
    metrics, tags and the counter's geometry, and what else is given.

    Args:
        example: uint8 or float RGB (B, 3, H, W), 0..255; the center of its first image becomes the input example.
        training_data: What the counter was trained on, to recognise photos unlike that.
        interval: Interval around its counts.

    Raises:
        UserError: The counter cannot be exported; nothing is written then.
    """
    module = copy.deepcopy(counter).cpu().eval()
    example = _input_example(example)
    records = {TRAINING_DATA: training_data, INTERVAL: interval}
    metadata = {
        **{"config": config, "metrics": metrics, "tags": tags, "geometry": asdict(counter.geometry)},
        **{name: asdict(record) for name, record in records.items() if record is not None},
    }
    try:
        _export(module, example, dest, metadata)
        _check_export(module, example, load_counter(str(dest)))
    except BaseException:
        shutil.rmtree(dest, ignore_errors=True)
        raise
    with torch.inference_mode():
        density = module(example)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Package(dest, weights_digest(module), parameters, dict(metrics), dict(tags), example, density)


def _export(module: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, object]) -> None:
    configure_mlflow()
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    # uint8, although the graph accepts float32 too: MLflow then rejects images scaled to 0..1.
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, 3, -1, -1), name=None)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 1, -1, -1), name=None)]),
    )
    versions = {"torch": torch.__version__.partition("+")[0], "numpy": np.__version__}
    with torch.no_grad(), silence_mlflow():
        try:
            mlflow.pytorch.save_model(
                module,
                str(folder),
                signature=signature,
                input_example=example.numpy(),
                serialization_format="pt2",
                pip_requirements=[f"{name}=={version}" for name, version in versions.items()],
                metadata={"crowdray": json.loads(json.dumps(metadata, default=str))},
            )
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.UserError, RuntimeError) as error:
            raise UserError(f"the counter cannot be exported: {error}") from error


def _check_export(module: nn.Module, example: Tensor, loaded: LoadedCounter) -> None:
    """Raise UserError if the export is bound to a device, rejects a size, batch or dtype, or differs in density."""
    nodes = getattr(loaded.graph, "graph").nodes  # noqa: B009
    bound = [
        str(node)
        for node in nodes
        if any(isinstance(value, torch.device) for value in (*node.args, *node.kwargs.values()))
    ]
    if bound:
        raise UserError(
            f"the exported counter is bound to the CPU: the device is an argument of {', '.join(bound)}; do not "
            "create tensors in its forward and do not cast any (.to), so that it runs on the device of its parameters"
        )
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
        for batch, height, width in _PROBES
    ]
    for image in (example, *noise):
        for batch in (image, image.float()):
            shape = f"{tuple(batch.shape)} {batch.dtype}"
            with torch.inference_mode():
                expected = module(batch)
            try:
                density = loaded(batch)
            except (AssertionError, RuntimeError, UserError) as error:
                raise UserError(
                    f"the exported counter rejects {shape}: {error.__cause__ or error}; write a forward "
                    "without branches on sizes, possibly empty slices, or casts (.to) of its input"
                ) from error
            if not same_density(density, expected):
                raise UserError(f"the exported counter returns another density than the counter on {shape}")


def same_density(density: Tensor, expected: Tensor) -> bool:
    """Whether two densities are equal up to the rounding of float32."""
    tolerance = 1e-5 * float(expected.abs().max())
    return density.shape == expected.shape and torch.allclose(density, expected, rtol=1e-5, atol=tolerance)


def _input_example(example: Tensor) -> Tensor:
    # Two images, as torch.export would fix a batch of one; different sides, as it would unify equal ones. The sizes
    # do not depend on the image, so neither does the export.
    rows, columns = (
        torch.arange(max(0, size - side) // 2, max(0, size - side) // 2 + side) % size
        for size, side in zip(example.shape[2:], _EXAMPLE_SIDES, strict=True)
    )
    part = example[0].detach().cpu()[:, rows][:, :, columns].round().clamp(0, 255).to(torch.uint8)
    return torch.stack([part, part.flip(-1)])
