"""Table of all evaluated images as CSV: a row for each image and counter."""

import csv
import io
from collections.abc import Iterable, Iterator

from crowdray.evaluation.images import EvaluatedImage, FailedImage
from crowdray.evaluation.localisation import MATCH_RADII
from crowdray.evaluation.metrics import GAME_LEVELS
from crowdray.evaluation.report import ModelResult, Outcome
from crowdray.pipeline.count_table import csv_cell, printable


def image_table(results: Iterable[ModelResult]) -> bytes:
    """Return the table as CSV; images that could not be evaluated have only an error."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in _rows(results):
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: csv_cell(value) for name, value in row.items()})
    return text.getvalue().encode()


def _rows(results: Iterable[ModelResult]) -> Iterator[dict[str, object]]:
    for result in results:
        evaluation = result.evaluation
        outcomes: list[Outcome] = [*evaluation.images, *evaluation.failed]
        for image in sorted(outcomes, key=lambda image: image.row):
            yield {
                "image": printable(image.name),
                **_measures(None if isinstance(image, FailedImage) else image),
                "model": result.model.version,
                "data": result.dataset.uri,
                "split": result.dataset.split,
                "failure": printable(image.error) if isinstance(image, FailedImage) else None,
            }


def _measures(image: EvaluatedImage | None) -> dict[str, object]:
    inside, whole, quality, matches = (
        (image.inside, image.whole, image.quality, image.matches) if image else (None,) * 4
    )
    low, high = (image.interval if image else None) or (None, None)
    return {
        "scene": image and printable(image.scene),
        "annotated": inside and inside.truth,
        "predicted": inside and inside.predicted,
        "error": inside and inside.predicted - inside.truth,
        "low": low,
        "high": high,
        "annotated_whole": whole and whole.truth,
        "predicted_whole": whole and whole.predicted,
        **{f"game{level}": inside and inside.game[level] for level in GAME_LEVELS if level},
        "psnr": quality and quality.psnr,
        "ssim": quality and quality.ssim,
        "located": matches and matches.predicted,
        **{f"matched_{radius:g}px": matches and matches.matched[number] for number, radius in enumerate(MATCH_RADII)},
    }
