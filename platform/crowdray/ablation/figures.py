"""Figures of a finished ablation: gains, sweeps next to the paper's Figure 5, and its Figures 4a and 6."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from crowdray import storage
from crowdray.ablation.arms import ALL, NONE, PLACEBO, TASKS
from crowdray.ablation.paper import FIGURE_5, TABLES
from crowdray.ablation.protocol import Ablation, Cell
from crowdray.ablation.record import AblationRecord
from crowdray.ablation.result import CellResult
from crowdray.ablation.summary import ArmSummary, final_counts
from crowdray.data.image_cache import ImageCache
from crowdray.data.shards import Dataset
from crowdray.evaluation.intervals import Interval
from crowdray.evaluation.metrics import ImageCount
from crowdray.models.build import build_counter
from crowdray.models.counter import Counter
from crowdray.pipeline.figures import overview_rows
from crowdray.plots.ablation import ArmGain, SweepPoint, draw_gains, draw_groups, draw_sweeps, group_counts
from crowdray.plots.training import draw_overview
from crowdray.training.checkpoint import Checkpoint, load_checkpoint


def draw_figures(
    ablation: Ablation, record: AblationRecord, cells: Sequence[CellResult], dataset: Dataset, folder: Path
) -> list[Path]:
    """Draw all figures of an ablation into a folder; those that need an arm that it lacks are omitted."""
    paths = draw_record(record, folder)
    group = (record.arms[0].fraction, record.arms[0].backbone)
    found = {(cell.arm, cell.seed): cell for cell in cells if (cell.fraction, cell.backbone) == group}
    seeds = [seed for seed in ablation.seeds if (NONE, seed) in found and (ALL, seed) in found]
    if not seeds:
        return paths
    levels, maps = folder / "levels.png", folder / "maps.png"
    _draw_levels([[final_counts(found[arm, seed]) for seed in seeds] for arm in (NONE, ALL)], record, levels)
    checkpoints = {}
    for cell in ablation.cells:
        if cell.group == group and cell.seed == seeds[0] and cell.arm.name in (NONE, ALL):
            checkpoints[cell.arm.name] = _load(ablation, cell)
    _draw_maps(checkpoints, dataset, record, maps)
    return [*paths, levels, maps]


def draw_record(record: AblationRecord, folder: Path) -> list[Path]:
    """Draw what the record alone contains into a folder: gains, and sweeps.

    The figures of the first fraction and backbone are gains.png and sweep.png; the others are numbered.
    """
    groups: dict[tuple[float, str], dict[str, ArmSummary]] = {}
    for arm in record.arms:
        groups.setdefault((arm.fraction, arm.backbone), {})[arm.arm] = arm
    paths = []
    for number, ((fraction, backbone), arms) in enumerate(groups.items(), start=1):
        if NONE not in arms:
            continue
        suffix = f"-{number}.png" if number > 1 else ".png"
        labels = f", {fraction:.0%} of the labels, {backbone}" if len(groups) > 1 else ""
        named = {name: arm for name, arm in arms.items() if "=" not in name}
        if len(named) > 1:
            paths.append(folder / f"gains{suffix}")
            _draw_gains(named, record, title_of(record, arms[NONE]) + labels, paths[-1])
        if sweeps := _sweeps(arms):
            paths.append(folder / f"sweep{suffix}")
            draw_sweeps(sweeps, FIGURE_5, paths[-1], title=f"{record.dataset}{labels}", paper_title="ShanghaiTech B")
    return paths


def title_of(record: AblationRecord, arm: ArmSummary) -> str:
    """Return the dataset, split and size of an arm's errors."""
    seeds = f"{len(arm.seeds)} seed{'s' * (len(arm.seeds) != 1)}"
    return f"{record.dataset}, {record.split}: {arm.errors.images:,} images, {seeds}"


def _draw_gains(arms: Mapping[str, ArmSummary], record: AblationRecord, title: str, path: Path) -> None:
    none, placebo = arms[NONE], arms.get(PLACEBO)
    table = TABLES.get((record.dataset, none.backbone)) if none.fraction == 1 else None
    gains = [
        ArmGain(arm.arm, arm.errors.mae, arm.gain, table.gain(arm.arm) if table else None)
        for arm in arms.values()
        if arm.gain is not None
    ]
    over = placebo.gain if placebo else None
    draw_gains(gains, path, reference_mae=none.errors.mae, placebo=over, title=title)


def _sweeps(arms: Mapping[str, ArmSummary]) -> dict[str, list[SweepPoint]]:
    """Points of each swept task, with the arm `none` as weight 0."""
    zero, sweeps = arms[NONE].errors.mae, {}
    for task in TASKS:
        points = [
            SweepPoint(arm.weights[task], arm.errors.mae, Interval(zero - gain.interval.high, zero - gain.interval.low))
            for name, arm in arms.items()
            if name.startswith(f"{task}=") and (gain := arm.gain)
        ]
        if points:
            sweeps[task] = [SweepPoint(0.0, zero, None), *points]
    return sweeps


def _draw_levels(models: Sequence[Sequence[Sequence[ImageCount]]], record: AblationRecord, path: Path) -> None:
    """Draw the counts by density of `none` and `all`; of the first seed alone where seeds count different images."""
    rows = [{count.row for count in seed} for seed in models[0]]
    if any(found != rows[0] for found in rows):
        models = [seeds[:1] for seeds in models]
    seeds = f"{len(models[0])} seed{'s' * (len(models[0]) != 1)}"
    title = f"{record.dataset}, {record.split}: {len(rows[0]):,} images, {seeds}"
    draw_groups(group_counts(models, record.block), (NONE, ALL), path, title)


def _load(ablation: Ablation, cell: Cell) -> Checkpoint:
    with storage.local_copy(ablation.folder(cell)) as local:
        return load_checkpoint(local)


def _draw_maps(checkpoints: Mapping[str, Checkpoint], dataset: Dataset, record: AblationRecord, path: Path) -> None:
    """Draw the maps of the arm `all` next to the density of `none`, of the first seed."""
    config, counters = checkpoints[ALL].config, {arm: _counter(found) for arm, found in checkpoints.items()}
    rows = overview_rows(dataset, "test" if record.split == "test" else "train")
    images = ImageCache(dataset, config.sampling.downsample, config.sampling.roi, 0)
    draw_overview(
        counters[ALL],
        [images[row] for row in rows],
        path,
        sigma=config.target.sigma,
        threshold=config.target.threshold,
        baseline=counters[NONE],
        title=f"{record.dataset}: baseline is none, joint model is all, seed {config.seed}",
        names=[dataset.sample(row).name for row in rows],
    )


def _counter(checkpoint: Checkpoint) -> Counter:
    """Return a counter with the weights of its last stage and its auxiliary maps."""
    counter = build_counter(checkpoint.config, checkpoint.progress.density_scale).eval()
    counter.load_state_dict(checkpoint.weights, strict=False)  # without the count decoder
    counter.load_state_dict(checkpoint.best_weights[[*checkpoint.progress.best][-1]], strict=False)
    return counter
