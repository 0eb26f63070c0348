"""MkDocs hook: fill the configuration page from the fields of `crowdray.config` and their documentation."""

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

import griffe

PLATFORM = Path(__file__).resolve().parents[1] / "platform"
sys.path.insert(0, str(PLATFORM))

from crowdray.config import Config  # noqa: E402
from crowdray.presets import PRESETS  # noqa: E402

FIELDS, PRESET_TABLES = "<!-- fields -->", "<!-- presets -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the markers of the configuration page by its tables."""
    if page.file.src_uri != "configuration.md":
        return markdown
    documented = griffe.load("crowdray.config", search_paths=[PLATFORM])
    return markdown.replace(FIELDS, "\n".join(groups(documented, Config()))).replace(PRESET_TABLES, preset_tables())


def groups(documented: Any, group: Any, prefix: str = "") -> list[str]:
    """A table of the group's own fields, then a section for each of its groups."""
    cls = type(group)
    docs = {name: attribute.docstring for name, attribute in documented[cls.__name__].attributes.items()}
    types = typing.get_type_hints(cls)  # without the Annotated wrapper of validators
    rows, nested = [], []
    for item in dataclasses.fields(group):
        value = getattr(group, item.name)
        if dataclasses.is_dataclass(value):
            about = inline(docs[item.name].value) + "\n" if docs.get(item.name) else ""
            nested += ["", f"{'#' * (prefix.count('.') + 2)} {prefix}{item.name}", "", about]
            nested += groups(documented, value, f"{prefix}{item.name}.")
        else:
            flag = f"`--{prefix}{item.name}`".replace("_", "-")
            rows.append(
                f"| {flag} | {type_name(types[item.name])} | {default(value)} | {inline(docs[item.name].value)} |"
            )
    head = ["| flag | type | default | meaning |", "|---|---|---|---|"] if rows else []
    return [*head, *rows, *nested]


def default(value: Any) -> str:
    """A default value; floats without the digits that mean nothing."""
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`" if value != "" else ""


def preset_tables() -> str:
    """For each preset its description and the fields in which it differs from the defaults."""
    documented = griffe.load("crowdray.presets", search_paths=[PLATFORM])
    default, sections = dict(leaves(Config())), []
    for name, make in PRESETS.items():
        changed = {key: value for key, value in leaves(make()) if value != default[key]}
        fields = ", ".join(f"`{key} = {value!r}`" for key, value in changed.items()) or "The defaults."
        sections += [f"### {name}", documented[make.__name__].docstring.value, fields]
    return "\n\n".join(sections)


def leaves(group: Any, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Dotted name and value of each field."""
    for item in dataclasses.fields(group):
        value = getattr(group, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def type_name(kind: Any) -> str:
    """The choices of a Literal, or the name of a type."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    return getattr(kind, "__name__", str(kind))


def inline(text: str) -> str:
    """A docstring as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
