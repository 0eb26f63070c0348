"""The model card of a counter: what it was trained on, its errors and limits, and how to load and repeat it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np

from crowdray.evaluation.intervals import Interval, mean_interval
from crowdray.evaluation.levels import LevelRow
from crowdray.evaluation.metrics import ImageCount, Metrics, summarise
from crowdray.registry.training_data import TrainingData

FIGURES = "figures"
"""Folder of figures among the artifacts of a run."""
PICTURE = "card.png"
"""Its picture for the card. MLflow shows pictures of descriptions at their full size."""
MAX_DESCRIPTION = 5000
"""Characters of a description that MLflow's database stores."""

_RESERVED = 1000
"""Characters of a description that remain for the promotions of a version."""


@dataclass(frozen=True)
class ErrorRow:
    """Errors of one predictor on a split."""

    predictor: str
    """What predicts."""
    metrics: Metrics
    """Its errors."""
    interval: Interval
    """95% interval of the MAE."""

    @classmethod
    def of(cls, predictor: str, counts: Sequence[ImageCount]) -> "ErrorRow":
        """Summarise the counts of a predictor."""
        return cls(predictor, summarise(counts), mean_interval([abs(c.predicted - c.truth) for c in counts]))


@dataclass(frozen=True)
class Source:
    """Where MLflow has a counter."""

    tracking_uri: str
    """Tracking URI without credentials."""
    model_uri: str
    """models:/NAME/VERSION"""
    run_id: str
    experiment_id: str
    study_id: str | None
    """Run of the study that the run is a trial of."""


