"""Aliases of registered versions: which version becomes `candidate`, and a lock for moving an alias."""

import math
import random
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crowdray.errors import JobFailed

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
"""Alias of the version with the lowest validation MAE."""
CHAMPION = "champion"
"""Alias of the version that won its promotion."""

VALIDATION_MAE = "val/mae"
"""Tag with the mean absolute error on the validation images."""
MEAN_PREDICTOR_MAE = "mean_predictor/val/mae"
"""Tag with the error of always predicting the mean training count on the same images."""
VALIDATION_IMAGES = "crowdray.validation_images"
"""Tag with a digest of the validation images."""
CANDIDATE_DECISION = "crowdray.candidate"
"""Tag that says whether a version became `candidate`, and why."""

_LOCK = "crowdray.lock."
_STALE_S = 60.0


@dataclass(frozen=True)
class Validation:
    """A version's validation; None where an earlier release registered it without."""

    version: int
    """Number of the version."""
    mae: float | None
    """Mean absolute error on the validation images."""
    mean_predictor_mae: float | None
    """Error of always predicting the mean training count there."""
    images: str | None
    """Digest of the validation images: errors on others are not comparable."""

    @classmethod
    def of(cls, version: int, tags: Mapping[str, str]) -> "Validation":
        """Read the tags of a version."""
        return cls(
            version, _number(tags, VALIDATION_MAE), _number(tags, MEAN_PREDICTOR_MAE), tags.get(VALIDATION_IMAGES)
        )


@dataclass(frozen=True)
class CandidateDecision:
    """Which version is `candidate`."""

    holder: int | None
    """Number of that version; None if there is none."""
    moves: bool
    """Whether the alias is to be moved."""
    reason: str
    """Which version it is, and why, in a sentence."""


def choose_candidate(new: Validation, holder: Validation | None, name: str) -> CandidateDecision:
    """Decide whether a verified version of the model `name` takes the alias `candidate` from its holder."""

    def move(reason: str) -> CandidateDecision:
        return CandidateDecision(new.version, True, f"candidate is version {new.version}: {reason}")

    def keep(reason: str) -> CandidateDecision:
        kept = f"kept candidate at version {holder.version}" if holder else "no candidate"
        return CandidateDecision(holder.version if holder else None, False, f"{kept}: {reason}")

    this, mae = f"version {new.version}", f"validation MAE {_text(new.mae)}"
    if holder is not None and holder.version == new.version:
        return keep(mae)
    if new.mae is None or new.mean_predictor_mae is None:
        return keep(f"the validation errors of {this} and of always predicting the mean are not both known")
    if new.mae >= new.mean_predictor_mae:
        return keep(f"{mae} of {this} is not below {_text(new.mean_predictor_mae)} of always predicting the mean")
    if holder is None:
        return move(f"{mae}, always predicting the mean {_text(new.mean_predictor_mae)}")
    before = f"version {holder.version}"
    if holder.mae is None or holder.images is None:
        return move(f"{mae}; the validation of {before}, of an earlier release, is not recorded")
    if holder.images != new.images:
        command = f"jobs/promote.py --model {name} --candidate models:/{name}/{new.version} --set-candidate"
        return keep(f"{this} was validated on other images; to move it anyway: {command}")
    if new.mae < holder.mae:
        return move(f"{mae}, {before} {_text(holder.mae)}")
    return keep(f"validation MAE {_text(holder.mae)}, {this} {'the same' if new.mae == holder.mae else _text(new.mae)}")


@dataclass(frozen=True)
class AliasLock:
    """The right to move the aliases of a registered model."""

    client: "MlflowClient"
    name: str
    ticket: str

    def set_alias(self, alias: str, version: int) -> None:
        """Move an alias.

        Raises:
            JobFailed: This process was suspended for so long that another one took the lock.
        """
        if self.ticket not in _tickets(self.client, self.name):
            raise JobFailed(f"another process took the lock of {self.name} meanwhile; run the same command again")
        self.client.set_registered_model_alias(self.name, alias, str(version))


@contextmanager
def alias_lock(client: "MlflowClient", name: str) -> Iterator[AliasLock]:
    """Wait until no other process moves aliases of the registered model `name`, and exclude others.

    MLflow cannot compare and set. Each process therefore writes a tag of its own to the model, its ticket, and has
    the lock once it then reads no other ticket: of two, the second to write sees the first. A ticket that stays for
    60 s belongs to a process that has ended, and is removed.
    """
    ticket = f"{_LOCK}{uuid.uuid4().hex}"
    first_seen: dict[str, float] = {}
    try:
        while not _acquire(client, name, ticket, first_seen):
            time.sleep(random.uniform(0.02, 0.2))
        yield AliasLock(client, name, ticket)
    finally:
        client.delete_registered_model_tag(name, ticket)


def _acquire(client: "MlflowClient", name: str, ticket: str, first_seen: dict[str, float]) -> bool:
    """Take a ticket. Returns False without it if another process has or gets the lock first."""
    client.set_registered_model_tag(name, ticket, "held")
    while (tickets := _tickets(client, name)) != {ticket}:
        now = time.monotonic()
        for other in tickets - {ticket}:
            if now - first_seen.setdefault(other, now) > _STALE_S:
                client.delete_registered_model_tag(name, other)
        if ticket not in tickets or min(tickets) != ticket:  # of several that wait, one keeps its ticket
            client.delete_registered_model_tag(name, ticket)
            return False
        time.sleep(0.02)
    return True


def _tickets(client: "MlflowClient", name: str) -> set[str]:
    return {key for key in client.get_registered_model(name).tags if key.startswith(_LOCK)}


def _number(tags: Mapping[str, str], key: str) -> float | None:
    try:
        value = float(tags[key])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
