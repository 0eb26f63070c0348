"""Loading of packaged counters from the model registry, a run or a folder, without running anything they contain.

Of a package, only its metadata and its exported program are read: no loader module, code or pickle that it names.

Shape legend: B batch, H W image, h w density (H and W divided by the side of a cell).
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch
import yaml
from torch import Tensor, nn

from crowdray import storage
from crowdray.config import Precision
from crowdray.credentials import hide_credentials, with_credentials
from crowdray.errors import UserError, first_line
from crowdray.models.export import Geometry
from crowdray.registry.connection import call_mlflow, configure_mlflow, connect, limit_artifact_store
from crowdray.registry.interval import CountInterval
from crowdray.registry.program import ProgramError, load_program, open_regular
from crowdray.registry.training_data import TrainingData

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = "model"
"""Name of the packaged counter in the URI runs:/RUN_ID/model; MLflow shows it under the name of its run."""
GRAPH = "data/model.pt2"
DESCRIPTION = "MLmodel"
"""File written last: pass it to storage.publish_directory as `last`."""

_MAX_DESCRIPTION_BYTES = 2**18
_MAX_DEPTH = 50


class LoadedCounter:
    """Loaded counter: RGB images in, density maps out, whose sums are the counts."""

    def __init__(
        self,
        graph: nn.Module,
        device: torch.device,
        metadata: Mapping[str, object],
        geometry: Geometry,
        precision: Precision = "fp32",
        digest: str = "",
    ) -> None:
        self.device = device
        self.digest = digest
        """SHA-256 of its exported program; empty if it was not loaded from a file."""
        self.precision = precision
        """Arithmetic of the convolutions."""
        self.metadata = metadata
        """Provenance, config and metrics from the package."""
        self.graph = graph.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        """Exported graph: a module from images to density."""
        self.geometry = geometry
        """Geometry of the density cells on an image."""
        self.training_data = TrainingData.from_metadata(metadata)
        """What it was trained on; None if its package does not say so."""
        self.interval = CountInterval.from_metadata(metadata)
        """Interval around its counts; None if unknown."""

    def __call__(self, image: Tensor) -> Tensor:
        """Return the density (B, 1, h, w) in float32 heads per cell of RGB images (B, 3, H, W), 0..255, any dtype.

        Raises:
            UserError: The shape is wrong, or the image is smaller than a few pixels.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.numel() == 0:
            raise UserError(f"the image has shape {tuple(image.shape)}; pass RGB images (B, 3, H, W)")
        dtype = torch.uint8 if image.dtype == torch.uint8 else torch.float32
        image = image.to(self.device, dtype, copy=True)  # a program may change its input
        try:
            in_bf16 = self.precision == "bf16"
            cast = torch.autocast(self.device.type, torch.bfloat16) if in_bf16 else contextlib.nullcontext()
            # By default torch lets cuDNN round the inputs of fp32 convolutions to TF32.
            with torch.inference_mode(), cast, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                density: Tensor = self.graph(image).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the program is data: whatever it raises is about it
            height, width = image.shape[2:]
            if isinstance(error, AssertionError) and "Guard failed" in str(error):
                message = f"an image of {height}x{width} pixels is too small for this counter; enlarge it"
            else:
                message = f"the model cannot count an image of {height}x{width} pixels: {first_line(error)}"
            raise UserError(message) from error
        if density.ndim != 4 or density.shape[:2] != (image.shape[0], 1):
            raise UserError(
                f"the model returns shape {tuple(density.shape)}, not a density (B, 1, h, w); use another one"
            )
        return density


def load_counter(
    uri: str,
    device: str | torch.device = "cpu",
    tracking_uri: str | None = None,
    timeout_s: float = 20.0,
    precision: Precision = "fp32",
) -> LoadedCounter:
    """Load a packaged counter without running anything that the package contains.

    Args:
        uri: models:/name@alias, models:/name/3, runs:/run-id/model, or a folder (path or fsspec URI) written by
            `package_counter` or `storage.publish_directory`.
        tracking_uri: MLflow server or database of models:/ and runs:/; MLFLOW_TRACKING_URI by default.
        precision: With bf16, counts differ by some tenths of a percent, single cells by more.

    Raises:
        UserError: The model does not exist, or is not a packaged counter.
    """
    with storage.scratch_folder("model") as scratch:
        fetch = _open_package(uri, tracking_uri, scratch, timeout_s)
        try:
            metadata, geometry = _read_description(fetch(DESCRIPTION))
            program = load_program(path := fetch(GRAPH))
            digest = storage.hash_file(path)
            counter = LoadedCounter(program, torch.device(device), metadata, geometry, precision, digest)
        except FileNotFoundError as error:
            raise UserError(
                f"the model {uri} is not a counter packaged by crowdray: {GRAPH} is missing; use another one"
            ) from error
        except ProgramError as error:
            raise UserError(f"the model {uri} cannot be loaded: {error}; package it again") from error
    return counter


def download_package(uri: str, dest: Path, tracking_uri: str | None = None, timeout_s: float = 20.0) -> None:
    """Copy the files of a package that `load_counter` reads into a local folder; arguments as there."""
    with storage.scratch_folder("model") as scratch:
        fetch = _open_package(uri, tracking_uri, scratch, timeout_s)
        for name in (DESCRIPTION, GRAPH):
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetch(name), dest / name)


def _open_package(uri: str, tracking_uri: str | None, scratch: Path, timeout_s: float) -> Callable[[str], Path]:
    """Return a function from the name of a file of a package to a local path with its content."""
    if urlsplit(uri).scheme in ("models", "runs"):
        return _from_mlflow(uri, _required_tracking_uri(uri, tracking_uri), scratch, timeout_s)
    return _from_folder(uri, scratch)


