"""Promotion of a candidate to champion: the decision on the evidence, and its record on the versions of a model.

The model registry of open-source MLflow has no comments: each decision becomes a tag of the version, which the history
is read from, and a line in its description.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from crowdray.credentials import redacted, with_credentials
from crowdray.documents import parse_as, parse_json
from crowdray.errors import JobFailed, UserError
from crowdray.evaluation.intervals import Interval
from crowdray.registry.aliases import CANDIDATE, CANDIDATE_DECISION, CHAMPION, AliasLock, alias_lock
from crowdray.registry.card import MAX_DESCRIPTION
from crowdray.registry.connection import call_mlflow, connect, limit_artifact_store
from crowdray.registry.loading import DESCRIPTION, GRAPH
from crowdray.registry.tracking import RUN_KEY, run_key_of

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

T = TypeVar("T")

PROMOTION = "crowdray.promotion"
"""Tag with the latest decision on a version in words; those with a number after it hold all decisions as JSON."""

_HEADING = "## Promotions"
_MAX_DOWNLOAD = 2**28
"""Bytes of a package that its download is given time for."""


@dataclass(frozen=True)
class Bounds:
    """What a candidate must keep to become champion."""

    margin: float = 0.0
    """Heads per image by which its error must be lower, with 95% confidence."""
    latency_ratio: float = 1.1
    """Largest latency in relation to the champion's."""
    size_ratio: float = 1.1
    """Largest file in relation to the champion's."""


@dataclass(frozen=True)
class Evidence:
    """What is known about a candidate and the champion, or without one about always predicting the mean."""

    candidate: int
    """Version of the candidate."""
    champion: int | None
    """Version of the champion; None if there is none."""
    data: str
    """Dataset that they were compared on."""
    data_digest: str
    """Its digest."""
    split: str
    """Its split."""
    images: int
    """Number of images."""
    candidate_mae: float
    """Mean absolute error of the candidate."""
    opponent_mae: float
    """That of the champion, or of always predicting the mean."""
    gain: Interval
    """95% interval of the mean difference of their absolute errors on the same images; positive: fewer errors."""
    latency_ratio: float | None
    """Latency of the candidate in relation to the champion's."""
    size_ratio: float | None
    """Size of its file in relation to the champion's."""
    clean_load: str
    """Why it fails to load where only MLflow and torch are; empty if it loads and returns the same density."""
    parent: str
    """Why its density could not be compared with that of the run's whole network; empty if it was, and is the same."""
    parent_differs: bool = False
    """Whether it was compared, and differs."""

    @property
    def opponent(self) -> str:
        """What the candidate was compared with."""
        return "always predicting the mean" if self.champion is None else f"champion version {self.champion}"

    def objections(self, bounds: Bounds) -> list[str]:
        """Return all reasons against the promotion."""
        found = []
        if self.gain.low <= bounds.margin:
            margin = f" by more than {bounds.margin:g}" if bounds.margin else ""
            found.append(f"it is not shown to be better than {self.opponent}{margin}: {self.comparison()}")
        for what, ratio, bound in (
            ("latency", self.latency_ratio, bounds.latency_ratio),
            ("size", self.size_ratio, bounds.size_ratio),
        ):
            if ratio is not None and ratio > bound:
                found.append(f"its {what} is {ratio:.2f} times the champion's, more than {bound:g}")
        if self.clean_load:
            found.append(f"it does not load without crowdray: {self.clean_load}")
        if self.parent_differs:
            found.append("its density is not that of the run's whole network")
        return found

    def comparison(self) -> str:
        """Return the errors in words."""
        return (
            f"{self.split} MAE {self.candidate_mae:.4g} against {self.opponent_mae:.4g} on {self.images:,} images, "
            f"lower by {self.gain.low:.3g} to {self.gain.high:.3g} (95%)"
        )


@dataclass(frozen=True)
class Decision:
    """A recorded decision on the champion of a model."""

    number: int
    """Position in the history."""
    at: str
    """Time in UTC."""
    action: Literal["promoted", "rejected", "restored"]
    """What happened to the version."""
    version: int
    """The version."""
    champion_before: int | None
    """The champion until then."""
    reasons: list[str] = field(default_factory=list)
    """Why it was rejected, or what it won by."""
    evidence: Evidence | None = None
    """What the decision is based on."""

    def __str__(self) -> str:
        replaced = self.champion_before if self.action != "rejected" else None
        before = f", before it version {replaced}" if replaced else ""
        return f"{self.at} version {self.version} {self.action}{before}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class FetchedVersion:
    """A registered version with its files."""

    version: int
    """Its number."""
    folder: Path
    """Folder with its description and its exported program."""
    size: int
    """Bytes of its exported program."""
    run_folder: str | None
    """URI of the folder of its run, where it was; None if the run is gone."""


