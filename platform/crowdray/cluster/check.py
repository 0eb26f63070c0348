"""A look at a whole source before it is converted, or after: its figures, its pictures, and whether it is sound."""

import json
from collections.abc import Sequence

from crowdray import storage
from crowdray.cluster.parallel import Progress, map_slices, no_progress
from crowdray.config import TargetConfig
from crowdray.data.sample import Sample
from crowdray.datasets.conversion import slices
from crowdray.datasets.sources import Item, Source
from crowdray.datasets.statistics import DatasetStats, evenly_by_count, inspect_items
from crowdray.datasets.validation import ValidationReport, validate
from crowdray.errors import DataError
from crowdray.plots.contact_sheet import draw_contact_sheet
from crowdray.plots.dataset import draw_histograms

REPORT, SHEET, HISTOGRAMS = "check.json", "contact-sheet.png", "histograms.png"
"""What a check leaves."""

_SHOWN_OF_SPLIT, _SHOWN = 6, 24
"""Images on the contact sheet: of a split where there are few of them, and of all together."""


def check(
    source: Source, report: str, *, splits: Sequence[str] = (), progress: Progress = no_progress
) -> ValidationReport:
    """Look at every image of a source, or of some of its splits, and leave figures and pictures at the URI `report`.

    Nothing is converted, and what is wrong with an image does not end it: everything found is in the result. What it
    says does not depend on who looked. Raises DataError where there is nothing to look at.
    """
    report = storage.resolve(report)
    items = source.items(splits)
    if not items:
        raise DataError(f"{source.name}: there is nothing to check; check --source and --split")
    found = dict(map_slices(_inspect, source, list(enumerate(slices(items))), progress=progress))
    everything = sum((found[number] for number in sorted(found)), DatasetStats())
    sound = validate(source.name, source.depth_teacher, everything, source.notes(splits))
    content = json.dumps(sound.content(), indent=1) + "\n"
    storage.write_bytes(storage.join(report, REPORT), content.encode())
    images, heads = len(sound.images), sum(facts.heads for facts in sound.splits.values())
    title = f"{sound.source}: from the sparsest to the densest of {images:,} images, {heads:,} heads"
    target = TargetConfig()
    draw_contact_sheet(_examples(source, items, sound), title, storage.join(report, SHEET), target=target)
    draw_histograms(sound, storage.join(report, HISTOGRAMS))
    return sound


def _inspect(source: Source, items: Sequence[Item], number: int) -> DatasetStats:
    return inspect_items(source, items)


def _examples(source: Source, items: Sequence[Item], sound: ValidationReport) -> list[Sample]:
    """Samples of each split, loaded again, that span its counts."""
    number = min(_SHOWN_OF_SPLIT, max(1, _SHOWN // len(sound.splits)))
    chosen = [
        (image.split, image.name)
        for split in sound.splits
        for image in evenly_by_count([image for image in sound.images if image.split == split], number)
    ]
    places = {(item.split, item.name): item for item in items}
    return [source.load(places[name]) for name in chosen[:_SHOWN]]
