"""Check of a whole source, before or after conversion: statistics, examples and problems."""

import json
from collections.abc import Sequence

from crowdray import storage
from crowdray.cluster.parallel import Progress, map_slices, no_progress
from crowdray.config import TargetConfig
from crowdray.data.sample import Sample
from crowdray.datasets.conversion import split_into_slices
from crowdray.datasets.sources import Item, Source
from crowdray.datasets.statistics import DatasetStats, compute_stats, count_quantiles
from crowdray.datasets.validation import REPORT, ValidationReport, validate
from crowdray.errors import DataError
from crowdray.plots.contact_sheet import draw_contact_sheet
from crowdray.plots.dataset import draw_histograms

SHEET, HISTOGRAMS = "contact-sheet.png", "histograms.png"
"""Figures in the report folder."""

_EXAMPLES_PER_SPLIT, _EXAMPLES = 6, 24
"""Images on the contact sheet: per split, and of all splits."""


def check(
    source: Source, report: str, *, splits: Sequence[str] = (), progress: Progress = no_progress
) -> ValidationReport:
    """Load every image of a source and write statistics and figures to the path or URI `report`.

    Nothing is converted. Faulty images are part of the result, which does not depend on the number of workers.
    """
    report = storage.resolve(report)
    items = source.items(splits)
    if not items:
        raise DataError(f"{source.name}: there is nothing to check; check --source and --split")
    stats = dict(map_slices(_compute_stats, source, list(enumerate(split_into_slices(items))), progress=progress))
    total = sum((stats[number] for number in sorted(stats)), DatasetStats())
    result = validate(source.name, source.teacher.name, total, source.notes(splits))
    content = json.dumps(result.as_dict(), indent=1) + "\n"
    storage.write_bytes(storage.join(report, REPORT), content.encode())
    images, heads = len(result.images), sum(stats.heads for stats in result.splits.values())
    title = f"{result.source}: from the sparsest to the densest of {images:,} images, {heads:,} heads"
    target = TargetConfig()
    draw_contact_sheet(_examples(source, items, result), title, storage.join(report, SHEET), target=target)
    draw_histograms(result, storage.join(report, HISTOGRAMS))
    return result


def _compute_stats(source: Source, items: Sequence[Item], number: int) -> DatasetStats:
    return compute_stats(source, items)


def _examples(source: Source, items: Sequence[Item], report: ValidationReport) -> list[Sample]:
    """Samples of each split, loaded again, that cover its range of head counts."""
    number = min(_EXAMPLES_PER_SPLIT, max(1, _EXAMPLES // len(report.splits)))
    chosen = [
        (image.split, image.name)
        for split in report.splits
        for image in count_quantiles([image for image in report.images if image.split == split], number)
    ]
    by_name = {(item.split, item.name): item for item in items}
    return [source.load(by_name[name]) for name in chosen[:_EXAMPLES]]
