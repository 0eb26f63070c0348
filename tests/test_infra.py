"""Dependency ranges, pins, worker image and cluster file agree with each other."""

import importlib.metadata
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())


def pins() -> dict[str, str]:
    """Canonical package name -> version, from constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def stated_requirements() -> list[Requirement]:
    """All dependencies of pyproject.toml, including the extras."""
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def ray_schema() -> dict[str, Any]:
    """The JSON schema of Ray's cluster launcher, found without importing Ray."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    schema: dict[str, Any] = json.loads((Path(spec.origin).parent / "autoscaler/ray-schema.json").read_text())
    return schema


def test_constraints_pin_exact_public_versions() -> None:
    for name, version in pins().items():
        # A local tag like +cpu would tie everybody to one build of torch.
        assert re.fullmatch(r"\d+(\.\w+)*", version), f"{name}=={version}"


@pytest.mark.parametrize("requirement", stated_requirements(), ids=lambda requirement: requirement.name)
def test_dependency_pin_is_within_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement


def test_constraints_can_be_installed_with_the_oldest_python() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=") + ".0"
    stated = [package.metadata for package in importlib.metadata.distributions()]
    needs = {package["Name"]: package["Requires-Python"] for package in stated if "Requires-Python" in package}
    assert {name: python for name, python in needs.items() if oldest not in SpecifierSet(python)} == {}


def test_constraints_pin_transitive_dependencies() -> None:
    known, waiting, unpinned = pins(), [(r.name, r.extras) for r in stated_requirements()], set()
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed (aws): its pin is checked above
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((need.name, need.extras))
                if canonicalize_name(need.name) not in known:
                    unpinned.add(f"{need.name}, needed by {name}")
    assert not unpinned


def test_cluster_file_matches_ray_schema() -> None:
    jsonschema.validate(CLUSTER, ray_schema())
    assert CLUSTER["head_node_type"] in CLUSTER["available_node_types"]
    groups = [group for name, group in CLUSTER["available_node_types"].items() if name != CLUSTER["head_node_type"]]
    assert all(group["min_workers"] == 0 for group in groups), "an idle cluster keeps only its head"


def test_cluster_requires_token() -> None:
    start_head, start_worker = CLUSTER["head_start_ray_commands"], CLUSTER["worker_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in " ".join(start_head)
    assert "--env RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert "ENV RAY_AUTH_MODE=token" in DOCKERFILE
    assert any(remote.endswith(".ray/auth_token") for remote in CLUSTER["file_mounts"])
    assert "ray stop" not in " ".join(start_head + start_worker), "it stops every Ray on a machine, not only ours"


def test_image_tag_states_pinned_versions() -> None:
    tag = re.search(r"--tag (\S+)", DOCKERFILE)
    base = re.search(r"^FROM python:(3\.\d+)\.\d+-", DOCKERFILE, re.M)
    assert tag and base
    python = base[1]
    assert tag[1] == f"crowdray-worker:ray{pins()['ray']}-torch{pins()['torch']}-py{python.replace('.', '')}"
    assert CLUSTER["docker"]["image"].split("/")[-1] == tag[1]
    assert tag[1] in (ROOT / "infra" / "README.md").read_text()
    assert python == PROJECT["tool"]["mypy"]["python_version"], "the Python that is checked is the one deployed"
    assert "--constraint constraints.txt" in DOCKERFILE
    assert not re.search(r"\blatest\b", DOCKERFILE)


def test_dockerignore_allows_copied_files() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.search(r"^COPY (?:--\S+ )*(.+) \S+$", DOCKERFILE, re.M)
    assert copied and set(copied[1].split()) == allowed
