"""A model card with invented facts."""

from crowdray.evaluation.levels import error_levels
from crowdray.evaluation.metrics import ImageCount
from crowdray.registry.card import ErrorRow, ModelCard
from crowdray.registry.training_data import Appearance, Range, TrainingData

COUNTS = [ImageCount(row, truth, truth + (-1) ** row * 2.0, 0.0) for row, truth in enumerate((3, 90, 12, 0, 45, 7))]


def model_card(**changes: object) -> ModelCard:
    data = TrainingData(
        dataset="mall",
        rendered=False,
        images=720,
        total_heads=22000,
        heads=Range(13, 31, 53),
        width=Range(320, 640, 640),
        height=Range(240, 480, 480),
        pixels=Range(76800, 307200, 307200),
        density=Range(42, 101, 690),
        appearance=Appearance((0.0,) * 7, ((0.0,) * 7,) * 7, 4.0),
    )
    facts: dict[str, object] = {
        "name": "mall-1",
        "data": data,
        "data_uri": "data/mall",
        "data_digest": "d" * 64,
        "scenes": 1,
        "downsample": 2,
        "errors": {"validation": _errors(COUNTS[:2]), "test": _errors(COUNTS)},
        "levels": error_levels(COUNTS),
        "parameters": 1234,
        "settings": {"backbone": "cfcn", "seed": "0"},
        "start": "",
        "command": "jobs/train.py --preset runs/mall-1/config.json",
        "revision": "abc",
        "folder": "runs/mall-1/model",
        "example": "figures/example.jpeg",
    }
    return ModelCard(**(facts | changes))  # type: ignore[arg-type]


def _errors(counts: list[ImageCount]) -> list[ErrorRow]:
    constant = [ImageCount(count.row, count.truth, 26.2, 26.2) for count in counts]
    return [ErrorRow.of("this counter", counts), ErrorRow.of("always 26.2, the training mean", constant)]
