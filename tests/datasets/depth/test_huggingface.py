"""Networks of transformers as depth teachers: a tiny one says what it says outside of here, the rest is explained."""

import io
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
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTImageProcessorPil,
)

from crowdray.datasets.depth import Hub, View, huggingface, open_teacher
from crowdray.datasets.depth.inverse import depth_of_inverse
from crowdray.errors import UserError

SIDE = 28


def backbone() -> Dinov2Config:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    layers: dict[str, Any] = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    return Dinov2Config(**sizes, **layers, image_size=SIDE)


def save_model(place: Path, kind: str = "relative") -> Path:
    """A Depth Anything of 30,000 random numbers, large enough ones for its depth to vary."""
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
        torch.nn.init.constant_(model.head.conv3.bias, 3)  # a ReLU comes last
    model.save_pretrained(place)
    sides = {"height": SIDE, "width": SIDE}
    DPTImageProcessorPil(size=sides, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("models")
    for kind in ("relative", "metric"):
        save_model(place / kind, kind)
    return place


def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def view() -> View:
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, format="PNG")
    return View(image=buffer.getvalue(), height=SIDE, width=SIDE, points=np.zeros((0, 2)), split="train", name="a")


def direct(place: Path) -> NDArray[np.float32]:
    """What the network says, without its image processor and without ours: the image has its size already."""
    model: Any = DepthAnythingForDepthEstimation.from_pretrained(place)
    normalised = torch.from_numpy((pixels() / 255 - 0.5) / 0.25).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        depth: NDArray[np.float32] = model.eval()(normalised).predicted_depth[0].numpy()
    return depth


def test_a_model_s_depth_is_its_own_and_runs_the_way_it_says(models: Path) -> None:
    threads = torch.get_num_threads()
    for kind in ("relative", "metric"):
        expected = direct(models / kind)
        inverse = depth_of_inverse(expected, 6)
        for options, wanted in (
            (",range=6", inverse if kind == "relative" else expected),
            (",range=6,inverse", inverse),
            (",metric", expected),
        ):
            taught = open_teacher(f"hf:{models / kind}{options}", ()).depth(view())
            assert taught is not None and taught.dtype == np.float32 and np.ptp(expected) > 0
            np.testing.assert_allclose(taught, wanted, rtol=1e-3, atol=1e-5)
    assert torch.get_num_threads() == threads


def test_a_model_is_known_by_its_content_and_travels_without_its_weights(models: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models / "metric", copy)
    teacher = Hub(str(copy))
    assert teacher.name == Hub(str(models / "metric")).name and teacher.name.startswith("hf-1:") and not teacher.gpu
    assert Hub(f"{models / 'relative'}").name != teacher.name != Hub(f"{copy},inverse").name
    expected = teacher.depth(view())
    travelled = pickle.dumps(teacher)
    assert len(travelled) < 2000
    np.testing.assert_array_equal(pickle.loads(travelled).depth(view()), expected)
    weights = load_file(copy / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, copy / "model.safetensors")
    with pytest.raises(UserError, match="copy is not what it was when the conversion began"):
        pickle.loads(travelled).depth(view())
    lost = min(weights)
    weights.pop(lost)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=f"lacks weights, such as {lost}"):
        Hub(str(copy)).depth(view())


def test_a_name_on_the_hub_is_fetched_at_one_commit(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(models / "metric")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    teacher = pickle.loads(pickle.dumps(Hub("somebody/tiny")))
    np.testing.assert_array_equal(teacher.depth(view()), Hub(str(models / "metric")).depth(view()))
    assert asked == [("somebody/tiny", None), ("somebody/tiny", "metric")]


def test_a_model_that_cannot_teach_is_refused(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "plain": (backbone(), "is a dinov2, which estimates no depth"),
        "heads": (DPTConfig(backbone_config=backbone()), "dpt on dinov2.*,inverse.*,metric"),
    }
    for name, (config, complaint) in cases.items():
        shutil.copytree(models / "metric", tmp_path / name)
        config.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=complaint):
            open_teacher(f"hf:{tmp_path / name}", ())
    assert open_teacher(f"hf:{tmp_path / 'heads'},metric", ()).name.endswith(":metric")
    (tmp_path / "plain" / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        open_teacher(f"hf:{tmp_path / 'plain'}", ())
    with pytest.raises(UserError, match="inverse and metric exclude each other"):
        open_teacher(f"hf:{models / 'metric'},inverse,metric", ())
    gpu = open_teacher(f"hf:{models / 'metric'},cuda", ())
    assert gpu.gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch found no GPU here"):
        gpu.depth(view())
    with pytest.raises(UserError, match="cannot fetch not a name"):
        open_teacher("hf:not a name", ())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'crowdray\[hf\]'"):
        open_teacher(f"hf:{models / 'metric'}", ())


def test_a_model_runs_on_cudnn() -> None:
    with huggingface._repeatable():
        assert torch.backends.cudnn.enabled and torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.allow_tf32
