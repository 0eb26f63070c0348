"""Keys of training stages: a hash of everything that decides a stage's states, and of nothing else."""

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import crowdray
from crowdray.config import Config, result_fields
from crowdray.models.backbone import Backbone
from crowdray.models.build import backbone_class
from crowdray.models.counter import AUXILIARY, COUNT, DEPTH, SEGMENTATION
from crowdray.training.precision import resolve_precision
from crowdray.training.stages import Stage, build_stages

FORMAT = 1
"""Part of every key: a higher number invalidates all stored states."""

HASHED_CODE = ("data", "models", "training", "evaluation/inference.py", "evaluation/metrics.py")
"""Folders and modules that decide a training run; validation picks the best epoch with the two of evaluation/."""

LIBRARIES = ("torch", "pytorch-optimizer", "numpy", "pillow", "simplejpeg")
"""Distributions whose versions decide a training run."""


@dataclass(frozen=True)
class StageKey:
    """A stage of a training run; runs with equal keys pass through the same states, epoch by epoch."""

    key: str
    """32 hexadecimal digits."""
    stage: str
    """baseline, decoders or joint."""
    epochs: int
    """Maximum number of epochs of this stage, which is not part of its own key."""


def stage_keys(
    config: Config, data_digest: str, world_size: int, numerics: Mapping[str, str | int]
) -> tuple[StageKey, ...]:
    """Compute the key of each stage of a training run.

    A stage's length enters the keys of later stages only, since 20 epochs are a prefix of 40.

    Args:
        config: The configuration.
        data_digest: Digest of the dataset.
        world_size: Number of workers.
        numerics: Result of `numerics_facts` on a worker's device.
    """
    key = _hash(
        {
            "format": FORMAT,
            "code": code_digest(),
            "data": data_digest,
            "world_size": world_size,
            "grad_allreduce_dtype": config.numerics.grad_allreduce_dtype if world_size > 1 else None,
            "numerics": dict(numerics),
            "seed": config.seed,
        }
    )
    keys = []
    for stage in build_stages(config):
        key = _hash({"prefix": key, "stage": stage.name, **_schedule_facts(stage), **_stage_facts(config, stage)})
        keys.append(StageKey(key, stage.name, stage.schedule.epochs))
        key = _hash({"prefix": key, "epochs": stage.schedule.epochs})
    return tuple(keys)


def numerics_facts(config: Config, device: torch.device, threads: int) -> dict[str, str | int]:
    """Collect what decides rounding: libraries, processor, precision and, on a CPU, the number of threads."""
    on_gpu = device.type == "cuda"
    able = [f"{name}={value}" for name, value in torch.cpu.get_capabilities().items() if not name.startswith("num_")]
    return {
        "precision": resolve_precision(config.numerics.precision, device),
        "compile": config.numerics.compile,
        "tf32": on_gpu and config.numerics.tf32,
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if on_gpu else " ".join(sorted(able)),
        "threads": 0 if on_gpu else threads,
        **{name: version(name) for name in LIBRARIES},
    }


@cache
def code_digest() -> str:
    """The digest of the installed package's hashed code, read once per process."""
    return package_digest(Path(crowdray.__file__).parent)


def package_digest(package: Path) -> str:
    """Hash the names and contents of the modules below `package` that HASHED_CODE lists."""
    paths = [package / name for name in HASHED_CODE]
    files = sorted(
        file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]) if file.is_file()
    )
    return _hash({file.relative_to(package).as_posix(): file.read_text() for file in files})


def backbone_digest(backbone: type[Backbone]) -> str:
    """Hash the code of a user's backbone: its modules, those of its bases, and its required libraries.

    Returns "" for a backbone of this package without further libraries: `code_digest` covers it.
    """
    modules = {base.__module__ for base in backbone.__mro__}
    external = sorted(
        name for name in modules if name.partition(".")[0] not in (crowdray.__name__, "torch", "builtins")
    )
    facts = {name: inspect.getsource(sys.modules[name]) for name in external}
    facts |= {name: version(name) for name in backbone.requirements}
    return _hash(facts) if facts else ""


def _schedule_facts(stage: Stage) -> dict[str, object]:
    """Facts of a stage's schedule that decide its states; only an annealed one depends on its length."""
    schedule = stage.schedule
    annealing = {"epochs": schedule.epochs, "anneal_epochs": schedule.anneal_epochs} if schedule.anneal_epochs else {}
    return {"learning_rate": schedule.learning_rate, "patience": schedule.patience, **annealing}


def _stage_facts(config: Config, stage: Stage) -> dict[str, object]:
    """Facts that decide a stage's states, besides its prefix and its schedule."""
    if stage.name == "baseline":
        # These also decide the crops and targets that later stages see. Fields that were added later enter if they are
        # set, so that they change no other key.
        sampling, init = result_fields(config)["sampling"], config.model.init_sha256 or config.model.init
        if not sampling["images"]:
            del sampling["images"]
        return {
            "sampling": sampling,
            "sigma": config.target.sigma,
            "backbone": config.model.backbone,
            "backbone_code": backbone_digest(backbone_class(config)),
            "weights": config.model.weights_sha256 or config.model.weights,
            "optimizer": asdict(config.optimizer),
            **({"init": init} if init else {}),
            **({"local_counts": config.loss.local_counts} if config.loss.local_counts else {}),
        }
    if stage.name == "decoders":
        # Depth is distilled where the segmentation target is 1, so the threshold decides both tasks.
        masked = SEGMENTATION in stage.tasks or DEPTH in stage.tasks
        return {
            "tasks": stage.tasks,
            **({"placebo": True} if config.loss.placebo else {}),
            "threshold": config.target.threshold if masked else None,
            "count_decoder": config.model.count_decoder if COUNT in stage.tasks else None,
        }
    weights = {task: getattr(config.loss, task) for task in stage.tasks if task in AUXILIARY}
    return {"weights": weights, "gradient_share": config.loss.gradient_share if weights else None}


def _hash(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
