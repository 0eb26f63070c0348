"""Which trainings begin alike: a key for each stage, made of all that its states depend on and of nothing else."""

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
from crowdray.models.build import backbone_of
from crowdray.models.counter import AUXILIARY, COUNT, DEPTH, SEGMENTATION
from crowdray.training.precision import resolve_precision
from crowdray.training.stages import Stage, stages_of

FORMAT = 1
"""Enters every key: a higher number forgets all stored states."""

DECIDING = ("data", "models", "training", "evaluation")
"""Folders of this package whose code decides what a training computes."""

LIBRARIES = ("torch", "pytorch-optimizer", "numpy", "pillow", "simplejpeg")
"""Distributions whose code does so too."""

Facts = dict[str, object]


@dataclass(frozen=True)
class StageKey:
    """One stage after a fixed beginning. Trainings whose chains have equal keys pass through the same states,
    epoch by epoch."""

    key: str
    """32 hexadecimal digits."""
    stage: str
    """baseline, decoders or joint."""
    epochs: int
    """Epochs that this training spends here at most."""


def stage_keys(
    config: Config, data_digest: str, world_size: int, numerics: Mapping[str, str | int]
) -> tuple[StageKey, ...]:
    """The chains of a training, one for each of its stages; `numerics` is what `numerics_of` gives.

    A stage's own length is not in its key: a training of 20 epochs is the beginning of one of 40.
    """
    key = _hash(
        {
            "format": FORMAT,
            "code": code_digest(),
            "data": data_digest,
            "world_size": world_size,
            "exchange": config.numerics.grad_allreduce_dtype if world_size > 1 else None,
            "numerics": dict(numerics),
            "seed": config.seed,
        }
    )
    chains = []
    for stage in stages_of(config):
        pace = {"learning_rate": stage.schedule.learning_rate, "patience": stage.schedule.patience}
        key = _hash({"after": key, "stage": stage.name, **pace, **_facts(config, stage)})
        chains.append(StageKey(key, stage.name, stage.schedule.epochs))
        key = _hash({"end of": key, "epochs": stage.schedule.epochs})
    return tuple(chains)


def numerics_of(config: Config, device: torch.device, threads: int) -> dict[str, str | int]:
    """What decides how a sum is rounded: libraries, processor, precision and, on a CPU, the threads that share
    it."""
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
    """The digest of this package's code, read once: states of other code are never used."""
    return digest_of(Path(crowdray.__file__).parent)


def source_of(backbone: type[Backbone]) -> str:
    """A hash of the code that a backbone brings: its libraries, and the modules that define a user's own and what it
    derives from; "" where it brings none. The package's own modules are in its digest."""
    modules = {base.__module__ for base in backbone.__mro__}
    users = sorted(name for name in modules if name.partition(".")[0] not in (crowdray.__name__, "torch", "builtins"))
    brought = {name: inspect.getsource(sys.modules[name]) for name in users}
    brought |= {name: version(name) for name in backbone.libraries}
    return _hash(brought) if brought else ""


def digest_of(package: Path) -> str:
    """A hash of the names and contents of all modules that decide what a training computes."""
    files = sorted(file for folder in DECIDING for file in (package / folder).rglob("*.py"))
    return _hash({file.relative_to(package).as_posix(): file.read_text() for file in files})


def _facts(config: Config, stage: Stage) -> Facts:
    """What a stage's states depend on beside its beginning and its pace."""
    if stage.name == "baseline":
        # All targets and windows that later stages see are made by these too.
        return {
            "sampling": result_fields(config)["sampling"],
            "sigma": config.target.sigma,
            "backbone": config.model.backbone,
            "source": source_of(backbone_of(config)),
            "weights": config.model.weights_sha256 or config.model.weights,
            "optimizer": asdict(config.optimizer),
        }
    if stage.name == "decoders":
        # Depth is distilled where the segmentation's target is 1. The joint stage has it from here.
        masked = SEGMENTATION in stage.tasks or DEPTH in stage.tasks
        return {
            "tasks": stage.tasks,
            "threshold": config.target.threshold if masked else None,
            "count_decoder": config.model.count_decoder if COUNT in stage.tasks else None,
        }
    weights = {task: getattr(config.loss, task) for task in stage.tasks if task in AUXILIARY}
    return {"weights": weights, "share": config.loss.gradient_share if weights else None}


def _hash(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
