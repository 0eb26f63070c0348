"""Stage keys: a field changes the keys from the first stage whose states depend on it, and no earlier one."""

import dataclasses
import importlib
import linecache
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crowdray
from crowdray.config import Config, LossConfig, ModelConfig, StageConfig, StagesConfig
from crowdray.data.shards import Dataset
from crowdray.models.cfcn import CFCN
from crowdray.stage_cache import keys as stage_cache_keys
from crowdray.stage_cache.keys import HASHED_CODE, numerics_facts, package_digest, stage_keys
from crowdray.training.checkpoint import load_checkpoint

from ..support.trainers import CPU, Interrupted, debug_config, equal_tensors, save_epochs, trainer_of

PACKAGE = Path(crowdray.__file__).parent
STAGES = ("baseline", "decoders", "joint")

# Every configuration field: another value, and the first stage whose states it changes (None: no stage).
FIELDS: dict[str, tuple[object, str | None]] = {
    "seed": (1, "baseline"),
    "sampling.validation": ("run", "baseline"),
    "sampling.validation_fraction": (0.25, "baseline"),
    "sampling.images": (7, "baseline"),
    "sampling.downsample": (2, "baseline"),
    "sampling.crop": (32, "baseline"),
    "sampling.context": (40, "baseline"),
    "sampling.batch": (4, "baseline"),
    "sampling.crops_per_image": (2, "baseline"),
    "sampling.flip": (0.25, "baseline"),
    "sampling.brightness": (0.1, "baseline"),
    "sampling.contrast": (0.1, "baseline"),
    "sampling.colour": (0.1, "baseline"),
    "sampling.scale": (0.1, "baseline"),
    "sampling.roi": (False, "baseline"),
    "sampling.cache_gib": (1.0, None),
    "sampling.gpu_cache_gib": (1.0, None),
    "target.sigma": (2.0, "baseline"),
    "target.threshold": (0.5, "decoders"),
    "model.backbone": (f"{__name__}:Other", "baseline"),
    "model.count_decoder": ("pooled", "decoders"),
    "model.weights": ("here.safetensors", "baseline"),
    "model.weights_sha256": ("0" * 64, "baseline"),
    "model.init": ("models:/crowdray-mall/1", "baseline"),
    "model.init_sha256": ("1" * 64, "baseline"),
    "loss.segmentation": (0.08, "joint"),
    "loss.depth": (0.3, "joint"),
    "loss.count": (2.0, "joint"),
    "loss.gradient_share": (0.2, "joint"),
    "loss.local_counts": (0.5, "baseline"),
    "loss.placebo": (True, "decoders"),
    "optimizer.name": ("sgd", "baseline"),
    "optimizer.momentum": (0.8, "baseline"),
    "optimizer.weight_decay": (0.1, "baseline"),
    "optimizer.warmup": (10, "baseline"),
    "optimizer.plateau_patience": (2, "baseline"),
    "optimizer.plateau_factor": (0.5, "baseline"),
    "optimizer.clip": (0.5, "baseline"),
    "optimizer.grad_accumulation_steps": (2, "baseline"),
    "optimizer.ema_decay": (0.9, "baseline"),
    "stages.baseline.epochs": (7, "decoders"),
    "stages.baseline.learning_rate": (1e-4, "baseline"),
    "stages.baseline.patience": (3, "baseline"),
    "stages.baseline.anneal_epochs": (1, "baseline"),
    "stages.decoders.epochs": (7, "joint"),
    "stages.decoders.learning_rate": (1e-4, "decoders"),
    "stages.decoders.patience": (3, "decoders"),
    "stages.decoders.anneal_epochs": (1, "decoders"),
    "stages.joint.epochs": (7, None),
    "stages.joint.learning_rate": (1e-4, "joint"),
    "stages.joint.patience": (3, "joint"),
    "stages.joint.anneal_epochs": (1, "joint"),
    "numerics.precision": ("bf16", None),  # enters through numerics_facts
    "numerics.compile": ("yes", None),  # enters through numerics_facts
    "numerics.tf32": (True, None),  # enters through numerics_facts
    "numerics.activation_checkpointing": (True, None),
    "numerics.threads": (3, None),  # enters through numerics_facts
    "numerics.grad_allreduce_dtype": ("bf16", None),  # one worker reduces nothing
}

