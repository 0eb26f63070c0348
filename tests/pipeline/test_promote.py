"""Evidence of a promotion: errors on the same images, and the density of the network that was stripped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crowdray.data.shards import Dataset
from crowdray.evaluation.images import evaluate_images
from crowdray.evaluation.metrics import Metrics
from crowdray.models.build import build_counter
from crowdray.models.counter import DENSITY
from crowdray.models.export import ExportedCounter, Geometry
from crowdray.pipeline import promote as promotion
from crowdray.pipeline.promote import promote
from crowdray.presets import debug
from crowdray.registry.promotion import Bounds, Evidence, FetchedVersion
from crowdray.training.checkpoint import BestEpoch, Checkpoint, Progress, save_checkpoint
from crowdray.training.result import StageResult, TrainingResult

from ..support.counters import photo

METRICS = Metrics(images=2, mae=1.0, rmse=1.5, bias=0.5, nae=0.1, mae_unmasked=1.0)
RESULT = TrainingResult("joint", {"joint": StageResult(BestEpoch(3, 1.0, 1.5), METRICS, None)}, [], {}, 4.0, None)


class ConstantCounter:
    """A counter that spreads the same number of heads over every image."""

    geometry = Geometry(1, 1, 4, 4)

    def __init__(self, heads: float) -> None:
        self.heads = heads

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        return torch.full((1, 1, height, width), self.heads / (height * width))


class RecordingRegistry:
    """A registry whose versions are constant counters of as many heads as their number."""

    name = "crowdray-discs"

    def __init__(self, champion: int | None) -> None:
        self.held = champion

    def resolve(self, version: str | None) -> int:
        return 4

    def champion(self) -> int | None:
        return self.held

    def fetch(self, version: int, folder: Path) -> FetchedVersion:
        return FetchedVersion(version, folder, 1000 * version, None)

    def decide(self, evidence: Evidence, bounds: Bounds) -> Evidence:
        return evidence


@pytest.mark.parametrize("champion", [None, 1])
def test_promote_compares_errors_on_the_same_images(
    discs: Dataset, champion: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "load_counter", lambda folder, *_: ConstantCounter(float(Path(folder).name)))
    monkeypatch.setattr(promotion, "clean_load_problem", lambda *_: "")
    registry: Any = RecordingRegistry(champion)
    evidence: Any = promote(registry, None, discs.uri, "test", Bounds())
    # The upper eighth of an image with a region of interest lies outside of it.
    truth = [(image.inside.truth, image.inside.predicted / image.whole.predicted) for image in _evaluated(discs)]
    expected = [abs(4.0 * part - heads) for heads, part in truth]
    mean = float(discs.counts("train").mean())
    opponent = [abs((part if champion else mean) - heads) for heads, part in truth]
    assert evidence.candidate_mae == pytest.approx(np.mean(expected))
    assert evidence.opponent_mae == pytest.approx(np.mean(opponent))
    assert evidence.gain.low <= np.mean(opponent) - np.mean(expected) <= evidence.gain.high
    assert (evidence.champion, evidence.size_ratio) == (champion, 4.0 if champion else None)
    assert (evidence.parent, evidence.parent_differs) == ("the run of the version is gone", False)


def _evaluated(discs: Dataset) -> list[Any]:
    rows = discs.rows("test").tolist()
    return list(evaluate_images(ConstantCounter(1.0), discs, rows, geometry=ConstantCounter.geometry))


def test_density_of_a_stripped_counter_is_that_of_its_whole_network(tmp_path: Path) -> None:
    whole = build_counter(debug(), density_scale=10.0).eval()
    best = {
        name: value for name, value in whole.state_dict().items() if name.startswith(("encoder", f"decoders.{DENSITY}"))
    }
    trained = tmp_path / "trained"
    trained.mkdir()
    save_checkpoint(
        Checkpoint(
            debug(),
            Progress(10.0, 1.0, "d", 1, best={"joint": BestEpoch(3, 1.0, 1.5)}),
            whole.state_dict(),
            best_weights={"joint": best},
        ),
        trained,
    )
    (trained / "result.json").write_text(RESULT.to_json())
    image = photo(1, 50, 97)
    with torch.inference_mode():
        density = ExportedCounter(whole).eval()(image)
    fetched = FetchedVersion(1, tmp_path, 1, str(tmp_path))
    assert promotion._compare_with_parent(density, image, fetched) == ("", False)
    assert promotion._compare_with_parent(density + 1, image, fetched) == ("", True)
    elsewhere = FetchedVersion(1, tmp_path, 1, str(tmp_path / "elsewhere"))
    assert "is not reachable from here" in promotion._compare_with_parent(density, image, elsewhere)[0]
