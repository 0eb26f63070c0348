"""Files that crowdray reads, with a check that reading damaged ones ends in a UserError or in a right result."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from safetensors.torch import save

from crowdray import storage
from crowdray.config import Config, from_json, to_json
from crowdray.data.decoding import check_image, decode_image, decode_upright
from crowdray.data.sample import decode_depth, decode_roi, encode_depth, encode_roi
from crowdray.data.shards import INDEX, Dataset, Index
from crowdray.documents import parse_document
from crowdray.errors import UserError
from crowdray.models.build import build_counter
from crowdray.models.pretrained import load_pretrained
from crowdray.pipeline.outcome import Outcome
from crowdray.presets import preset
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import package_counter
from crowdray.training.checkpoint import load_checkpoint, save_checkpoint
from crowdray.training.result import TrainingResult
from crowdray.tune.optuna_study import open_optuna_study

from .builders import encode, samples, write_dataset
from .counters import exported_counter, photo
from .states import checkpoint, same
from .studies import make_study

Files = Mapping[str, bytes]
"""Contents by path."""


@dataclass(frozen=True)
class Target:
    """One kind of stored files."""

    make: Callable[[Path], Files]
    """Builds valid files; it may use the given folder."""
    check: Callable[[Files, Path], None]
    """Reads the files, from the given folder if need be; raises UserError, or AssertionError for a wrong result."""
    share: float = 1.0
    """Part of the mutations."""


def write(files: Files, folder: Path) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def images(folder: Path) -> Files:
    """One photo in every format, mode and orientation that is decoded."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (24, 32), dtype=np.uint16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    saved = {
        f"{mode}.{form}": encode(rgb.convert(mode), form)
        for form, modes in {
            "JPEG": ("RGB", "L", "CMYK"),
            "PNG": ("RGB", "L", "P", "RGBA", "1"),
            "WEBP": ("RGB", "RGBA"),
            "TIFF": ("RGB", "L", "P", "CMYK"),
            "BMP": ("RGB", "L", "P"),
            "PPM": ("RGB", "L"),
        }.items()
        for mode in modes
    }
    saved |= {f"grey16.{form}": encode(grey16, form) for form in ("PNG", "TIFF")}
    saved |= {f"rotated.{form}": encode(rgb, form, exif=exif) for form in ("JPEG", "PNG", "WEBP", "TIFF")}
    saved |= {f"lzw.{kind}": encode(rgb, "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_deflate", "jpeg")}
    return saved


def check_images(files: Files, folder: Path) -> None:
    for content in files.values():
        height, width = check_image(content)
        pixels = decode_image(content)
        assert pixels.shape == (height, width, 3) and pixels.dtype == np.uint8
        assert decode_upright(content).shape in ((height, width, 3), (width, height, 3))


def masks(folder: Path) -> Files:
    rng = np.random.default_rng(0)
    return {"roi": encode_roi(rng.random((24, 32)) > 0.5), "depth": encode_depth(rng.random((24, 32)))}


def check_masks(files: Files, folder: Path) -> None:
    assert decode_roi(files["roi"]).dtype == np.bool_
    depth = decode_depth(files["depth"])
    assert depth.dtype == np.float32 and 0 <= depth.min() <= depth.max() <= 1


def dataset(folder: Path) -> Files:
    made = write_dataset(str(folder / "dataset"), samples(12))
    return {path.name: path.read_bytes() for path in Path(made.uri).iterdir()}


def check_index(files: Files, folder: Path) -> None:
    """An index is refused, or describes the dataset's rows as they are."""
    write(files, folder)
    opened = Dataset.open(str(folder))
    expected = samples(12)
    for split in opened.index.splits:
        rows = opened.rows(split).tolist()
        assert opened.counts(split).tolist() == [len(expected[row].points) for row in rows]
        assert opened.strings("name", split) == [expected[row].name for row in rows]
        for row in rows:
            assert opened.sample(row).sha256 == expected[row].sha256


def check_shard(files: Files, folder: Path) -> None:
    """A shard whose index agrees with its damaged bytes is refused, or read within its bounds."""
    write(files, folder)
    (name,) = [name for name in files if name != INDEX]
    try:
        index = Index.from_json(files[INDEX], INDEX)
    except UserError:
        return
    info = replace(index.shards[0], bytes=len(files[name]), sha256=storage.hash_file(folder / name))
    (folder / INDEX).write_text(replace(index, shards=(info,)).to_json())
    opened = Dataset.open(str(folder))
    for row in range(len(opened)):
        sample = opened.sample(row)
        assert sample.points.shape[1] == 2 and isinstance(sample.name, str) and bytes(sample.image) is not None


def config(folder: Path) -> Files:
    return {"config.json": to_json(Config()).encode()}


def check_config(files: Files, folder: Path) -> None:
    assert isinstance(from_json(files["config.json"], "config.json"), Config)


