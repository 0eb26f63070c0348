"""The house rules: who may import whom, what may not exist, what the README's tree says.

Each rule is a function of a root folder, tried on the real tree and on copies of it that break the rule.
"""

import ast
import fnmatch
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Rule = Callable[[Path], list[str]]

# From the roof down. A part imports itself and the floors below it: not its neighbours, not the floors above.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"jobs"}),
    frozenset({"cli"}),
    frozenset({"cluster"}),
    frozenset({"registry", "training"}),
    frozenset({"evaluation"}),
    frozenset({"models", "data"}),
    frozenset({"presets", "space", "leases"}),
    frozenset({"config", "storage"}),
    frozenset({"errors", "__init__"}),
)
HEIGHT = {part: -depth for depth, floor in enumerate(FLOORS) for part in floor}
ONLY_IMPORTER = {"ray": "cluster", "mlflow": "registry"}
LONGEST_JOB, LONGEST_FILE = 80, 400


def imports_of(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a module of `package` imports: relative ones and importlib's too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, absolute(node.args[0].value, package)


def absolute(name: str, package: str) -> str:
    """`name` with its leading dots resolved against `package`."""
    level = len(name) - len(name.lstrip("."))
    if level == 0:
        return name
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - level + 1], *filter(None, [name[level:]])])


def modules(root: Path) -> Iterator[tuple[Path, str, str]]:
    """File, part of the house, and package name of every module of crowdray and every job."""
    source_root = root / "platform"
    for file in sorted((source_root / "crowdray").rglob("*.py")):
        inside = file.relative_to(source_root / "crowdray")
        part = inside.parts[0] if len(inside.parts) > 1 else inside.stem
        yield file, part, ".".join(file.relative_to(source_root).parts[:-1])
    yield from ((file, "jobs", "jobs") for file in sorted((root / "jobs").rglob("*.py")))


def floors(root: Path) -> list[str]:
    """A part of crowdray imports only itself and the floors below it."""
    broken = []
    for file, part, package in modules(root):
        if part not in HEIGHT:
            broken.append(f"{file.relative_to(root)}: {part!r} stands on no floor, give it one in FLOORS")
            continue
        for line, name in imports_of(file.read_text(), package):
            top, *rest = name.split(".")
            target = "jobs" if top == "jobs" else rest[0] if top == "crowdray" and rest else None
            # A name that is no part is an attribute of the package itself (crowdray.__version__).
            if target in HEIGHT and target != part and HEIGHT[target] >= HEIGHT[part]:
                broken.append(f"{file.relative_to(root)}:{line} imports {name}: {part} may not import {target}")
    return broken


def outside_libraries(root: Path) -> list[str]:
    """Ray is imported in cluster/ alone, MLflow in registry/ alone."""
    return [
        f"{file.relative_to(root)}:{line} imports {name}: only {ONLY_IMPORTER[name.split('.')[0]]}/ may"
        for file, part, package in modules(root)
        for line, name in imports_of(file.read_text(), package)
        if ONLY_IMPORTER.get(name.split(".")[0], part) != part
    ]


