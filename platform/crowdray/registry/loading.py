"""Opening a packaged counter again, from a registry, a run or a folder, with pickle forbidden.

Shape legend: B batch, H W image, h w density (H and W divided by the side of a cell).
"""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from crowdray import storage
from crowdray.errors import UserError
from crowdray.models.export import Geometry
from crowdray.registry.connection import (
    connect,
    disable_telemetry,
    environment,
    redacted,
    request_timeout,
    translated_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

Precision = Literal["fp32", "bf16"]

MODEL_NAME = "model"
"""The name under which a run holds its packaged counter: runs:/RUN_ID/model."""
GRAPH = "data/model.pt2"
DESCRIPTION = "MLmodel"
"""The file that stands for the whole package: give it to storage.publish_directory as the last one."""

_NO_PICKLE = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
_NO_BAR = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


class LoadedCounter:
    """A packaged counter, ready to count: RGB images in, density maps out whose sums are the counts."""

    def __init__(
        self, graph: nn.Module, device: torch.device, metadata: Mapping[str, object], precision: Precision = "fp32"
    ) -> None:
        self.device = device
        self.precision = precision
        """Arithmetic of the convolutions."""
        self.metadata = metadata
        """Provenance, config and metrics, as packaged."""
        self.graph = graph.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        """The exported graph: a module from images to density."""

    @property
    def geometry(self) -> Geometry | None:
        """Where its cells lie on a photo, if its package says so."""
        told: Any = self.metadata.get("geometry")
        return Geometry(**told) if told else None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.graph.parameters())

    def __call__(self, image: Tensor) -> Tensor:
        """Density (B, 1, h, w), float32, heads per cell, of raw RGB (B, 3, H, W), 0..255, any dtype.

        The result lies on the counter's device. Raises UserError for another shape, and for an image of a few
        pixels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.numel() == 0:
            raise UserError(f"a counter takes RGB images (B, 3, H, W), not {tuple(image.shape)}; stack or permute them")
        given = image.to(self.device) if image.dtype == torch.uint8 else image.to(self.device, torch.float32)
        try:
            in_bf16 = self.precision == "bf16"
            cast = torch.autocast(self.device.type, torch.bfloat16) if in_bf16 else contextlib.nullcontext()
            # torch's own default lets cuDNN round the factors of fp32 convolutions.
            with torch.inference_mode(), cast, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                density: Tensor = self.graph(given).float()
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
    """Load a packaged counter, with pickle forbidden.

    uri: models:/name@alias, models:/name/3, runs:/run-id/model, or a folder (a path or an fsspec URI) that
        `package_counter` wrote or `storage.publish_directory` published.
    tracking_uri: where models:/ and runs:/ are looked up; None takes MLFLOW_TRACKING_URI.
    precision: bf16 is faster where the device multiplies it natively; counts differ by some tenths of a percent,
        single cells by more.

    Raises UserError when there is no such model, or when it is not one of these packages.
    """
    disable_telemetry()
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
        raise UserError(f"the model {uri} holds no {GRAPH}: it is not a counter packaged by crowdray; name another one")
    try:
        metadata = (Model.load(str(folder)).metadata or {}).get("crowdray", {})
        with environment(_NO_PICKLE), silence_mlflow():
            graph = mlflow.pytorch.load_model(str(folder))
    except (MlflowException, RuntimeError, OSError, ValueError) as error:
        raise UserError(f"the model {uri} cannot be loaded: {str(error).splitlines()[0]}; package it again") from error
    assert isinstance(graph, nn.Module) and isinstance(metadata, Mapping)
    return graph, metadata


def _folder(uri: str, scratch: Path) -> Path:
    """The package's own folder, or a local copy of the two files of a remote one that loading needs."""
    place = storage.resolve(uri).removesuffix(f"/{DESCRIPTION}").removesuffix(f"/{GRAPH}")
    if not storage.exists(storage.join(place, DESCRIPTION)):
        raise UserError(
            f"there is no packaged counter at {uri}: {DESCRIPTION} is missing there; check the path, "
            "or name a registered one: models:/NAME@candidate"
        )
    if storage.is_local(place):
        return Path(place)
    for name in (DESCRIPTION, GRAPH):
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read_bytes(storage.join(place, name)))
    return scratch


def _download(uri: str, tracking_uri: str | None, scratch: Path, timeout_s: float) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    if tracking_uri is None:
        raise UserError(f"{uri} is looked up in MLflow, but no tracking URI is known; set MLFLOW_TRACKING_URI")
    client = connect(tracking_uri, timeout_s)
    try:
        with request_timeout(timeout_s, retries=2):
            place = _artifact_place(client, uri)
    except (MlflowException, ValueError) as error:
        raise UserError(
            f"there is no model {uri} at {redacted(tracking_uri)}: {error}; look there with `make ui`, and "
            "write models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID/model"
        ) from error
    with translated_errors(tracking_uri), environment(_NO_BAR):
        return Path(download_artifacts(artifact_uri=place, dst_path=str(scratch), tracking_uri=tracking_uri))


def _artifact_place(client: "MlflowClient", uri: str) -> str:
    """Where a model's files lie: MLflow's own look-up of models:/ ignores the given tracking URI."""
    path = urlsplit(uri).path.strip("/")
    if uri.startswith("runs:"):
        run_id, _, name = path.partition("/")
        outputs = client.get_run(run_id).outputs
        # The newest first: a run that was continued after its registration holds more than one.
        for output in sorted(outputs.model_outputs if outputs else [], key=lambda made: -made.step):
            model = client.get_logged_model(output.model_id)
            if model.name == (name or MODEL_NAME) and str(model.status) == "READY":
                return str(model.artifact_location)
        raise ValueError(f"the run has no finished model named {name or MODEL_NAME!r}")
    name, at, alias = path.partition("@")
    if at:
        version = client.get_model_version_by_alias(name, alias)
        return client.get_model_version_download_uri(name, version.version)
    name, _, number = path.rpartition("/")
    if not name and path.startswith("m-"):
        return str(client.get_logged_model(path).artifact_location)
    if not name:
        raise ValueError("it names no version and no alias")
    return client.get_model_version_download_uri(name, number)


@contextlib.contextmanager
def silence_mlflow() -> Iterator[None]:
    """Silence what MLflow and torch's exporter say of their own affairs: nothing in it is for our user."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(mlflow|torch)(\.|$)")
            yield
    finally:
        logger.setLevel(level)