@dataclass(frozen=True)
class ModelCard:
    """The facts of a model card."""

    name: str
    """Name of the run."""
    data: TrainingData
    """What it was trained on."""
    data_uri: str
    """Location of that dataset."""
    data_digest: str
    """Its content digest."""
    scenes: int
    """Number of its cameras or locations."""
    downsample: int
    """Factor by which the counter downsamples photos."""
    errors: Mapping[str, Sequence[ErrorRow]]
    """Errors by split, those of the counter first and those of always predicting the mean last."""
    levels: Sequence[LevelRow]
    """Errors by density level, on the last of these splits."""
    parameters: int
    """Number of parameters."""
    settings: Mapping[str, str]
    """Settings that distinguish counters."""
    start: str
    """URI of the initial weights or counter; empty for random weights."""
    command: str
    """Command that repeats the run."""
    revision: str
    """Git revision of the code."""
    folder: str
    """URI of the packaged counter."""
    example: str
    """Artifact of the run with a photo."""

    def to_markdown(self, source: Source | None = None) -> str:
        """Return the card; without `source`, its snippet loads the package from its folder."""
        return "\n\n".join(self._sections(source)) + "\n"

    def description(self, source: Source) -> str:
        """Return as much of the card as the description of a version may contain, in whole sections."""
        sections, rest = list(self._sections(source)), "The whole card is `card.md` among the artifacts of the run."
        if sum(len(section) + 2 for section in sections) <= MAX_DESCRIPTION - _RESERVED:
            return "\n\n".join(sections)
        while sections and sum(len(section) + 2 for section in [*sections, rest]) > MAX_DESCRIPTION - _RESERVED:
            sections.pop()
        return "\n\n".join([*sections, rest])

    def _sections(self, source: Source | None) -> Iterator[str]:
        yield self._summary()
        if source is not None:
            image = f"get-artifact?path={quote(f'{FIGURES}/{PICTURE}', safe='')}&run_uuid={source.run_id}"
            yield f"![Photos, heads and densities]({image})"
        yield f"## Load it\n\n```python\n{self._snippet(source)}\n```"
        yield f"## Errors\n\n{self._errors()}"
        if self.levels:
            yield f"## Errors by density, {list(self.errors)[-1]} images\n\n{self._levels()}"
        yield "## Limits\n\n" + "\n".join(f"- {limit}" for limit in self._limits())
        yield "## Licence\n\n" + self._licence()
        yield f"## Repeat it\n\nCode revision {self.revision}:\n\n```\n{self.command}\n```"
        if source is not None:
            yield _links(source)

    def _summary(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        scenes = "one scene" if self.scenes == 1 else f"{self.scenes:,} scenes"
        downsampled = f"; downsampled by {self.downsample} inside the model" if self.downsample > 1 else ""
        return (
            f"Crowd counter of the run {self.name}: a photo in, a density map out, whose sum is the number of people. "
            f"{self.parameters:,} parameters, {settings}. Trained on {self.data}, median "
            f"{self.data.heads.median:,.4g}, of {scenes}{downsampled}; dataset `{self.data_uri}`, digest "
            f"{self.data_digest[:12]}."
        )

    def _snippet(self, source: Source | None) -> str:
        if source is None:
            connect, uri, photo = "", self.folder, '"photo.jpg"  # your photo'
        else:
            connect, uri = f"mlflow.set_tracking_uri({_quoted(source.tracking_uri)})\n", source.model_uri
            artifact = _quoted(f"runs:/{source.run_id}/{self.example}")
            photo = f"mlflow.artifacts.download_artifacts({artifact})  # or your photo"
        return (
            "import mlflow\nimport numpy as np\nimport torch\nfrom PIL import Image\n\n"
            f"{connect}counter = mlflow.pytorch.load_model({_quoted(uri)})\n"
            f"path = {photo}\n"
            'photo = np.array(Image.open(path).convert("RGB"))\n'
            "density = counter(torch.from_numpy(photo).permute(2, 0, 1)[None])  # uint8 RGB (1, 3, H, W)\n"
            'print(f"{density.sum():.0f} people")'
        )

    def _errors(self) -> str:
        rows = [
            f"| {split} ({row.metrics.images:,}) | {row.predictor} | {row.metrics.mae:.2f} | {row.interval.low:.2f} to "
            f"{row.interval.high:.2f} | {row.metrics.rmse:.2f} | {row.metrics.bias:+.2f} |"
            for split, errors in self.errors.items()
            for row in errors
        ]
        head = ["| images | predictor | MAE | 95% | RMSE | bias |", "|---|---|---|---|---|---|"]
        return "\n".join([*head, *rows, "", "Heads per image. The interval is a bootstrap over images."])

    def _levels(self) -> str:
        rows = [
            f"| {row.level} | {row.heads[0]:,} to {row.heads[1]:,} | {row.metrics.images:,} | {row.metrics.mae:.2f} | "
            f"{row.metrics.bias:+.2f} | {'-' if np.isnan(row.metrics.nae) else f'{row.metrics.nae:.1%}'} |"
            for row in self.levels
        ]
        return "\n".join(["| level | heads | images | MAE | bias | relative |", "|---|---|---|---|---|---|", *rows])

    def _limits(self) -> Iterator[str]:
        if self.data.rendered:
            yield "It has never seen a photo: it shows how the platform works and is not meant for real crowds."
        for split, (own, *_, constant) in self.errors.items():
            if own.metrics.mae >= constant.metrics.mae:
                yield f"It does not beat {constant.predictor} on the {split} images."
        if self.scenes == 1:
            yield "All training photos show one scene: errors elsewhere are unknown, and probably larger."
        most = f"{self.data.heads.max:,.0f}"
        yield f"More than {most} heads in a photo, or other sizes than those above, are extrapolation."
        if "test" not in self.errors:
            yield "The dataset has no test split: the errors are those on which the best epoch was selected."
        smallest = min(errors[0].metrics.images for errors in self.errors.values())
        if smallest < 30:
            yield f"Only {smallest} images were evaluated of one split: its interval is a rough guess."
        yield "Frames of one video resemble each other: the intervals are then too narrow."

    def _licence(self) -> str:
        data = "rendered by crowdray (Apache-2.0)" if self.data.rendered else "not recorded; ask its publisher"
        start = f"from {self.start}, whose licence is not recorded" if self.start else "from scratch"
        return f"Data: {data}. Weights: trained {start}; their own licence is not recorded."


def _quoted(text: str) -> str:
    """Return a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _links(source: Source) -> str:
    def link(text: str, run_id: str) -> str:
        return f"[{text}](#/experiments/{source.experiment_id}/runs/{run_id})"

    study = f", {link('study', source.study_id)}" if source.study_id else ""
    return f"{link('Run', source.run_id)}{study}"