ANNEALING = [f"stages.{stage}.anneal_epochs" for stage in STAGES]
COMBINABLE = sorted(
    FIELDS.keys()
    - {"numerics.activation_checkpointing", "model.weights", "model.init", "model.init_sha256", *ANNEALING}
)
"""Fields that may change together: compilation excludes activation checkpointing, the hash of weights replaces their
path, a counter's weights those of an encoder, and annealing makes a stage depend on its length."""


class Other(CFCN):
    """A backbone other than the default."""


def field_paths(group: object, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(group):  # type: ignore[arg-type]
        value = getattr(group, item.name)
        if dataclasses.is_dataclass(value):
            yield from field_paths(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def with_field(group: Any, path: str, value: object) -> Any:
    name, _, rest = path.partition(".")
    return dataclasses.replace(group, **{name: with_field(getattr(group, name), rest, value) if rest else value})


def keys(config: Config, data: str = "d", world: int = 1, numerics: dict[str, str | int] | None = None) -> list[str]:
    return [key.key for key in stage_keys(config, data, world, numerics or {"threads": 1})]


def differing_stages(one: Config, other: Config) -> list[str]:
    return [stage for stage, a, b in zip(STAGES, keys(one), keys(other), strict=False) if a != b]


def stages_from(first: str | None) -> list[str]:
    return list(STAGES[STAGES.index(first) :]) if first else []


def test_fields_table_lists_every_config_field_with_another_value() -> None:
    assert set(FIELDS) == set(field_paths(Config())), "decide in keys.py and here which stage a new field changes"
    for path, (value, _) in FIELDS.items():
        assert with_field(Config(), path, value) != Config()


@pytest.mark.parametrize("path", FIELDS)
def test_stage_keys_change_from_the_first_stage_that_depends_on_a_field(path: str) -> None:
    value, first = FIELDS[path]
    assert differing_stages(Config(), with_field(Config(), path, value)) == stages_from(first)


def test_stage_keys_of_an_annealed_stage_depend_on_its_length() -> None:
    config = with_field(Config(), "stages.joint.anneal_epochs", 2)
    assert differing_stages(config, with_field(config, "stages.joint.epochs", 7)) == ["joint"]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.sampled_from(COMBINABLE)), st.sets(st.sampled_from(COMBINABLE)))
def test_stage_keys_of_two_configs_are_equal_up_to_the_first_difference(one: set[str], other: set[str]) -> None:
    def build(paths: set[str]) -> Config:
        config = Config()
        for path in paths:
            config = with_field(config, path, FIELDS[path][0])
        return config

    first = min((stage for path in one ^ other if (stage := FIELDS[path][1])), key=STAGES.index, default=None)
    assert differing_stages(build(one), build(other)) == stages_from(first)


def test_stage_keys_are_distinct_and_deterministic() -> None:
    found = stage_keys(Config(), "d", 1, {"a": 1, "b": 2})
    assert [(key.stage, key.epochs) for key in found] == [("baseline", 40), ("decoders", 4), ("joint", 20)]
    assert len({key.key for key in found}) == 3 and all(len(key.key) == 32 for key in found)
    assert found == stage_keys(Config(), "d", 1, {"b": 2, "a": 1})


def test_stage_keys_depend_on_data_world_size_and_numerics() -> None:
    reduced = with_field(Config(), "numerics.grad_allreduce_dtype", "bf16")
    found = [
        *keys(Config()),
        *keys(Config(), data="e"),
        *keys(Config(), world=2),
        *keys(reduced, world=2),
        *keys(Config(), numerics={"threads": 2}),
        *keys(Config(), numerics={"threads": 1, "torch": "3"}),
    ]
    assert len(set(found)) == len(found)


def test_stage_keys_without_a_task_ignore_its_fields() -> None:
    def differing(loss: LossConfig, path: str, value: object) -> list[str]:
        config = dataclasses.replace(Config(), loss=loss)
        return differing_stages(config, with_field(config, path, value))

    assert differing(LossConfig(), "loss.count", 0.0) == ["decoders", "joint"]
    # Depth is masked by the segmentation target, so the threshold decides either task.
    for loss in (LossConfig(depth=0), LossConfig(segmentation=0)):
        assert differing(loss, "target.threshold", 0.5) == ["decoders", "joint"]
    assert differing(LossConfig(segmentation=0, depth=0), "target.threshold", 0.5) == []
    density_only = LossConfig(segmentation=0, depth=0, count=0)
    for path, value in (("target.threshold", 0.5), ("loss.gradient_share", 0.5)):
        assert differing(density_only, path, value) == []


