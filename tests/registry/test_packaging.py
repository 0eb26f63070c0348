"""A package returns the density of its counter for every size, batch and dtype, or packaging fails."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crowdray import storage
from crowdray.config import Config, ModelConfig, SamplingConfig
from crowdray.errors import UserError
from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter, Geometry
from crowdray.registry.loading import LoadedCounter, load_counter
from crowdray.registry.packaging import Package, package_counter

from ..support.counters import METRICS, TAGS, exported_counter, photo

SIDES = (5, 32, 33, 97, 133)


@pytest.fixture(scope="module")
def loaded(package: Package) -> LoadedCounter:
    return load_counter(str(package.path))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("batch", [1, 3])
def test_load_counter_for_every_size_batch_and_dtype_equals_the_counter(
    counter: ExportedCounter, loaded: LoadedCounter, batch: int, dtype: torch.dtype
) -> None:
    sizes = [(a, b) for a in SIDES for b in SIDES] + [(480, 640), (640, 481)]
    for height, width in sizes if batch == 1 else sizes[::4]:
        image = photo(batch, height, width).to(dtype)
        with torch.inference_mode():
            expected = counter(image)
        torch.testing.assert_close(loaded(image), expected, rtol=1e-5, atol=1e-6)


def test_load_counter_with_channels_last_image_equals_the_counter(
    counter: ExportedCounter, loaded: LoadedCounter
) -> None:
    image = photo(1, 50, 97).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(loaded(image), counter(image).detach(), rtol=1e-5, atol=1e-6)


def test_package_counter_stores_metadata_and_size(
    package: Package, loaded: LoadedCounter, counter: ExportedCounter
) -> None:
    geometry = asdict(counter.geometry)
    assert loaded.metadata == {"config": {"seed": 0}, "metrics": METRICS, "tags": TAGS, "geometry": geometry}
    assert package.parameters == sum(p.numel() for p in counter.parameters())
    assert (package.path / "requirements.txt").read_text().count("crowdray") == 0


def test_load_counter_result_is_inference_and_wrong_images_raise(loaded: LoadedCounter) -> None:
    assert loaded(photo(1, 20, 30)).is_inference()
    with pytest.raises(UserError, match=re.escape("(1, 4, 20, 30)")):
        loaded(torch.zeros(1, 4, 20, 30))
    with pytest.raises(UserError, match="4x30 pixels is too small"):
        loaded(photo(1, 4, 30))


def test_load_counter_from_a_published_folder(package: Package) -> None:
    uri = "memory://bucket/models/test"
    storage.publish_directory(package.path, uri, last="MLmodel")
    torch.testing.assert_close(load_counter(uri)(package.example), package.density)


class BareSlice(ExportedCounter):
    def forward(self, image: Tensor) -> Tensor:
        density = F.interpolate(super().forward(image)[..., ::4, ::4], scale_factor=4)
        return density[..., : image.shape[-2], : image.shape[-1]]


class Cast(ExportedCounter):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.to(torch.float32))


class DeviceBound(ExportedCounter):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + torch.zeros(1)


class Moved(ExportedCounter):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward((image * 1.0).to(image.device))


class Branch(ExportedCounter):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * (2 if image.sum() > 3 else 1)


@pytest.mark.parametrize(
    ("counter_class", "message"),
    [
        (BareSlice, "rejects .*Guard failed"),
        (Cast, "bound to the CPU: .*do not cast"),
        (DeviceBound, "bound to the CPU: the device is an argument of zeros"),
        (Moved, "bound to the CPU: the device is an argument of .*, to;"),
        (Branch, "cannot be exported"),
    ],
)
def test_package_counter_with_an_unportable_forward_raises_and_writes_nothing(
    counter_class: type[ExportedCounter], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        package_counter(
            exported_counter(counter_class), photo(1, 90, 120), tmp_path / "a", config={}, metrics={}, tags={}
        )
    assert list(tmp_path.iterdir()) == []


def test_load_counter_from_a_damaged_or_missing_package_raises(package: Package, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no packaged counter at .*models:/NAME@candidate"):
        load_counter(str(tmp_path / "nothing"))
    broken = tmp_path / "broken"
    shutil.copytree(package.path, broken)
    (broken / "data/model.pt2").write_bytes(b"PK broken")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_counter(str(broken))
    (broken / "data/model.pt2").unlink()
    with pytest.raises(UserError, match=r"data/model\.pt2 is missing"):
        load_counter(str(broken))


def test_load_counter_of_a_pickled_model_raises(tmp_path: Path, package: Package) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(package.path, pickled)
    torch.save(exported_counter(), pickled / "data/model.pt2")
    with pytest.raises(UserError, match=r"cannot be loaded: models/model.json is missing"):
        load_counter(str(pickled))


@pytest.mark.slow
@pytest.mark.parametrize("downsample", [1, 2])
def test_package_counter_of_csrnet_keeps_geometry_and_density(tmp_path: Path, downsample: int) -> None:
    base = Config(sampling=SamplingConfig(crop=32, context=0), model=ModelConfig("csrnet", "pooled"))
    counter = ExportedCounter(build_counter(base, 1.0), downsample).eval()
    package = package_counter(counter, photo(1, 90, 120), tmp_path / "model", config={}, metrics={}, tags={})
    assert package.parameters == 7_635_264 + 7_079_424 + 1_549_313
    loaded = load_counter(str(package.path))
    assert loaded.geometry == counter.geometry == Geometry(downsample, 8 * downsample, 8 * downsample, 154 * downsample)
    for size in ((97, 133), (64, 72)):
        image = photo(1, *size)
        with torch.inference_mode():
            expected = counter(image)
        torch.testing.assert_close(loaded(image), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    coarse = load_counter(str(package.path), precision="bf16")(image)
    assert coarse.dtype == torch.float32
    assert 0 < float((coarse - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_loaded_counter_disables_tf32_during_the_call_only() -> None:
    seen: list[tuple[bool, bool]] = []

    class Spy(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
            return image[:, :1].float()

    before = torch.backends.cudnn.allow_tf32
    LoadedCounter(Spy(), torch.device("cpu"), {}, Geometry(1, 1, 4, 35))(torch.zeros(1, 3, 8, 8))
    assert seen == [(True, False)] and torch.backends.cudnn.allow_tf32 == before


def test_loaded_counter_whose_program_changes_its_input_keeps_the_image() -> None:
    class Zero(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.mul_(0)[:, :1].float()

    image = photo(1, 8, 8)
    assert not LoadedCounter(Zero(), torch.device("cpu"), {}, Geometry(1, 1, 4, 35))(image).any()
    assert torch.equal(image, photo(1, 8, 8))


def test_loaded_counter_whose_program_fails_raises_user_error() -> None:
    class Failing(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image / (1 // 0)

    with pytest.raises(UserError, match="cannot count an image of 8x9 pixels: integer division"):
        LoadedCounter(Failing(), torch.device("cpu"), {}, Geometry(1, 1, 4, 35))(photo(1, 8, 9))
