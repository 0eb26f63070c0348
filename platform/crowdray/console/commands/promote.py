"""`crowdray promote`: make the candidate of a registered model its champion, if it is better."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from crowdray.config import Device
from crowdray.console.arguments import console, parse, tracking_uri, write_json
from crowdray.errors import JobFailed, UserError

if TYPE_CHECKING:
    from crowdray.registry.promotion import Decision

EXAMPLES = (
    "--model crowdray-mall --data data/mall",
    "--model crowdray-mall --candidate models:/crowdray-mall/7 --data data/mall --margin 0.1",
    "--model crowdray-mall --history",
    "--model crowdray-mall --rollback",
)


@dataclass(frozen=True, kw_only=True)
class PromoteJob:
    """Compare the candidate with the champion on the same test images, and make it the champion if it is better.

    It must have a lower error in a paired test, keep latency and size, load without crowdray, and return the density
    of its run's whole network. The exit status is 1 if it is rejected.
    """

    model: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Name of the registered model."""
    data: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None
    """Path or URI of a dataset written by jobs/convert.py."""
    candidate: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None
    """models:/NAME/VERSION or models:/NAME@ALIAS; the alias candidate by default."""
    split: Annotated[str, tyro.conf.arg(metavar="NAME")] = "test"
    """Split to compare on."""
    margin: float = 0.0
    """Heads per image by which the error must be lower, with 95% confidence."""
    max_latency_ratio: float = 1.1
    """Largest latency in relation to the champion's."""
    max_size_ratio: float = 1.1
    """Largest file in relation to the champion's."""
    device: Device = "auto"
    """Device: auto uses a GPU if there is one."""
    history: bool = False
    """Only list the promotions."""
    rollback: bool = False
    """Only make the previous champion the champion again."""
    set_candidate: bool = False
    """Only move the alias candidate to --candidate, without a comparison."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path or URI for the decision, or the history, as JSON."""

    def check(self) -> None:
        """Raise UserError for options that do not go together, or have no meaning."""
        if sum((self.history, self.rollback, self.set_candidate)) > 1:
            raise UserError("give one of --history, --rollback and --set-candidate")
        if self.set_candidate and self.candidate is None:
            raise UserError(f"--set-candidate needs a version: --candidate models:/{self.model}/VERSION")
        if not (self.history or self.rollback or self.set_candidate) and self.data is None:
            raise UserError("--data is missing; give the dataset to compare on, written by jobs/convert.py")
        for option, value in (("max-latency-ratio", self.max_latency_ratio), ("max-size-ratio", self.max_size_ratio)):
            if not value > 0:
                raise UserError(f"--{option} is {value}; give a number above 0")
        if not self.margin >= 0:
            raise UserError(f"--margin is {self.margin}; give a number of heads, 0 or more")


def parse_arguments(arguments: list[str]) -> PromoteJob:
    """Parse the arguments of the command."""
    job = parse(PromoteJob, arguments, "promote", examples=EXAMPLES)
    job.check()
    return job


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    job = parse_arguments(arguments)

    # Imported late: help and usage errors do not wait for torch and MLflow.
    from crowdray.console.terminal import print_line, print_message
    from crowdray.pipeline.promote import promote
    from crowdray.registry.promotion import Bounds, PromotionRegistry

    registry, screen = PromotionRegistry(job.model, tracking_uri()), console()
    if job.history:
        decisions = registry.history()
        for decision in decisions:
            print_message(screen, str(decision))
        champion = registry.champion()
        print_message(screen, f"champion: {f'version {champion}' if champion else 'none'}")
        write_json(job.json, {"champion": champion, "decisions": [asdict(decision) for decision in decisions]})
        return
    if job.set_candidate:
        version = registry.resolve(job.candidate)
        registry.set_candidate(version)
        print_message(screen, f"candidate: version {version} of {job.model}")
        return
    if job.rollback:
        decision = registry.rollback()
    else:
        bounds = Bounds(job.margin, job.max_latency_ratio, job.max_size_ratio)
        decision = promote(
            registry, job.candidate, str(job.data), job.split, bounds, device=job.device, on_status=print_line
        )
    for line in _lines(decision, job.model):
        print_message(screen, line)
    write_json(job.json, asdict(decision))
    if decision.action == "rejected":
        raise JobFailed(f"version {decision.version} was not promoted: {'; '.join(decision.reasons)}")


def _lines(decision: Decision, model: str) -> list[str]:
    """Return the evidence and the decision, a line each."""
    lines, evidence = [], decision.evidence
    if evidence is not None:
        lines = [f"compared with {evidence.opponent}: {evidence.comparison()}"]
        lines += [
            f"{what}: {ratio:.3f} times the champion's"
            for what, ratio in (("latency", evidence.latency_ratio), ("size", evidence.size_ratio))
            if ratio is not None
        ]
        lines.append(f"loads without crowdray: {evidence.clean_load or 'yes, with the same density'}")
        compared = "differs" if evidence.parent_differs else "the same density"
        lines.append(f"whole network of its run: {f'not compared: {evidence.parent}' if evidence.parent else compared}")
    if decision.action != "rejected":
        before = f", before version {decision.champion_before}" if decision.champion_before else ""
        lines.append(f"champion: version {decision.version} of {model}{before} ({decision.action})")
    return lines
