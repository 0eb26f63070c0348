"""Outcome of a run: outcome.json in its folder, written last."""

from dataclasses import asdict, dataclass, replace
from typing import Self

from crowdray import storage
from crowdray.credentials import redacted
from crowdray.documents import parse_as, parse_document, to_document
from crowdray.errors import DataError
from crowdray.pipeline.run import Run
from crowdray.training.result import TrainingResult


@dataclass(frozen=True)
class Outcome:
    """Results of a run, and the locations of its files."""

    run: str
    """Folder of the run."""
    result: TrainingResult
    """Errors and history."""
    model: str
    """Folder of the packaged counter."""
    figure: str
    """URI of the overview figure."""
    registered: str | None
    """Registered version as models:/NAME/VERSION; None without a tracking URI."""
    alias: str | None
    """Alias that the version received; None if it received none, or may have lost it since."""
    tracking_uri: str | None
    """MLflow tracking URI."""
    run_id: str | None
    """MLflow run id."""
    run_url: str | None
    """Web page of the MLflow run: of its server, or of `make ui` for a database; None for an outcome of an earlier
    version."""
    decision: str | None = None
    """Which version is `candidate` after the registration, and why."""
    runs_url: str | None = None
    """Web page with all runs on the dataset."""

    @property
    def model_uri(self) -> str:
        """URI that always loads this counter; an alias may move to another one."""
        return self.registered or self.model

    @classmethod
    def of_finished(cls, run: Run, tracking_uri: str | None) -> Self | None:
        """Return the outcome of a run that is finished and tracked at `tracking_uri`, without its alias."""
        if not storage.exists(run.outcome):
            return None
        outcome = cls.from_json(storage.read_bytes(run.outcome), run.outcome)
        # A previous version recorded credentials too.
        uris = (outcome.tracking_uri, outcome.run_url, outcome.runs_url)
        recorded, url, runs = (uri and redacted(uri) for uri in uris)
        same = recorded == (tracking_uri and redacted(tracking_uri))
        found = replace(outcome, tracking_uri=recorded, run_url=url, runs_url=runs, alias=None, decision=None)
        return found if same else None

    def to_json(self) -> str:
        """Return the outcome as JSON text."""
        return to_document(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: bytes, uri: str) -> Self:
        """Parse the text of `to_json`; raise DataError naming `uri` if it is damaged."""
        try:
            content = parse_document(text)
            return parse_as(cls, content | {"result": TrainingResult.from_fields(content["result"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{uri} is damaged ({error}); delete it and run the same command again") from error
