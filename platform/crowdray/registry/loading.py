"""Loading of packaged counters from the model registry, a run or a folder, without pickle.

Shape legend: B batch, H W image, h w density (H and W divided by the side of a cell).
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from crowdray import storage
from crowdray.errors import UserError
from crowdray.models.export import Geometry
from crowdray.registry.connection import (
    configure_mlflow,
    connect,
    environment,
    redacted,
    request_timeout,
    silence_mlflow,
    translated_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

Precision = Literal["fp32", "bf16"]

MODEL_NAME = "model"
"""Name of the packaged counter in its run: runs:/RUN_ID/model."""
GRAPH = "data/model.pt2"
DESCRIPTION = "MLmodel"
"""File written last: pass it to storage.publish_directory as `last`."""

_NO_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
_NO_BAR = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


class LoadedCounter:
    """Loaded counter: RGB images in, density maps out, whose sums are the counts."""

    def __init__(
        self, graph: nn.Module, device: torch.device, metadata: Mapping[str, object], precision: Precision = "fp32"
    ) -> None:
        self.device = device
        self.precision = precision
        """Arithmetic of the convolutions."""
        self.metadata = metadata
        """Provenance, config and metrics from the package."""
        self.graph = graph.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        """Exported graph: a module from images to density."""

    @property
    def geometry(self) -> Geometry | None:
        """Geometry of the density cells on an image, if the package contains it."""
        fields: Any = self.metadata.get("geometry")
        return Geometry(**fields) if fields else None

    def __call__(self, image: Tensor) -> Tensor:
        """Return the density (B, 1, h, w) in float32 heads per cell of RGB images (B, 3, H, W), 0..255, any dtype.

        Raises:
            UserError: The shape is wrong, or the image is smaller than a few pixels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.numel() == 0:
            raise UserError(f"the image has shape {tuple(image.shape)}; pass RGB images (B, 3, H, W)")
        image = image.to(self.device) if image.dtype == torch.uint8 else image.to(self.device, torch.float32)
        try:
            in_bf16 = self.precision == "bf16"
            cast = torch.autocast(self.device.type, torch.bfloat16) if in_bf16 else contextlib.nullcontext()
            # By default torch lets cuDNN round the inputs of fp32 convolutions to TF32.
            with torch.inference_mode(), cast, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                density: Tensor = self.graph(image).float()
        except AssertionError as error:
            if "Guard failed" not in str(error):
                raise
            height, width = image.shape[2:]
            raise UserError(f"an image of {height}x{width} pixels is too small for this counter; enlarge it") from error
        return density


def load_counter(
    uri: str,
    device: str | torch.device = "cpu",
    tracking_uri: str | None = None,
    timeout_s: float = 20.0,
    precision: Precision = "fp32",
) -> LoadedCounter:
    """Load a packaged counter without unpickling anything.

    Args:
        uri: models:/name@alias, models:/name/3, runs:/run-id/model, or a folder (path or fsspec URI) written by
            `package_counter` or `storage.publish_directory`.
        tracking_uri: MLflow server or database of models:/ and runs:/; MLFLOW_TRACKING_URI by default.
        precision: With bf16, counts differ by some tenths of a percent, single cells by more.

    Raises:
        UserError: The model does not exist, or is not a packaged counter.
    """
    configure_mlflow()
    with tempfile.TemporaryDirectory(prefix="crowdray-model-") as scratch:
        if urlsplit(uri).scheme in ("models", "runs"):
            folder = _download(uri, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), Path(scratch), timeout_s)
        else:
            folder = _folder(uri, Path(scratch))
        graph, metadata = _open(folder, uri)
    return LoadedCounter(graph, torch.device(device), metadata, precision)


def _open(folder: Path, uri: str) -> tuple[nn.Module, Mapping[str, object]]:
    import mlflow.pytorch
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    if not (folder / GRAPH).is_file():
        raise UserError(f"the model {uri} is not a counter packaged by crowdray: {GRAPH} is missing; use another one")
    try:
        metadata = (Model.load(str(folder)).metadata or {}).get("crowdray", {})
        with environment(_NO_PICKLE), silence_mlflow():
            graph = mlflow.pytorch.load_model(str(folder))
    except (MlflowException, RuntimeError, OSError, ValueError) as error:
        raise UserError(f"the model {uri} cannot be loaded: {str(error).splitlines()[0]}; package it again") from error
    assert isinstance(graph, nn.Module) and isinstance(metadata, Mapping)
    return graph, metadata


def _folder(uri: str, scratch: Path) -> Path:
    """Return the folder of a local package, or a local copy of the files of a remote one that loading needs."""
    if not storage.exists(storage.join(uri, DESCRIPTION)):
        raise UserError(
            f"there is no packaged counter at {uri}: {DESCRIPTION} is missing; check the path, "
            "or use a registered version: models:/NAME@candidate"
        )
    if storage.is_local(uri):
        return Path(storage.resolve(uri))
    for name in (DESCRIPTION, GRAPH):
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read_bytes(storage.join(uri, name)))
    return scratch


def _download(uri: str, tracking_uri: str | None, scratch: Path, timeout_s: float) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    if tracking_uri is None:
        raise UserError(f"the tracking URI of {uri} is unknown; set MLFLOW_TRACKING_URI")
    client = connect(tracking_uri, timeout_s)
    try:
        with request_timeout(timeout_s, retries=2):
            location = _artifact_location(client, uri)
    except (MlflowException, ValueError) as error:
        raise UserError(
            f"there is no model {uri} at {redacted(tracking_uri)}: {error}; list the models with `make ui`, and "
            "write models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID/model"
        ) from error
    with translated_errors(tracking_uri), environment(_NO_BAR):
        return Path(download_artifacts(artifact_uri=location, dst_path=str(scratch), tracking_uri=tracking_uri))


def _artifact_location(client: "MlflowClient", uri: str) -> str:
    """Return the URI of a model's files: MLflow's own look-up of models:/ ignores the given tracking URI."""
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if uri.startswith("models:"):
        found = get_model_name_and_version(client, uri)  # type: ignore[no-untyped-call]
        if len(found) == 1:
            return str(client.get_logged_model(*found).artifact_location)
        return client.get_model_version_download_uri(*found)
    run_id, _, name = urlsplit(uri).path.strip("/").partition("/")
    outputs = client.get_run(run_id).outputs
    # Newest first: a run that was resumed after its registration has several.
    for output in sorted(outputs.model_outputs if outputs else [], key=lambda output: -output.step):
        model = client.get_logged_model(output.model_id)
        if model.name == (name or MODEL_NAME) and str(model.status) == "READY":
            return str(model.artifact_location)
    raise ValueError(f"the run has no complete model named {name or MODEL_NAME!r}")
