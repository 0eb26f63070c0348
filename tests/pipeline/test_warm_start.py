"""Warm start: the first density of a run is that of the counter it starts from, and anything else is one message."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from crowdray import storage
from crowdray.config import Config, ModelConfig, with_init
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.models.build import build_counter
from crowdray.models.counter import AUXILIARY
from crowdray.models.export import ExportedCounter
from crowdray.pipeline.run import plan_run
from crowdray.pipeline.warm_start import pin_init, read_init
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import Package, package_counter

from ..support.backbones import SMALL
from ..support.counters import METRICS, TAGS, photo
from ..support.trainers import debug_config, equal_tensors, trainer_of

CONFIG = debug_config(model=ModelConfig(SMALL, "pooled"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A counter in the folder of a run, with random weights and statistics, and another unit of density."""
    counter = build_counter(replace(CONFIG, seed=5), density_scale=12.345).eval()
    for number, layer in enumerate(counter.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features, generator=torch.Generator().manual_seed(number))
    dest = tmp_path_factory.mktemp("run") / "model"
    exported = ExportedCounter(counter)
    return package_counter(exported, photo(1, 90, 120), dest, config=asdict(CONFIG), metrics=METRICS, tags=TAGS)


def test_trainer_with_init_starts_at_the_density_of_the_package(
    discs: Dataset, package: Package, tmp_path: Path
) -> None:
    config, file = pin_init(with_init(CONFIG, str(package.path.parent)), str(tmp_path), None)
    assert (config.model.init, config.model.init_sha256) == (str(package.path), package.weights)
    state = trainer_of(discs, config, initial=read_init(file)).state
    with torch.inference_mode():
        for image in (photo(1, 64, 97), photo(2, 50, 33)):
            density = state.counter.eval().density(image)
            torch.testing.assert_close(density, load_counter(str(package.path))(image), rtol=1e-6, atol=1e-6)
    fresh = build_counter(config, 1.0)
    for task in AUXILIARY:
        assert equal_tensors(state.counter.decoders[task].state_dict(), fresh.decoders[task].state_dict())
    assert pin_init(config, str(tmp_path), None) == (config, file)  # the recorded configuration repeats the run


def test_plan_run_with_init_depends_on_the_weights_and_stores_them_for_the_workers(
    discs: Dataset, package: Package, root_uri: str
) -> None:
    def plan(config: Config) -> str:
        run = plan_run(config, discs.uri, 1, root_uri, None, "debug")
        assert (run.identity.init_file != "") == (config.model.init != "")
        assert run.identity.init_file == "" or storage.exists(run.identity.init_file)
        return run.identity.name

    uri = str(package.path)
    assert plan(CONFIG) != plan(with_init(CONFIG, uri)) == plan(with_init(CONFIG, str(package.path.parent)))
    with pytest.raises(UserError, match=f"has weights of SHA-256 {package.weights}, but model.init_sha256 is 0{{64}};"):
        plan(replace(CONFIG, model=replace(CONFIG.model, init=uri, init_sha256="0" * 64)))


def test_init_that_does_not_fit_is_one_message(package: Package, tmp_path: Path) -> None:
    def message(config: Config, uri: str) -> str:
        with pytest.raises(UserError) as caught:
            pin_init(with_init(config, uri), str(tmp_path), None)
        return str(caught.value)

    unfit = message(debug_config(), str(package.path))
    for part in (
        f"this counter has backbone {SMALL}, the configuration cfcn: give --model.backbone {SMALL}",
        "missing: encoder.conv1.weight, encoder.conv1.bias, encoder.conv2.weight and 5 more; unexpected: encoder.bl",
    ):
        assert part in unfit
    assert "there is no packaged counter at" in message(debug_config(), str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())


def test_trainer_without_the_initial_weights_or_with_damaged_ones_raises(
    discs: Dataset, package: Package, tmp_path: Path
) -> None:
    config, file = pin_init(with_init(CONFIG, str(package.path)), str(tmp_path), None)
    with pytest.raises(ValueError, match=r"pass the weights of model\.init"):
        trainer_of(discs, config)
    initial = read_init(file)
    assert initial is not None
    wide = {**initial.tensors, "encoder.blocks.0.0.bias": torch.zeros(9)}
    expected = "of another shape: encoder.blocks.0.0.bias (9,) instead of (8,)"
    assert replace(initial, tensors=wide).mismatches(build_counter(config, 1.0)) == expected
    initial.tensors["encoder.blocks.0.0.bias"][0] += 1
    with pytest.raises(UserError, match=f"does not contain the weights {package.weights}; delete it"):
        trainer_of(discs, config, initial=initial)
    Path(file).write_bytes(Path(file).read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged; delete it"):
        read_init(file)
