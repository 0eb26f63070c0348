"""A tiny model of transformers as depth teacher predicts as it does alone; others raise an error."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTImageProcessorPil,
)

from crowdray.datasets.depth import open_teacher
from crowdray.datasets.depth.huggingface import HuggingFaceDepth
from crowdray.datasets.depth.inverse import depth_of_inverse
from crowdray.datasets.depth.teacher import DepthInput
from crowdray.errors import UserError

from ...support.builders import make_depth_input

SIDE = 28


def backbone() -> Dinov2Config:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    layers: dict[str, Any] = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    return Dinov2Config(**sizes, **layers, image_size=SIDE)


def save_model(folder: Path, kind: str = "relative") -> Path:
    """Save a Depth Anything model with 30,000 random weights, large enough for its depth to vary."""
    torch.manual_seed(7)
    config = DepthAnythingConfig(
        backbone_config=backbone(),
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        patch_size=14,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )
    model: Any = DepthAnythingForDepthEstimation(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if kind == "relative":
        torch.nn.init.constant_(model.head.conv3.bias, 3)  # the last layer is a ReLU
    model.save_pretrained(folder)
    sides = {"height": SIDE, "width": SIDE}
    DPTImageProcessorPil(size=sides, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    for kind in ("relative", "metric"):
        save_model(folder / kind, kind)
    return folder


def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def depth_input() -> DepthInput:
    return make_depth_input(pixels())


def direct(folder: Path) -> NDArray[np.float32]:
    """Prediction of the network without any image processor; the image already has the input size."""
    model: Any = DepthAnythingForDepthEstimation.from_pretrained(folder)
    normalised = torch.from_numpy((pixels() / 255 - 0.5) / 0.25).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        depth: NDArray[np.float32] = model.eval()(normalised).predicted_depth[0].numpy()
    return depth


def test_depth_equals_the_model_and_follows_its_depth_type(models: Path) -> None:
    threads = torch.get_num_threads()
    for kind in ("relative", "metric"):
        expected = direct(models / kind)
        inverse = depth_of_inverse(expected, 6)
        for options, wanted in (
            (",range=6", inverse if kind == "relative" else expected),
            (",range=6,inverse", inverse),
            (",metric", expected),
        ):
            depth = open_teacher(f"hf:{models / kind}{options}", ()).depth(depth_input())
            assert depth is not None and depth.dtype == np.float32 and np.ptp(expected) > 0
            np.testing.assert_allclose(depth, wanted, rtol=1e-3, atol=1e-5)
    assert torch.get_num_threads() == threads


def test_teacher_is_identified_by_content_and_pickled_without_weights(models: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models / "metric", copy)
    teacher = HuggingFaceDepth(str(copy))
    assert teacher.name == HuggingFaceDepth(str(models / "metric")).name and teacher.name.startswith("hf-1:")
    assert HuggingFaceDepth(f"{models / 'relative'}").name != teacher.name != HuggingFaceDepth(f"{copy},inverse").name
    expected = teacher.depth(depth_input())
    pickled = pickle.dumps(teacher)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).depth(depth_input()), expected)
    weights = load_file(copy / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, copy / "model.safetensors")
    with pytest.raises(UserError, match="copy changed during the conversion"):
        pickle.loads(pickled).depth(depth_input())
    missing = min(weights)
    weights.pop(missing)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks weights, such as {missing}"):
        HuggingFaceDepth(str(copy)).depth(depth_input())


def test_hub_model_is_downloaded_at_one_commit(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        requests.append((name, revision))
        return str(models / "metric")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    teacher = pickle.loads(pickle.dumps(HuggingFaceDepth("user/tiny")))
    expected = HuggingFaceDepth(str(models / "metric")).depth(depth_input())
    np.testing.assert_array_equal(teacher.depth(depth_input()), expected)
    assert requests == [("user/tiny", None), ("user/tiny", "metric")]


def test_unsuitable_models_raise(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, heads, metric = tmp_path / "plain", tmp_path / "heads", models / "metric"
    for folder, config in ((plain, backbone()), (heads, DPTConfig(backbone_config=backbone()))):
        shutil.copytree(metric, folder)
        config.save_pretrained(folder)
    unknown = shutil.copytree(metric, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    for choice, message in {
        f"{plain}": "is a dinov2, which does not estimate depth",
        f"{heads}": "dpt on dinov2.*,inverse.*,metric",
        f"{unknown}": r"cannot read .*config\.json",
        f"{metric},inverse,metric": "inverse and metric exclude each other",
        "not a name": "cannot download not a name",
    }.items():
        with pytest.raises(UserError, match=message):
            open_teacher(f"hf:{choice}", ())
    assert open_teacher(f"hf:{heads},metric", ()).name.endswith(":metric")
    gpu = open_teacher(f"hf:{models / 'metric'},cuda", ())
    assert gpu.gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no GPU"):
        gpu.depth(depth_input())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install transformers"):
        open_teacher(f"hf:{models / 'metric'}", ())