def saved_checkpoint(folder: Path) -> Files:
    save_checkpoint(checkpoint(7), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_checkpoint(files: Files, folder: Path) -> None:
    """A checkpoint is refused, or equal to the saved one; a changed state.json without a hash is an older version's."""
    write(files, folder)
    loaded = load_checkpoint(folder)
    assert same(loaded, checkpoint(7)) or "sha256" not in json.loads(files["state.json"])


def unhashed_checkpoint(folder: Path) -> Files:
    """A checkpoint of a version that wrote no hashes, so that damage reaches the parsers."""
    files = saved_checkpoint(folder)
    state = parse_document(files["state.json"])
    del state["files"]
    return {**files, "state.json": json.dumps(state).encode()}


def check_unhashed_checkpoint(files: Files, folder: Path) -> None:
    write(files, folder)
    load_checkpoint(folder)


def documents(folder: Path) -> Files:
    best = {"epoch": 1, "mae": 1.0, "rmse": 2.0}
    errors = {"images": 1, "mae": 1.0, "rmse": 2.0, "bias": 0.0, "nae": 0.1, "mae_unmasked": 1.0}
    counts = [{"row": 0, "truth": 3, "predicted": 2.5, "unmasked": 2.5}]
    stage: dict[str, Any] = {"best": best, "validation": errors, "test": errors, "test_counts": counts}
    history = [{"epoch": 1, "stage": "baseline", "mae": 1.0}]
    result: dict[str, Any] = {
        "best_stage": "baseline",
        "stages": {"baseline": stage},
        "history": history,
        "loss_weights": {"depth": 1},
    }
    result |= {"mean_count": 3.0, "mean_predictor": errors}
    outcome: dict[str, Any] = {
        "run": "runs/a",
        "result": result,
        "model": "runs/a/model",
        "figure": "f.png",
        "registered": None,
    }
    outcome |= {"alias": None, "tracking_uri": None, "run_id": None, "run_url": None}
    return {"result.json": json.dumps(result).encode(), "outcome.json": json.dumps(outcome).encode()}


def check_documents(files: Files, folder: Path) -> None:
    assert isinstance(TrainingResult.from_json(files["result.json"], "result.json"), TrainingResult)
    assert isinstance(Outcome.from_json(files["outcome.json"], "outcome.json"), Outcome)


def package(folder: Path) -> Files:
    """A package, its archive unpacked so that damage reaches the members and not only their checksums."""
    package_counter(exported_counter(), photo(1, 90, 120), folder / "model", config={}, metrics={}, tags={})
    files = {"MLmodel": (folder / "model/MLmodel").read_bytes()}
    with zipfile.ZipFile(folder / "model/data/model.pt2") as archive:
        return files | {name: archive.read(name) for name in archive.namelist()}


def check_package(files: Files, folder: Path) -> None:
    """A package is refused, or loaded; counting a photo with it ends in a density or in a UserError."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, member in files.items():
            if name != "MLmodel":
                archive.writestr(name, member)
    write({"MLmodel": files["MLmodel"], "data/model.pt2": content.getvalue()}, folder)
    density = load_counter(str(folder))(photo(1, 50, 97))
    assert density.ndim == 4 and density.dtype == torch.float32


def archive(folder: Path) -> Files:
    package(folder)
    return {path: (folder / "model" / path).read_bytes() for path in ("MLmodel", "data/model.pt2")}


def check_archive(files: Files, folder: Path) -> None:
    """An archive is refused, or returns the density that it was packaged with."""
    write(files, folder)
    image = photo(1, 50, 97)
    with torch.inference_mode():
        torch.testing.assert_close(load_counter(str(folder))(image), exported_counter()(image))


def weights(folder: Path) -> Files:
    encoder = build_counter(preset("debug"), 1.0).encoder
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    pickled = io.BytesIO()
    torch.save(tensors, pickled)
    return {"weights.pth": pickled.getvalue(), "weights.safetensors": save(tensors)}


def check_weights(files: Files, folder: Path) -> None:
    write(files, folder)
    config = preset("debug")
    for name in files:
        load_pretrained(
            build_counter(config, 1.0), replace(config, model=replace(config.model, weights=str(folder / name)))
        )


def study(folder: Path) -> Files:
    """The records of a search: its identity, and the journal of two trials."""
    made = make_study(folder)
    made.create_or_verify()
    trials = open_optuna_study(made)
    for loss in (2.0, 1.0):
        trial = trials.ask()
        trial.suggest_float("loss.depth", 0.01, 100.0, log=True)
        trials.tell(trial, loss)
    return {path.name: path.read_bytes() for path in Path(made.uri).iterdir() if path.is_file()}


def check_study(files: Files, folder: Path) -> None:
    made = make_study(folder)
    write(files, Path(made.uri))
    made.create_or_verify()
    assert len(open_optuna_study(made).trials) <= 3


TARGETS: dict[str, Target] = {
    "images": Target(images, check_images, 30.0),
    "masks": Target(masks, check_masks, 5.0),
    "index": Target(dataset, check_index, 5.0),
    "shard": Target(dataset, check_shard, 10.0),
    "config": Target(config, check_config, 5.0),
    "checkpoint": Target(saved_checkpoint, check_checkpoint, 3.0),
    "older checkpoint": Target(unhashed_checkpoint, check_unhashed_checkpoint, 5.0),
    "documents": Target(documents, check_documents, 5.0),
    "weights": Target(weights, check_weights, 1.5),
    "study": Target(study, check_study, 3.0),
    "package": Target(package, check_package, 0.5),
    "archive": Target(archive, check_archive, 0.3),
}
