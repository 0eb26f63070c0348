"""The counter as it ships: an exported graph that needs torch and MLflow, but no code of ours and no pickle.

Shape legend: B batch, H W image, h w density (H and W, or their share after a counter's own downsampling).
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
from crowdray.registry.connection import disable_telemetry
from crowdray.registry.loading import LoadedCounter, load_counter, silence_mlflow

# Larger and smaller than the example, odd, multiples of 4 and of 16 in one axis or both.
_PROBES = ((1, 64, 64), (3, 50, 97), (2, 33, 132), (1, 128, 81))
_EXAMPLE_SIDES = (64, 84)
_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Package:
    """A counter exported to a local folder and seen to give there what it gives here."""

    path: Path
    """Folder in MLflow's model format: `mlflow.pytorch.load_model(path)` opens it."""
    weights: str
    """sha256 over the names, shapes and values of all parameters and buffers."""
    parameters: int
    """Number of parameters."""
    metrics: Mapping[str, float]
    """What is known of the counter, such as "val/mae" and "test/rmse", in heads."""
    tags: Mapping[str, str]
    """Provenance: data digest, dataset URI, git revision."""
    example: Tensor
    """uint8 (2, 3, H, W) RGB: the input example."""
    density: Tensor
    """float32 (2, 1, h, w): what the counter itself says of the example."""


def package_counter(
    counter: nn.Module,
    example: Tensor,
    dest: Path,
    *,
    config: Mapping[str, object],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> Package:
    """Export a counter to the folder `dest`, in MLflow's format, and compare the two.

    counter: a module with `density(image)`, or whose forward returns the density; auxiliary decoders are
        left behind through `strip()` where there is one. It is copied to the CPU and not changed. Its `geometry`,
        where it has one, goes with it.
    example: uint8 or float RGB (B, 3, H, W), 0..255; the middle of its first image becomes the input example.
    config, metrics, tags: kept in the package's metadata; tags say where it comes from (data digest, dataset
        URI, git revision).

    Batch, height and width of the export are free, and it takes uint8 as well as float32. The folder appears
    whole, by one rename, and takes the place of one that is there. Raises UserError if the counter cannot be
    exported so, or the folder not be written.
    """
    plain = _Density(counter).eval()
    shown = _input_example(example)
    partial = dest.with_name(f"{storage.PARTIAL}{uuid.uuid4().hex[:12]}-{dest.name}")
    dest.parent.mkdir(parents=True, exist_ok=True)
    try:
        geometry = getattr(counter, "geometry", None)
        about = {"config": config, "metrics": metrics, "tags": tags, "geometry": geometry and asdict(geometry)}
        _export(plain, shown, partial, about)
        _check_export(plain, shown, load_counter(str(partial)))
        _check_portable(shown, load_counter(str(partial), device="meta"))
        _replace(dest, partial)
    except OSError as error:
        raise UserError(f"cannot write the packaged counter to {dest}: {error}; choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with torch.inference_mode():
        density = plain(shown)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    return Package(dest, _digest(plain), parameters, dict(metrics), dict(tags), shown, density)


class _Density(nn.Module):
    """What is exported: raw RGB in, density out, nothing else."""

    def __init__(self, counter: nn.Module) -> None:
        super().__init__()
        strip = getattr(counter, "strip", None)
        stripped: nn.Module = strip() if strip is not None else counter
        self.counter = copy.deepcopy(stripped).cpu()

    def forward(self, image: Tensor) -> Tensor:
        density = getattr(self.counter, "density", self.counter)
        result: Tensor = density(image)
        return result


def _export(plain: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, object]) -> None:
    disable_telemetry()
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    # uint8, although the graph takes float32 too: a decoded image passes, one in 0..1 does not.
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, 3, -1, -1), name=None)]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 1, -1, -1), name=None)]),
    )
    versions = {"torch": torch.__version__.partition("+")[0], "numpy": np.__version__}
    with torch.no_grad(), silence_mlflow():
        try:
            mlflow.pytorch.save_model(
                plain,
                str(folder),
                signature=signature,
                input_example=example.numpy(),
                serialization_format="pt2",
                pip_requirements=[f"{name}=={version}" for name, version in versions.items()],
                metadata={"crowdray": json.loads(json.dumps(metadata, default=str))},
            )
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.UserError, RuntimeError) as error:
            raise UserError(f"the counter cannot be exported: {error}") from error


def _check_export(plain: nn.Module, example: Tensor, loaded: LoadedCounter) -> None:
    """Find the size, batch or dtype that the export refuses here, before anyone counts with it."""
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
        for batch, height, width in _PROBES
    ]
    for image in (example, *noise):
        for given in (image, image.float()):
            shape = f"{tuple(given.shape)} {given.dtype}"
            with torch.inference_mode():
                expected = plain(given)
            try:
                density = loaded(given)
            except (AssertionError, RuntimeError, UserError) as error:
                raise UserError(
                    f"the exported counter refuses {shape}: {error.__cause__ or error}; write a forward "
                    "without branches on sizes, slices that may cut nothing, or casts (.to) of its input"
                ) from error
            scale = float(expected.abs().max())
            if density.shape != expected.shape or not torch.allclose(
                density, expected, rtol=_TOLERANCE, atol=_TOLERANCE * scale
            ):
                worst = float((density - expected).abs().max()) if density.shape == expected.shape else None
                raise UserError(
                    f"the exported counter differs from the counter on {shape}: {tuple(density.shape)} for "
                    f"{tuple(expected.shape)}, largest difference {worst} at a largest density of {scale}"
                )


def _check_portable(example: Tensor, loaded: LoadedCounter) -> None:
    """Refuse a graph that names the device it was traced on: it could not be moved to a GPU.

    `loaded` lies on the meta device, where tensors of the CPU do not mix with its parameters. Checks of the
    input's device, and tensors that never meet a parameter, show in the graph only.
    """
    nodes = getattr(loaded.graph, "graph").nodes  # noqa: B009
    bound = [str(node) for node in nodes if node.kwargs.get("device") is not None]
    problem = f"the device stands in {', '.join(bound)}" if bound else ""
    if not problem:
        try:
            loaded(example)
        except (AssertionError, RuntimeError) as error:
            problem = str(error)
    if problem:
        raise UserError(
            f"the exported counter is bound to the CPU: {problem}; create no tensors in its forward and "
            "cast none (.to), so that it runs wherever its parameters lie"
        )


def _input_example(example: Tensor) -> Tensor:
    if example.ndim != 4 or example.shape[1] != 3 or min(example.shape[2:]) < 2 or example.shape[0] < 1:
        raise UserError(f"the example must be RGB (B, 3, H, W), 0..255, but has the shape {tuple(example.shape)}")
    # Two images, since a batch of one would fix the batch size in the graph, and two sides that differ, since
    # equal ones would be taken for one. The sizes do not depend on the image: the export never does either.
    rows, columns = (
        torch.arange(max(0, given - side) // 2, max(0, given - side) // 2 + side) % given
        for given, side in zip(example.shape[2:], _EXAMPLE_SIDES, strict=True)
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
    """Put a finished folder in the place of another; a kill in between leaves the old one, hidden."""
    if dest.exists():
        old = dest.with_name(f"{partial.name}-old")
        dest.rename(old)
        partial.rename(dest)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(dest)