def _read_description(path: Path) -> tuple[Mapping[str, object], Geometry]:
    """Return the counter's metadata and geometry of an MLmodel file, of which nothing else is used."""
    try:
        with open_regular(path, _MAX_DESCRIPTION_BYTES) as file:
            content = file.read()
        _check_yaml(content)
        description = yaml.safe_load(content)
        metadata = description["metadata"]["crowdray"]
        geometry = Geometry(**metadata["geometry"])
        code = description["flavors"]["pytorch"].get("code")
        TrainingData.from_metadata(metadata), CountInterval.from_metadata(metadata)  # raise if they are damaged
    except (FileNotFoundError, ProgramError):
        raise
    except Exception as error:  # the file is data: whatever its parser raises is about it
        raise ProgramError(f"{DESCRIPTION} does not describe a counter") from error
    if code is not None:
        raise ProgramError(f"{DESCRIPTION} names Python code; a counter needs none")
    if not all(type(side) is int and 0 < side < 2**20 for side in vars(geometry).values()):
        raise ProgramError(f"{DESCRIPTION} has an invalid geometry")
    return metadata, geometry


def _check_yaml(content: bytes) -> None:
    """Raise ValueError for aliases, which multiply, and deep nesting, on which parsers crash or take forever."""
    depth = 0
    for event in yaml.parse(content, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise ValueError("it is nested too deeply, or has an alias")


def _from_folder(uri: str, scratch: Path) -> Callable[[str], Path]:
    """Return a function from the name of a file of a package to a local path with its content."""
    if not storage.exists(storage.join(uri, DESCRIPTION)):
        raise UserError(
            f"there is no packaged counter at {uri}: {DESCRIPTION} is missing; check the path, "
            "or use a registered version: models:/NAME@candidate"
        )
    if storage.is_local(uri):
        return Path(storage.resolve(uri)).joinpath

    def fetch(name: str) -> Path:
        target = scratch / PurePosixPath(name).name
        target.write_bytes(storage.read_bytes(storage.join(uri, name)))
        return target

    return fetch


def resolve_uri(uri: str, tracking_uri: str | None = None, timeout_s: float = 20.0) -> str:
    """Return the lasting URI of a package: the version of an alias, or the absolute path.

    Args:
        uri: As of `load_counter`, or the folder of a run.
        tracking_uri: As of `load_counter`.
        timeout_s: Limit of one request.

    Raises:
        UserError: There is no such registered model.
    """
    scheme = urlsplit(uri).scheme
    if scheme == "models":
        return _look_up(uri, _required_tracking_uri(uri, tracking_uri), timeout_s, _version_uri)
    if scheme == "runs":
        return uri
    is_package = storage.exists(storage.join(uri, DESCRIPTION))
    return storage.resolve(uri if is_package else storage.join(uri, MODEL_NAME))


def _required_tracking_uri(uri: str, tracking_uri: str | None) -> str:
    tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if tracking_uri is None:
        raise UserError(f"the tracking URI of {uri} is unknown; set MLFLOW_TRACKING_URI")
    return hide_credentials(tracking_uri)


def _look_up(uri: str, tracking_uri: str, timeout_s: float, find: Callable[["MlflowClient", str], str]) -> str:
    """Call a function with a client and the URI of a model; a model that does not exist is one message."""
    configure_mlflow()
    from mlflow.exceptions import MlflowException

    client = connect(tracking_uri, timeout_s)

    def call() -> str:
        try:
            return find(client, uri)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            reason = str(error)
        except ValueError as error:
            reason = str(error)
        raise UserError(
            f"there is no model {uri} at {tracking_uri}: {reason}; list the models with `make ui`, and "
            "write models:/NAME@ALIAS, models:/NAME/VERSION or runs:/RUN_ID/model"
        )

    return call_mlflow(tracking_uri, timeout_s, call)


def _from_mlflow(uri: str, tracking_uri: str, scratch: Path, timeout_s: float) -> Callable[[str], Path]:
    """Return a function from the name of a file of a registered package to a local path with its content."""
    configure_mlflow()
    from mlflow.artifacts import download_artifacts, list_artifacts

    full = with_credentials(tracking_uri)
    location = _look_up(uri, tracking_uri, timeout_s, _artifact_location).rstrip("/")
    limit_artifact_store(location, timeout_s)

    def fetch(name: str) -> Path:
        artifact, size = f"{location}/{name}", 0
        if name != DESCRIPTION:
            folder = artifact.rpartition("/")[0]
            listed = call_mlflow(tracking_uri, timeout_s, lambda: list_artifacts(folder, tracking_uri=full))
            size = max((file.file_size or 0 for file in listed), default=0)

        def download() -> str:
            return str(download_artifacts(artifact, dst_path=str(scratch), tracking_uri=full))

        return Path(call_mlflow(tracking_uri, timeout_s, download, payload_bytes=size))

    return fetch


def _version_uri(client: "MlflowClient", uri: str) -> str:
    """Return models:/NAME/VERSION of a registered model; the id of a logged model stays as it is."""
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    found = get_model_name_and_version(client, uri)  # type: ignore[no-untyped-call]
    return f"models:/{found[0]}/{found[1]}" if len(found) == 2 else uri


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
        if name in ("", MODEL_NAME, model.name) and str(model.status) == "READY":
            return str(model.artifact_location)
    raise ValueError(f"the run has no complete model named {name or MODEL_NAME!r}")