class PromotionRegistry:
    """The versions of a registered model with their promotions."""

    def __init__(self, name: str, tracking_uri: str, timeout_s: float = 20.0) -> None:
        self.name, self._uri, self._timeout_s = name, tracking_uri, timeout_s
        self._client = connect(tracking_uri, timeout_s)

    def resolve(self, version: str | None) -> int:
        """Return the number of a version given as models:/NAME/VERSION or models:/NAME@ALIAS; the candidate by default.

        Raises:
            UserError: There is no such version, or it belongs to another model.
        """
        prefix, text = f"models:/{self.name}", version or f"models:/{self.name}@{CANDIDATE}"
        separator, key = text[len(prefix) : len(prefix) + 1], text[len(prefix) + 1 :]
        if not text.startswith(prefix) or separator not in ("/", "@") or (separator == "/" and not key.isdecimal()):
            raise UserError(f"{text} is not a version of {self.name}; write {prefix}/VERSION or {prefix}@ALIAS")
        number = self._alias(key) if separator == "@" else int(key)
        known = sorted(int(found.version) for found in self._call(lambda: list(self._versions())))
        if number not in known:
            listed = ", ".join(map(str, known)) or "none"
            raise UserError(f"there is no version {text} at {self._uri}; versions of {self.name}: {listed}")
        return number

    def champion(self) -> int | None:
        """Return the number of the champion."""
        return self._alias(CHAMPION)

    def fetch(self, version: int, folder: Path) -> FetchedVersion:
        """Download the description and the program of a version into a new folder."""
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        full = with_credentials(self._uri)

        def run_folder(run_id: str | None) -> str | None:
            try:
                return run_key_of(self._client.get_run(str(run_id)).data.tags[RUN_KEY])
            except (MlflowException, KeyError):
                return None

        def download() -> FetchedVersion:
            found = self._client.get_model_version(self.name, str(version))
            location = self._client.get_model_version_download_uri(self.name, str(version)).rstrip("/")
            limit_artifact_store(location, self._timeout_s)
            for file in (DESCRIPTION, GRAPH):
                target = folder / Path(file).parent
                target.mkdir(parents=True, exist_ok=True)
                download_artifacts(f"{location}/{file}", dst_path=str(target), tracking_uri=full)
            return FetchedVersion(version, folder, (folder / GRAPH).stat().st_size, run_folder(found.run_id))

        return self._call(download, payload_bytes=_MAX_DOWNLOAD)

    def decide(self, evidence: Evidence, bounds: Bounds) -> Decision:
        """Record the decision on a candidate, and move the alias `champion` to it if nothing speaks against it.

        Raises:
            JobFailed: Another process changed the champion since the comparison.
        """
        objections = evidence.objections(bounds)
        won = [f"better than {evidence.opponent}: {evidence.comparison()}"]

        def record(lock: AliasLock) -> Decision:
            self._check_champion(evidence.champion)
            decision = Decision(
                self._next_number(),
                _now(),
                "rejected" if objections else "promoted",
                evidence.candidate,
                evidence.champion,
                objections or won,
                evidence,
            )
            return self._record(decision, lock)

        return self._locked(record)

    def rollback(self) -> Decision:
        """Make the previous champion the champion again.

        Raises:
            UserError: There is none.
        """

        def restore(lock: AliasLock) -> Decision:
            current, versions = self._alias_now(CHAMPION), list(self._versions())
            previous = previous_champion(_decisions(versions), current, {int(v.version) for v in versions})
            if previous is None:
                raise UserError(f"{self.name} has no earlier champion to restore; --history lists its promotions")
            reason = f"rollback of version {current}" if current else "rollback"
            return self._record(Decision(self._next_number(), _now(), "restored", previous, current, [reason]), lock)

        return self._locked(restore)

    def history(self) -> list[Decision]:
        """Return all decisions on versions that still exist, the oldest first."""
        return self._call(lambda: _decisions(self._versions()))

    def set_candidate(self, version: int) -> None:
        """Move the alias `candidate` without a comparison, and say so on the version."""

        def move(lock: AliasLock) -> None:
            before = self._alias_now(CANDIDATE)
            lock.set_alias(CANDIDATE, version)
            reason = f"candidate is version {version}: set by --set-candidate, before version {before}"
            self._client.set_model_version_tag(self.name, str(version), CANDIDATE_DECISION, reason)

        self._locked(move)

    def _locked(self, change: Callable[[AliasLock], T]) -> T:
        def call() -> T:
            with alias_lock(self._client, self.name) as lock:
                return change(lock)

        return self._call(call)

    def _call(self, call: Callable[[], T], payload_bytes: int = 0) -> T:
        return call_mlflow(self._uri, self._timeout_s, call, payload_bytes=payload_bytes)

    def _alias(self, alias: str) -> int | None:
        return self._call(lambda: self._alias_now(alias))

    def _alias_now(self, alias: str) -> int | None:
        from mlflow.exceptions import MlflowException

        try:
            version = self._client.get_registered_model(self.name).aliases.get(alias)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"there is no registered model {self.name!r} at {self._uri}; `make ui` lists them"
            ) from error
        return int(version) if version else None

    def _check_champion(self, expected: int | None) -> None:
        current = self._alias_now(CHAMPION)
        if current != expected:
            raise JobFailed(
                f"meanwhile another process made version {current} of {self.name} the champion; run the same command "
                "again to compare with it"
            )

    def _versions(self) -> "Iterator[ModelVersion]":
        token: str | None = None
        while True:
            page = self._client.search_model_versions(f"name = '{self.name}'", max_results=1000, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _next_number(self) -> int:
        return 1 + max((decision.number for decision in _decisions(self._versions())), default=0)

    def _record(self, decision: Decision, lock: AliasLock) -> Decision:
        """Write a decision to its version, then move the alias: a crash in between leaves the champion as it was."""
        version, text = str(decision.version), redacted(str(decision))
        content = redacted(json.dumps(asdict(decision)))
        self._client.set_model_version_tag(self.name, version, f"{PROMOTION}.{decision.number:04d}", content)
        if decision.action != "rejected":
            lock.set_alias(CHAMPION, decision.version)
        self._client.set_model_version_tag(self.name, version, PROMOTION, text)
        found = self._client.get_model_version(self.name, version)
        self._client.update_model_version(self.name, version, with_comment(found.description or "", text))
        return decision


def previous_champion(decisions: Sequence[Decision], current: int | None, existing: set[int]) -> int | None:
    """Return the champion before the current one, among versions that exist.

    A promotion enters a version into the sequence of champions; a rollback removes all after the restored one.
    """
    champions: list[int] = []
    for decision in decisions:
        if decision.action == "promoted":
            if decision.champion_before is not None and decision.champion_before not in champions[-1:]:
                champions.append(decision.champion_before)  # an alias that was set by hand
            champions.append(decision.version)
        elif decision.action == "restored":
            while champions and champions[-1] != decision.version:
                champions.pop()
    if current in champions:
        while champions.pop() != current:
            pass
    return next((version for version in reversed(champions) if version in existing and version != current), None)


def with_comment(description: str, comment: str) -> str:
    """Return a description with a comment added to its promotions, without the oldest that do not fit."""
    card, _, listed = description.partition(f"\n\n{_HEADING}\n\n")
    comments = [*filter(None, listed.split("\n")), f"- {comment}"[: MAX_DESCRIPTION // 4]]
    while True:
        text = f"{card}\n\n{_HEADING}\n\n" + "\n".join(comments)
        if len(text) <= MAX_DESCRIPTION:
            return text
        if len(comments) == 1:
            return f"{card[: MAX_DESCRIPTION - len(text)].rstrip()}\n\n{_HEADING}\n\n{comments[0]}"
        comments.pop(0)


def _decisions(versions: "Iterable[ModelVersion]") -> list[Decision]:
    tags = (tag for version in versions for tag in version.tags.items() if tag[0].startswith(f"{PROMOTION}."))
    found = []
    for key, value in tags:
        try:
            found.append(parse_as(Decision, parse_json(value)))
        except ValueError as error:
            raise UserError(f"the tag {key} is damaged ({error}); delete it in MLflow") from error
    return sorted(found, key=lambda decision: decision.number)


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
