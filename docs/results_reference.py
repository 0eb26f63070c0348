"""MkDocs hook: fill the page of results from the records in results/, with a figure of each."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from crowdray.ablation.figures import draw_record  # noqa: E402
from crowdray.ablation.paper import TABLES  # noqa: E402
from crowdray.ablation.record import AblationRecord, read_records  # noqa: E402
from crowdray.ablation.summary import ArmSummary  # noqa: E402
from crowdray.ablation.verdict import verdicts  # noqa: E402
from crowdray.evaluation.comparison import Comparison  # noqa: E402
from crowdray.evaluation.intervals import Interval  # noqa: E402

RESULTS, MARKER, FIGURES = ROOT / "results", "<!-- results -->", "figures/results"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the figures of each record."""
    from mkdocs.structure.files import File  # the tables need no mkdocs

    for record in read_records(str(RESULTS)):
        with tempfile.TemporaryDirectory() as folder:
            for path in draw_record(record, Path(folder)):
                uri = f"{FIGURES}/{record.name}/{path.name}"
                files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Replace the marker of the page of results."""
    if page.file.src_uri != "results.md":
        return markdown
    figures = [file.src_uri for file in files if file.src_uri.startswith(f"{FIGURES}/")]
    sections = ("\n\n".join(section(record, figures)) for record in read_records(str(RESULTS)))
    return markdown.replace(MARKER, "\n\n".join(sections) or "No record yet.")


def section(record: AblationRecord, figures: list[str]) -> Iterator[str]:
    """Yield the parts of a record's section: heading, table, sentences, figures and provenance."""
    images = record.arms[0].errors.images
    yield f"## {record.dataset}: {record.name}"
    kind = "test images" if record.split == "test" else "validation images, as the dataset has no test split"
    yield f"{images:,} {kind}; preset `{record.preset}`."
    yield table(record)
    yield "\n".join(f"- {sentence}" for sentence in verdicts(record))
    for figure in figures:
        if figure.startswith(f"{FIGURES}/{record.name}/"):
            what = "Error by loss weight" if "sweep" in figure else "Gain of each arm"
            yield f"![{what}, {record.name}]({figure})"
    yield '??? note "How it was measured"\n\n    ' + "\n    ".join(f"- {fact}" for fact in provenance(record))


def table(record: AblationRecord) -> str:
    """A row per arm, with the paper's numbers where it has them."""
    several = len({(arm.fraction, arm.backbone) for arm in record.arms}) > 1
    papers = [TABLES.get((record.dataset, arm.backbone)) if arm.fraction == 1 else None for arm in record.arms]
    source = next((paper.source for paper in papers if paper), None)
    head = ["arm", *(["labels", "backbone"] if several else []), "seeds", "MAE (95%)", "RMSE (95%)", "bias"]
    head += ["gain over none (95%)", "p", "gain over placebo (95%)"]
    head += [f"paper, {source}: MAE / RMSE", "gain"] if source else []
    rows = [head, ["---"] * len(head)]
    for arm, paper in zip(record.arms, papers, strict=True):
        errors = arm.errors
        cells = [f"`{arm.arm}`", *([f"{arm.fraction:.0%}", arm.backbone] if several else []), str(len(arm.seeds))]
        cells += [with_interval(errors.mae, errors.mae_interval), with_interval(errors.rmse, errors.rmse_interval)]
        cells += [f"{errors.bias:+.2f}", gain(arm.gain), p_value(arm), gain(arm.gain_over_placebo)]
        if source:
            known = paper.errors.get(arm.arm) if paper else None
            reported = paper.gain(arm.arm) if paper else None
            cells += [f"{known[0]:.2f} / {known[1]:.2f}" if known else "", f"{reported:+.2f}" if reported else ""]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_interval(value: float, interval: Interval) -> str:
    """A number with its interval."""
    return f"{value:.2f} ({interval.low:.2f}&nbsp;to&nbsp;{interval.high:.2f})"


def gain(comparison: Comparison | None) -> str:
    """A gain with its interval, in bold where the interval excludes 0."""
    if comparison is None:
        return ""
    low, high = comparison.interval.low, comparison.interval.high
    text = f"{comparison.gain:+.2f}"
    return f"{f'**{text}**' if low > 0 or high < 0 else text} ({low:+.2f}&nbsp;to&nbsp;{high:+.2f})"


def p_value(arm: ArmSummary) -> str:
    """The test over the seeds."""
    return f"{arm.gain.p_value:.2g}" if arm.gain and arm.gain.p_value is not None else ""


def provenance(record: AblationRecord) -> Iterator[str]:
    """Yield what makes the record repeatable."""
    machine, packages = record.machine, record.machine.packages
    yield f"`{record.command}`"
    yield f"{record.date}, revision {record.revision}, dataset digest {record.data_digest[:12]}"
    versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    yield f"{machine.device}, {machine.cores} cores; Python {machine.python}, {versions}"
    updates = sorted({arm.updates for arm in record.arms})
    seconds = sum(arm.seconds * len(arm.seeds) for arm in record.arms)
    yield f"{' or '.join(f'{number:,}' for number in updates)} updates per run, {seconds / 3600:.1f} hours of training"
    if record.block > 1:
        yield f"intervals resample {record.block} consecutive frames together"
    for number, read in enumerate(record.test_reads, start=1):
        reason = f": {read.reason}" if read.reason else ""
        yield f"read {number} of the test split, {read.time[:16]}, {read.cells} runs{reason}"
    yield f"other ablations in the same storage that had read this test split: {record.other_reads}"