def test_numerics_facts_depend_on_precision_and_threads() -> None:
    fp32 = with_field(Config(), "numerics.precision", "fp32")
    bf16 = with_field(Config(), "numerics.precision", "bf16")
    facts = numerics_facts(fp32, CPU, 2)
    assert facts["precision"] == "fp32" and facts["device"] == "cpu" and facts["threads"] == 2
    assert {name for name in facts if facts[name] != numerics_facts(bf16, CPU, 2)[name]} == {"precision"}
    assert {name for name in facts if facts[name] != numerics_facts(fp32, CPU, 3)[name]} == {"threads"}
    assert numerics_facts(Config(), CPU, 2)["precision"] in ("fp32", "bf16")


PLANTED = {
    **{f"{folder}/": True for folder in ("models", "data", "training")},
    **{f"evaluation/{name}.py": True for name in ("inference", "metrics")},
    **{f"{folder}/": False for folder in ("plots", "console", "tune", "datasets", "registry", "cluster", "pipeline")},
    **{f"{folder}/": False for folder in ("stage_cache", "storage", "scenes")},
    **{name: False for name in ("evaluation/images.py", "presets.py", "errors.py", "config.py")},
}
"""Part of the package, and whether a change there must change every stage key."""


@pytest.mark.parametrize(("part", "decides"), PLANTED.items())
def test_stage_keys_change_only_with_code_that_decides_training(
    part: str, decides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = shutil.copytree(PACKAGE, tmp_path / "crowdray", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stage_cache_keys, "code_digest", lambda: package_digest(package))
    path = package / part
    for changed in [*sorted(path.rglob("*.py"))[:1], path / "new.py"] if path.is_dir() else [path]:
        before = keys(Config())
        with changed.open("a") as file:
            file.write("\nPLANTED = 1\n")
        assert set(before).isdisjoint(keys(Config())) if decides else before == keys(Config()), changed


def test_hashed_code_covers_all_modules_that_training_imports() -> None:
    """Config fields enter the keys by value; storage and documents move bytes whose digest is in the keys."""
    graph = grimp.build_graph("crowdray", cache_dir=None)
    imported = graph.find_upstream_modules("crowdray.training", as_package=True)
    allowed = {name.removesuffix(".py").replace("/", ".") for name in HASHED_CODE}
    allowed |= {"config", "credentials", "documents", "errors", "storage"}
    modules = {name.removeprefix("crowdray.") for name in imported if not graph.find_children(name)}
    assert {name for name in modules if not any(f"{name}.".startswith(f"{part}.") for part in allowed)} == set()


def test_stage_keys_depend_on_the_code_of_a_users_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    config = dataclasses.replace(Config(), model=ModelConfig("homemade:Custom"))

    def keys_with(code: str) -> list[str]:
        source = f"from crowdray.models.cfcn import CFCN\n\n\nclass Custom(CFCN):\n{code}"
        (tmp_path / "homemade.py").write_text(source)
        sys.modules.pop("homemade", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return keys(config)

    first, other = keys_with("    first = 1\n"), keys_with("    other = 20\n")
    assert not set(first) & set(other)
    assert keys_with("    first = 1\n") == first


def test_runs_with_equal_stage_keys_have_bit_equal_states(discs: Dataset, tmp_path: Path) -> None:
    """Fields that the table calls irrelevant do not change the state in the middle of the decoders stage."""
    stages = StagesConfig(StageConfig(1, 3e-4), StageConfig(2, 1e-3), StageConfig(1, 3e-4))
    one = other = debug_config(sampling={"validation_fraction": 0.7}, stages=stages)
    for path, (value, first) in FIELDS.items():
        if path == "stages.decoders.epochs" or (
            first in (None, "joint") and not path.startswith("numerics.") and path not in ANNEALING
        ):
            other = with_field(other, path, value)
    assert differing_stages(one, other) == ["joint"]
    for name, config in (("one", one), ("other", other)):
        with pytest.raises(Interrupted):
            trainer_of(discs, config).fit(save_epochs(tmp_path / name, last=2))
    a, b = load_checkpoint(tmp_path / "one" / "2"), load_checkpoint(tmp_path / "other" / "2")
    for left, right in ((a.weights, b.weights), (a.ema, b.ema), (a.optimizer, b.optimizer)):
        assert left and equal_tensors(left, right)