def shadows(root: Path) -> list[str]:
    """Nothing hides the standard library: platform/ holds crowdray alone, no job is named like a module."""
    forbidden = [root / "platform.py", root / "platform" / "__init__.py"]
    stray = [p for p in (root / "platform").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    forbidden += [path for path in stray if path.name != "crowdray"]
    reserved = sys.stdlib_module_names | {"crowdray", "ray", "mlflow", "torch"}
    forbidden += [path for path in (root / "jobs").glob("*") if path.stem in reserved]
    return sorted({f"{path.relative_to(root)} shadows another module" for path in forbidden if path.exists()})


def lengths(root: Path) -> list[str]:
    """An entry point is under 80 lines, any other file at most 400."""
    broken = []
    for file in (f for folder in ("platform", "jobs", "benchmarks", "tests") for f in (root / folder).rglob("*.py")):
        count, limit = len(file.read_text().splitlines()), LONGEST_FILE
        if file.parent == root / "jobs":
            limit = LONGEST_JOB - 1
        if count > limit:
            broken.append(f"{file.relative_to(root)}: {count} lines, at most {limit}")
    return broken


def printed_tree(readme: str) -> dict[str, str]:
    """Path -> role, from the first fenced block that opens with `crowdray/`, else the first in `The house`.

    One path a line, then its role, with or without #. Children are indented, box characters do no harm,
    a folder ends with a slash.
    """
    opening = re.search(r"^```\w*\n(?=crowdray/)", readme, re.M) or re.search(
        r"^#+ [^\n]*the house.*?^```\w*\n", readme, re.M | re.S | re.I
    )
    if opening is None:
        return {}
    roles: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in filter(str.strip, readme[opening.end() :].split("\n```")[0].splitlines()):
        text = line.lstrip(" │├└─|")
        indent = len(line) - len(text)
        name, _, role = text.partition(" ")
        parents = [(i, p) for i, p in parents if i < indent]
        path = "" if name == "crowdray/" and not roles and not parents else f"{parents[-1][1] if parents else ''}{name}"
        if name.endswith("/"):
            parents.append((indent, path))
        if path:
            roles[path] = role.strip(" #")
    return roles


def expected_paths(root: Path) -> set[str]:
    """What the tree must name: top-level folders, package folders, modules directly in crowdray/, jobs."""
    ignored = [line.strip("/") for line in (root / ".gitignore").read_text().splitlines() if line]
    tops = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    named = {f"{p.name}/" for p in tops if not any(fnmatch.fnmatch(p.name, pattern) for pattern in ignored)}
    package = root / "platform" / "crowdray"
    named |= {f"{file.parent.relative_to(root)}/" for file in package.rglob("*.py")}
    files = [file for folder in (package, root / "jobs") for file in folder.glob("*.py")]
    return named | {str(file.relative_to(root)) for file in files if file.name != "__init__.py"}


def tree(root: Path) -> list[str]:
    """The README's tree names what is there, and only that, each with its role."""
    roles = printed_tree((root / "README.md").read_text())
    # `platform/crowdray/` on one line names platform/ as well.
    named = {*roles, *(f"{path.split('/')[0]}/" for path in roles if path.count("/") > 1)}
    broken = [f"README's tree does not name {path}" for path in expected_paths(root) - named]
    broken += [f"README's tree names {path}, which is not there" for path in roles if not (root / path).exists()]
    broken += [
        f"README's tree names the folder {p} without its slash" for p in roles if p[-1] != "/" and (root / p).is_dir()
    ]
    broken += [f"README's tree says no role for {path}" for path, role in roles.items() if not role]
    return sorted(broken)


@pytest.mark.parametrize("rule", [floors, outside_libraries, shadows, lengths, tree], ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule) -> None:
    assert rule(ROOT) == []


# (where in platform/crowdray, the planted code, the complaint)
STRAY_LIBRARIES = [
    ("training/planted.py", "import ray", "imports ray"),
    ("registry/planted.py", "import numpy, ray.train as t", "imports ray.train"),
    ("models/planted.py", "from ray.train import report", "imports ray.train.report"),
    ("data/planted.py", "def later():\n    if True:\n        import ray", "planted.py:3 imports ray"),
    ("config.py", "import importlib\nimportlib.import_module('ray')", "config.py:2 imports ray"),
    ("storage.py", "__import__('ray.tune')", "imports ray.tune"),
    ("../../jobs/planted.py", "import ray", "jobs/planted.py:1 imports ray"),
    ("cluster/planted.py", "from mlflow import log_metric", "only registry/ may"),
    ("evaluation/planted.py", "def later():\n    import mlflow.pytorch", "imports mlflow.pytorch"),
]
UPWARD_IMPORTS = [
    ("data/planted.py", "import crowdray.training.trainer", "data may not import training"),
    ("data/planted.py", "from crowdray import models", "data may not import models"),
    ("models/planted.py", "from ..data.sample import Sample", "models may not import data"),
    ("data/sources/planted.py", "from ... import cluster", "data may not import cluster"),
    ("datasets/sources/__init__.py", "from ...models import counter", "data may not import models"),
    (
        "training/planted.py",
        "def f():\n    from crowdray.registry import x",
        "training may not import registry",
    ),
    ("registry/planted.py", "from crowdray.training.trainer import train", "registry may not import training"),
    (
        "evaluation/planted.py",
        "import importlib\nimportlib.import_module('crowdray.training')",
        ":2 imports crowdray",
    ),
    (
        "evaluation/planted.py",
        "import_module('..training', __package__)",
        "evaluation may not import training",
    ),
    ("storage.py", "from crowdray.config import Config", "storage may not import config"),
    ("errors.py", "from crowdray import storage", "errors may not import storage"),
    ("__init__.py", "from crowdray.models import counter", "__init__ may not import models"),
    ("cluster/planted.py", "import jobs.train", "cluster may not import jobs"),
    ("planted.py", "", "'planted' stands on no floor"),
]
TREE_WITH_A_GHOST = "```\ncrowdray/\n  jobs/      entry points\n  gone.py    a file\n```\n"
TREE_WITHOUT_A_ROLE = "## The house\n```\njobs/       entry points\n  train.py\n```\n"
# (rule, file, its text, the complaint)
VIOLATIONS: list[tuple[Rule, str, str, str]] = [
    *((outside_libraries, f"platform/crowdray/{path}", text, said) for path, text, said in STRAY_LIBRARIES),
    *((floors, f"platform/crowdray/{path}", text, said) for path, text, said in UPWARD_IMPORTS),
    (shadows, "platform/__init__.py", "", "platform/__init__.py shadows"),
    (shadows, "platform.py", "", "platform.py shadows"),
    (shadows, "platform/stray.py", "", "platform/stray.py shadows"),
    (shadows, "jobs/platform.py", "", "jobs/platform.py shadows"),
    (lengths, "jobs/planted.py", "\n" * 80, "80 lines, at most 79"),
    (lengths, "platform/crowdray/data/planted.py", "\n" * 401, "401 lines, at most 400"),
    (tree, "jobs/planted.py", "", "does not name jobs/planted.py"),
    (tree, "platform/crowdray/planted/__init__.py", "", "does not name platform/crowdray/planted/"),
    (tree, "platform/crowdray/data/planted/part.py", "", "does not name platform/crowdray/data/planted/"),
    (tree, "platform/crowdray/planted.py", "", "does not name platform/crowdray/planted.py"),
    (tree, "planted/notes.txt", "", "does not name planted/"),
    (tree, "README.md", TREE_WITH_A_GHOST, "names gone.py, which is not there"),
    (tree, "README.md", TREE_WITHOUT_A_ROLE, "says no role for jobs/train.py"),
    (tree, "README.md", "No tree at all.\n", "does not name jobs/"),
]


@pytest.mark.parametrize(("rule", "path", "text", "complaint"), VIOLATIONS, ids=[v[-1] for v in VIOLATIONS])
def test_a_planted_violation_is_seen(rule: Rule, path: str, text: str, complaint: str, tmp_path: Path) -> None:
    house = copy_of_the_house(tmp_path)
    before = set(rule(house))
    planted = (house / path).resolve()
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(text)
    new = [message for message in rule(house) if message not in before]
    assert any(complaint in message for message in new), new


def test_what_only_looks_like_a_violation_is_left_alone(tmp_path: Path) -> None:
    house = copy_of_the_house(tmp_path)
    before = {rule: rule(house) for rule in (floors, outside_libraries)}
    in_data = """
'import ray'
import raylib, mlflow_skin
from . import sample
from crowdray import __version__
from crowdray.storage import fetch
import_module(name)
"""
    innocent = {
        "platform/crowdray/data/planted.py": in_data,
        "platform/crowdray/cluster/planted.py": "import ray\nfrom crowdray.registry import tracking\n",
        "jobs/planted.py": "from crowdray.cluster import train\n",
    }
    for path, text in innocent.items():
        (house / path).parent.mkdir(exist_ok=True)
        (house / path).write_text(text)
    assert {rule: rule(house) for rule in before} == before


INDENTED = """
## The house

```
jobs/               entry points
  train.py          trains
platform/crowdray/  the package
  data/             samples
```
"""
BOXED = """
```
another block
```

```text
crowdray/
├── jobs/               # entry points
│   └── train.py        # trains
└── platform/crowdray/  # the package
    └── data/           # samples
```
"""


@pytest.mark.parametrize("readme", [INDENTED, BOXED], ids=["indented", "boxed"])
def test_the_printed_tree_is_read(readme: str) -> None:
    assert printed_tree(readme) == {
        "jobs/": "entry points",
        "jobs/train.py": "trains",
        "platform/crowdray/": "the package",
        "platform/crowdray/data/": "samples",
    }


def copy_of_the_house(destination: Path) -> Path:
    """A copy of what the rules look at."""
    house = destination / "house"
    house.mkdir()
    for name in ("platform", "jobs", "README.md", ".gitignore"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, house / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, house / name)
    return house
