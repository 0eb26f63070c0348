"""Backbones: the parameter counts of the paper's Table 1, and the properties that every backbone has."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crowdray.config import BACKBONES, Config, ConfigError, ModelConfig, SamplingConfig
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.models.build import backbone_class, build_counter
from crowdray.models.counter import COUNT, DENSITY, DEPTH, SEGMENTATION, TASKS
from crowdray.models.export import ExportedCounter
from crowdray.models.pretrained import load_pretrained, pin_weights
from crowdray.presets import debug
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer

from ..support.counters import parameters


def config_of(backbone: str, crop: int = 160, count_decoder: str = "pooled", **model: str) -> Config:
    sampling = SamplingConfig(crop=crop, context=0)
    return Config(sampling=sampling, model=ModelConfig(backbone, count_decoder, **model))  # type: ignore[arg-type]


def test_backbone_class_that_needs_a_missing_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_backbone.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install no_such_package$"):
        backbone_class(config_of("own_backbone:Backbone"))
    with pytest.raises(ConfigError, match=r"give a class that Python can import"):
        backbone_class(config_of("own_backbone_of_others:Backbone"))


def test_csrnet_has_the_parameter_counts_of_table_1() -> None:
    counter = build_counter(config_of("csrnet", crop=224), 1.0)
    assert parameters(counter.encoder.get_submodule("features")) == 7_635_264
    assert parameters(counter.encoder.get_submodule("dilated")) == 7_079_424
    assert [parameters(layer) for layer in counter.decoders[DENSITY].modules() if isinstance(layer, nn.Conv2d)] == [
        1_179_904, 295_040, 73_792, 577
    ]  # fmt: skip
    for task in (SEGMENTATION, DEPTH):
        assert parameters(counter.decoders[task]) == parameters(counter.decoders[DENSITY])
    with torch.device("meta"):  # it would allocate 800 MiB
        paper = counter.encoder.count_decoder(28)
    linear = [layer for layer in paper.modules() if isinstance(layer, nn.Linear)]
    assert parameters(linear[0]) == 205_521_408
    assert [layer.out_features for layer in linear] == [512, 256, 128, 64, 1]
    assert [layer.p for layer in paper.modules() if isinstance(layer, nn.Dropout)] == [0.5]


@pytest.mark.parametrize("size", [(160, 160), (224, 224), (97, 133), (96, 65), (17, 200)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_counter_maps_have_one_cell_per_output_stride(backbone: str, size: tuple[int, int]) -> None:
    counter = build_counter(config_of(backbone, crop=32), 1.0)
    encoder, images = counter.encoder, torch.zeros(2, 3, *size)
    assert encoder.stride == BACKBONES[backbone].stride
    with torch.no_grad():
        features, out = counter.features(images), counter(images, TASKS)
    sides, cells = ([-(-side // stride) for side in size] for stride in (encoder.stride, encoder.output_stride))
    assert features.shape == (2, encoder.channels, *sides)
    for task in (DENSITY, SEGMENTATION, DEPTH):
        assert out[task].shape == (2, 1, *cells)
    assert out[COUNT].shape == (2,)


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backbone of docs/backbone.md, in an importable module."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "backbone.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 30
    (tmp_path / "thin.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return "thin:Thin"


def test_documented_backbone_trains_with_its_stated_receptive_radius(discs: Dataset, documented: str) -> None:
    check_receptive_radius(documented)
    base = debug()
    sampling = replace(base.sampling, context=32, validation_fraction=0.25)
    config = replace(base, sampling=sampling, model=ModelConfig(documented, "pooled"))
    trainer = Trainer(config, discs, world=World(), device=torch.device("cpu"))
    trainer.fit()
    assert {row["stage"] for row in trainer.state.progress.history} == {"baseline", "decoders", "joint"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_receptive_radius_is_the_reach_of_its_gradient(backbone: str) -> None:
    check_receptive_radius(backbone)


def check_receptive_radius(backbone: str) -> None:
    """Compare with the pixels of nonzero gradient: with positive weights no two paths cancel.

    The receptive field is symmetric and the same along both axes, so that a narrow image is enough.
    """
    counter = build_counter(config_of(backbone), 1.0).double().eval()
    for parameter in (*counter.encoder.parameters(), *counter.decoders[DENSITY].parameters()):
        parameter.data.abs_().clamp_min_(1e-3)
        if parameter.ndim > 1:  # weighted means, which stay below the bound of ReLU6
            parameter.data /= parameter.data.flatten(1).sum(1).reshape(-1, *[1] * (parameter.ndim - 1))
    encoder = counter.encoder
    cell, radius = encoder.output_stride, encoder.receptive_radius
    length = -(-(2 * radius + 3 * encoder.stride) // encoder.stride) * encoder.stride
    first, reach = length // 2 // encoder.stride * encoder.stride // cell, 0
    for row in range(first, first + encoder.stride // cell):
        image = torch.full((1, 3, length, encoder.stride), 128.0, dtype=torch.double, requires_grad=True)
        gradient = torch.autograd.grad(counter.density(image)[0, 0, row].sum(), image)[0].abs().sum((0, 1, 3))
        seen = gradient.nonzero().flatten()
        assert int(seen.min()) > 0 and int(seen.max()) < length - 1
        reach = max(reach, (row + 1) * cell - 1 - int(seen.min()), int(seen.max()) - row * cell)
    assert reach == radius


def test_pooled_count_decoder_has_the_same_weights_for_every_crop() -> None:
    one, other = (build_counter(config_of("csrnet", crop), 1.0).decoders[COUNT] for crop in (64, 256))
    assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]
    assert parameters(build_counter(config_of("cfcn"), 1.0).decoders[COUNT]) == 10_369


def vgg_file(folder: Path, **change: Tensor | None) -> Path:
    """Write weights in torchvision's layout, with layers that CSRNet does not have."""
    own = build_counter(config_of("csrnet"), 1.0).encoder.get_submodule("features").state_dict()
    tensors: dict[str, Tensor | None] = {f"features.{name}": torch.rand(value.shape) for name, value in own.items()}
    tensors |= {"features.24.weight": torch.rand(512, 512, 3, 3), "classifier.0.bias": torch.rand(4096), **change}
    file = folder / "vgg16.safetensors"
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    return file


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_load_pretrained_changes_only_the_pretrained_layers(tmp_path: Path, form: str) -> None:
    file = vgg_file(tmp_path)
    if form == "pth":
        tensors = load_file(file)
        file = file.with_suffix(".pth")
        torch.save(tensors, file)
    config = pin_weights(config_of("csrnet", weights=str(file)))
    assert config.model.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    fresh, counter = build_counter(config, 1.0), build_counter(config, 1.0)
    load_pretrained(counter, config)
    before = fresh.state_dict()
    changed = {name for name, value in counter.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("encoder.features.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.21.weight": None}, r"features\.21\.weight is missing; give weights"),
        ({"features.0.bias": torch.zeros(32)}, r"features\.0\.bias is \(32,\), expected \(64,\)"),
    ],
)
def test_load_pretrained_with_unfit_weights_changes_nothing(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    config = config_of("csrnet", weights=str(vgg_file(tmp_path, **change)))
    counter = build_counter(config, 1.0)
    before = {name: value.clone() for name, value in counter.state_dict().items()}
    with pytest.raises(UserError, match=rf"vgg16\.safetensors does not fit CSRNet: {message}"):
        load_pretrained(counter, config)
    assert all(torch.equal(value, before[name]) for name, value in counter.state_dict().items())


def test_load_pretrained_rejects_wrong_hashes_and_files_without_tensors(tmp_path: Path) -> None:
    counter = build_counter(config_of("csrnet"), 1.0)
    file = vgg_file(tmp_path)
    with pytest.raises(UserError, match=r"has SHA-256 [0-9a-f]{64}, but model.weights_sha256 is 0{64}; download"):
        load_pretrained(counter, config_of("csrnet", weights=str(file), weights_sha256="0" * 64))
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        pin_weights(config_of("csrnet", weights=str(tmp_path / "missing.safetensors")))
    for name, content in (("text.safetensors", b"no tensors"), ("text.pth", b"no tensors"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is not a file of named tensors"):
            load_pretrained(counter, config_of("csrnet", weights=str(tmp_path / name)))
    torch.save({"features.0.weight": Path("code")}, tmp_path / "pickle.pth")
    with pytest.raises(UserError, match=r"pickle\.pth is not a file of named tensors \(it contains other objects\)"):
        load_pretrained(counter, config_of("csrnet", weights=str(tmp_path / "pickle.pth")))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("vgg", r"'vgg'; choose one of cfcn, csrnet, csrnet-table1, .*or give your own class"),
        ("no_such_module:Thin", r"No module named 'no_such_module'"),
        ("torch.nn:NoSuchClass", r"has no attribute 'NoSuchClass'"),
        ("torch.nn:Linear", r"not a subclass of crowdray.models.backbone.Backbone"),
    ],
)
def test_backbone_class_rejects_what_is_not_a_backbone(backbone: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone_class(config_of(backbone))


def test_config_rejects_crops_off_the_backbone_stride() -> None:
    with pytest.raises(ConfigError, match=r"sampling.crop is 100; the model's stride of 8 must divide it: try 96"):
        config_of("csrnet", crop=100)
    with pytest.raises(ConfigError, match=r"sampling.context is 36; the model's stride of 16 .* try 32"):
        replace(Config(), model=ModelConfig("csrnet-table1"))


def test_exported_counter_has_exactly_the_operations_of_plain_csrnet() -> None:
    """Compare the exported graph with that of CSRNet written without this package."""
    counter = build_counter(config_of("csrnet"), 100.0).eval()
    decoder = counter.decoders[DENSITY]
    layers = [*counter.encoder.get_submodule("features"), *counter.encoder.get_submodule("dilated")]  # type: ignore[misc]
    layers += [*decoder.get_submodule("layers"), decoder.get_submodule("map")]  # type: ignore[misc]

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*layers)
            self.mean, self.std = nn.Buffer(counter.mean), nn.Buffer(counter.std)

        def forward(self, image: Tensor) -> Tensor:
            density: Tensor = self.layers((image - self.mean) / self.std) / 100.0
            return density

    image = torch.randint(0, 256, (2, 3, 64, 80), dtype=torch.uint8)
    free = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    plain, exported = Plain().eval(), ExportedCounter(counter).eval()
    with torch.no_grad():
        graphs = [torch.export.export(model, (image,), dynamic_shapes=free).graph for model in (plain, exported)]
    operations = [[node.target for node in graph.nodes if node.op == "call_function"] for graph in graphs]
    assert operations[0] == operations[1]
    assert parameters(exported) == parameters(plain)
    with torch.inference_mode():
        assert torch.equal(exported(image), plain(image))
