"""Digest of the code that decides what a conversion writes.

This is the source's adapter with its base classes, its depth teacher, the encoding of samples, the writing of shards,
the statistics in their records, and the modules of data/, datasets/ and scenes/ that these import. Nothing else counts:
a new source or another plot must not discard the finished slices of an interrupted conversion.
"""

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from crowdray.data.sample import make_sample
from crowdray.data.shards import write_shard
from crowdray.datasets.sources import Source
from crowdray.datasets.statistics import load_usable

PACKAGE = Path(__file__).parents[1]
"""Folder of the package crowdray."""

LIBRARIES = ("numpy", "pillow", "pyarrow", "scipy", "simplejpeg")
"""Libraries that decide the bytes of a shard."""

_HASHED_ELSEWHERE = {"crowdray", *sys.stdlib_module_names}
_FOLLOWED = ("crowdray.data.", "crowdray.datasets.", "crowdray.scenes")
_REGISTRIES = ("crowdray.datasets.sources", "crowdray.datasets.depth")
"""Packages whose `__init__` lists all sources or teachers, and so would make each depend on every other."""


def code_digest(source: Source, package: Path = PACKAGE) -> str:
    """Digest of the code, in `package`, and of the libraries that decide what a source is converted to."""
    classes = [*type(source).__mro__, *type(source.teacher).__mro__]
    roots = {member.__module__ for member in (*classes, make_sample, write_shard, load_usable)}
    contents = [file.read_bytes() for file in code_files(roots, package)]
    contents += [_module_text(part) for part in classes if part.__module__.partition(".")[0] not in _HASHED_ELSEWHERE]
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    return hashlib.sha256(repr((hashes, [version(name) for name in LIBRARIES])).encode()).hexdigest()


def code_files(roots: Iterable[str], package: Path = PACKAGE) -> list[Path]:
    """Files of the named modules and, transitively, of the modules of ours that they import; sorted."""
    files: dict[str, Path] = {}
    pending = list(roots)
    while pending:
        name = pending.pop()
        if name in files or name in _REGISTRIES or not name.startswith(_FOLLOWED):
            continue
        path = package.joinpath(*name.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if file.is_file():  # an imported name that is not a module has no file
            files[name] = file
            pending += (
                _imports(file.read_bytes()) if name != write_shard.__module__ else []
            )  # it imports the readers of shards
    return sorted(files.values())


@cache
def _imports(content: bytes) -> tuple[str, ...]:
    """Names of everything that the code of a module imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    return tuple(names)


def _module_text(part: type) -> bytes:
    """Source text of the module of a class outside this package; empty if it has none, as in a console."""
    with suppress(OSError, TypeError):
        return inspect.getsource(inspect.getmodule(part) or part).encode()
    return b""
