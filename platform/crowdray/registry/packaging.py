"""Packaging of a counter: an exported graph in MLflow's format that loads without crowdray and without pickle.

Shape legend: B batch, H W image, h w density (H and W divided by the side of a cell).
"""

import copy
import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from crowdray import storage
from crowdray.errors import UserError
from crowdray.registry.connection import configure_mlflow, silence_mlflow
from crowdray.registry.loading import LoadedCounter, load_counter

# Batch and sizes of test images: larger and smaller than the example, odd, multiples of 4 and of 16.
_PROBES = ((1, 64, 64), (3, 50, 97), (2, 33, 132), (1, 128, 81))
_EXAMPLE_SIDES = (64, 84)
_TOLERANCE = 1e-5


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
    counter: nn.Module,
    example: Tensor,
    dest: Path,
    *,
    config: Mapping[str, object],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> Package:
    """Export a counter to the folder `dest` in MLflow's format and verify the export.

    The export accepts any batch, height and width, and uint8 as well as float32. The folder is written atomically, by
    a rename, and replaces an existing one.

    Args:
        counter: A module with `density(image)`, or whose forward returns the density. It is copied to the CPU and
            not modified; auxiliary decoders are removed by its `strip()`, if it has one. Its `geometry`, if any, is
            stored in the metadata.
        example: uint8 or float RGB (B, 3, H, W), 0..255; the center of its first image becomes the input example.
        config: Configuration, stored in the metadata.
        metrics: Metrics, stored in the metadata.
        tags: Provenance (data digest, dataset URI, git revision), stored in the metadata.

    Raises:
        UserError: The counter cannot be exported, or the folder cannot be written.
    """
    module = _DensityModule(counter).eval()
    example = _input_example(example)
    partial = dest.with_name(f"{storage.PARTIAL}{uuid.uuid4().hex[:12]}-{dest.name}")
    dest.parent.mkdir(parents=True, exist_ok=True)
    try:
        geometry = getattr(counter, "geometry", None)
        metadata = {"config": config, "metrics": metrics, "tags": tags, "geometry": geometry and asdict(geometry)}
        _export(module, example, partial, metadata)
        _check_export(module, example, load_counter(str(partial)))
        _check_portable(example, load_counter(str(partial), device="meta"))
        _replace(dest, partial)
    except OSError as error:
        raise UserError(f"cannot write the packaged counter to {dest}: {error}; choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with torch.inference_mode():
        density = module(example)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Package(dest, _digest(module), parameters, dict(metrics), dict(tags), example, density)


class _DensityModule(nn.Module):
    """Exported part of a counter: raw RGB in, density out."""

    def __init__(self, counter: nn.Module) -> None:
        super().__init__()
        strip = getattr(counter, "strip", None)
        stripped: nn.Module = strip() if strip is not None else counter
        self.counter = copy.deepcopy(stripped).cpu()

    def forward(self, image: Tensor) -> Tensor:
        density = getattr(self.counter, "density", self.counter)
        result: Tensor = density(image)
        return result


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
    """Raise UserError if the export rejects a size, batch or dtype, or returns another density."""
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
            scale = float(expected.abs().max())
            if density.shape != expected.shape or not torch.allclose(
                density, expected, rtol=_TOLERANCE, atol=_TOLERANCE * scale
            ):
                worst = float((density - expected).abs().max()) if density.shape == expected.shape else None
                raise UserError(
                    f"the exported counter differs from the counter on {shape}: {tuple(density.shape)} instead of "
                    f"{tuple(expected.shape)}, largest difference {worst} at a largest density of {scale}"
                )


def _check_portable(example: Tensor, loaded: LoadedCounter) -> None:
    """Raise UserError for a graph that is bound to the device it was traced on: it could not move to a GPU.

    Args:
        loaded: The counter on the meta device, where mixing CPU tensors with its parameters fails. Device checks of
            the input, and tensors that never meet a parameter, are visible in the graph only.
    """
    nodes = getattr(loaded.graph, "graph").nodes  # noqa: B009
    bound = [str(node) for node in nodes if node.kwargs.get("device") is not None]
    problem = f"the device is an argument of {', '.join(bound)}" if bound else ""
    if not problem:
        try:
            loaded(example)
        except (AssertionError, RuntimeError) as error:
            problem = str(error)
    if problem:
        raise UserError(
            f"the exported counter is bound to the CPU: {problem}; do not create tensors in its forward and "
            "do not cast any (.to), so that it runs on the device of its parameters"
        )


def _input_example(example: Tensor) -> Tensor:
    if example.ndim != 4 or example.shape[1] != 3 or min(example.shape[2:]) < 2 or example.shape[0] < 1:
        raise UserError(f"the example must be RGB (B, 3, H, W), 0..255, but has the shape {tuple(example.shape)}")
    # Two images, as torch.export would fix a batch of one; different sides, as it would unify equal ones. The sizes
    # do not depend on the image, so neither does the export.
    rows, columns = (
        torch.arange(max(0, size - side) // 2, max(0, size - side) // 2 + side) % size
        for size, side in zip(example.shape[2:], _EXAMPLE_SIDES, strict=True)
    )
    part = example[0].detach().cpu()[:, rows][:, :, columns].round().clamp(0, 255).to(torch.uint8)
    return torch.stack([part, part.flip(-1)])


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _replace(dest: Path, partial: Path) -> None:
    """Replace a folder by a complete one; a kill in between leaves the old one under a hidden name."""
    if dest.exists():
        old = dest.with_name(f"{partial.name}-old")
        dest.rename(old)
        partial.rename(dest)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(dest)
