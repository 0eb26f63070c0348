"""Help of a command: options from the fields of its dataclass, wrapped at the width of the terminal."""

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

_INDENT = 6
"""Column of descriptions; names of options start at column 2."""

_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "True|False"}


class Advanced:
    """Field marker, in its Annotated: only --help-all lists it."""


@dataclass(frozen=True)
class HelpText:
    """What the help of a command says besides its options."""

    program: str
    """How to start the command."""
    description: str
    """What it does: paragraphs, whose lines are joined."""
    examples: Sequence[str] = ()
    """Arguments of complete commands."""
    lists: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """Titles, each with names and their meaning."""


def format_help(job: type, text: HelpText, *, defaults: Any = None, everything: bool = False) -> str:
    """Return the help of a command.

    Args:
        job: Dataclass of its options.
        text: All else.
        defaults: Instance whose values are the defaults.
        everything: Whether to list advanced fields too.
    """
    width = shutil.get_terminal_size().columns
    sections = list(_sections(job, defaults, everything=everything))
    required = [name for title, options in sections[:1] for name, help_ in options if help_.endswith("(required)")]
    usage = " ".join(["usage:", text.program, *required, "[options]"])
    lines = textwrap.wrap(usage, width, subsequent_indent=" " * _INDENT, break_on_hyphens=False)
    for paragraph in text.description.split("\n\n"):
        lines += ["", *textwrap.wrap(" ".join(paragraph.split()), width, break_on_hyphens=False)]
    for title, names in text.lists.items():
        lines += ["", f"{title}:"]
        for name, meaning in names.items():
            lines += _entry(name, meaning, width, max(map(len, names)) + 4)
    for title, options in sections:
        lines += ["", *textwrap.wrap(f"{title}:", width)]
        for name, help_ in options:
            lines += [f"  {name}", *_entry("", help_, width, _INDENT)]
    if text.examples:
        lines += ["", "examples:", *(f"  {text.program} {arguments}" for arguments in text.examples)]
    if not everything and any(Advanced in _parts(hint)[1] for hint in _hints(job).values()):
        lines += ["", "--help-all lists all other options too."]
    return "\n".join(lines)


def _entry(name: str, text: str, width: int, column: int) -> list[str]:
    start, indent = f"  {name}".ljust(column), " " * column
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def _sections(
    group: type, values: Any, *, everything: bool, flags: bool = True, prefix: str = "", title: str = "options"
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield a title, and name and help of each option: of the group itself, then of each dataclass in it."""
    options, nested, docs = list[tuple[str, str]](), list[tuple[Any, ...]](), _field_docs(group)
    for field in dataclasses.fields(group):
        kind, metadata = _parts(_hints(group)[field.name])
        if Advanced in metadata and not everything:
            continue
        conf: Any = next((item for item in metadata if hasattr(item, "metavar")), tyro.conf.arg())
        default = getattr(values, field.name) if values is not None else field.default
        help_ = " ".join((docs.get(field.name) or conf.help or kind.__doc__ or "").split("\n\n")[0].split())
        if dataclasses.is_dataclass(kind):
            inner = prefix if conf.name == "" else f"{prefix}{field.name}."
            typed = tyro.conf.FlagConversionOff in metadata
            inner_values = None if default is dataclasses.MISSING else default
            nested.append((kind, inner_values, flags and not typed, inner, help_.rstrip(".")))
        elif tyro.conf.Positional in metadata:
            options.append((conf.metavar, f"{help_}{_describe_default(default)}"))
        else:
            metavar = "" if kind is bool and flags else conf.metavar or _metavar(kind)
            name = f"--{prefix}{field.name}".replace("_", "-")
            options.append((f"{name} {metavar}".rstrip(), f"{help_}{_describe_default(default)}"))
    if options:
        yield title, options
    for kind, default, inner_flags, inner, about in nested:
        yield from _sections(kind, default, everything=everything, flags=inner_flags, prefix=inner, title=about)


def _hints(group: type) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split a type hint into the type, without None, and the metadata of its Annotated."""
    metadata: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        metadata = tuple(rest)
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return (kinds[0] if NoneType in get_args(hint) and len(kinds) == 1 else hint), metadata


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])} ..."
    if get_origin(kind) is UnionType:
        return _metavar(get_args(kind)[0])
    return _METAVARS.get(kind, "TEXT")


def _describe_default(value: Any) -> str:
    if value in (dataclasses.MISSING, tyro.MISSING):
        return " (required)"
    if value is None or value is False or value in ("", ()):
        return ""
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f" (default: {value:.4g})" if isinstance(value, float) else f" (default: {value})"


def _field_docs(group: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, inherited ones included."""
    docs: dict[str, str] = {}
    for part in reversed(group.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        except (OSError, TypeError):  # a class made at run time, or built in
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(field.target, ast.Name):
                docs[field.target.id] = ast.literal_eval(text.value)
    return docs
