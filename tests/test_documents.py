"""Stored documents: equal after reading, any change is found, and no content ends in another exception."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdray.documents import parse_as, parse_document, parse_json, to_document

CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda name: name != "sha256"), CONTENT, max_size=4))
def test_parse_document_returns_what_was_written(content: dict[str, object]) -> None:
    assert parse_document(to_document(content)) == content
    assert parse_document(to_document(content, indent=1)) == content
    assert parse_document(json.dumps(content)) == content


def test_parse_document_of_tuples_and_numbered_keys_agrees_with_json() -> None:
    content = {"workers": (1, 4), "epochs": {10: 0.5, 9: float("inf")}}
    assert parse_document(to_document(content)) == {"workers": [1, 4], "epochs": {"10": 0.5, "9": float("inf")}}


@given(st.data())
def test_parse_document_with_a_changed_character_raises_or_is_equal(data: st.DataObject) -> None:
    text = to_document({"mae": 3.25, "stages": ["baseline", "joint"], "images": 12})
    position = data.draw(st.integers(0, len(text) - 1))
    changed = text[:position] + data.draw(st.sampled_from('09e.-", []{}x')) + text[position + 1 :]
    try:
        content = parse_document(changed)
    except ValueError:
        return
    # Without the name of its hash a document is one of a version that wrote none.
    assert content == parse_document(text) or "sha256" not in json.loads(changed)


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "[" * 100_000, '{"a":' * 100_000, "9" * 5_000, b"\xff", '"\\ud800"', "{'a': 1}"]
)
def test_parse_document_of_anything_else_raises_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_document(text)


def test_parse_json_of_too_large_text_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crowdray.documents.MAX_BYTES", 4)
    with pytest.raises(ValueError, match="it has 5 bytes, more than 4"):
        parse_json("[1,2]")


@dataclass
class Point:
    x: int
    tags: list[str]


def test_parse_as_names_the_first_problem_in_one_line() -> None:
    assert parse_as(Point, {"x": 1, "tags": ["a"]}) == Point(1, ["a"])
    with pytest.raises(ValueError, match=r"^tags\.1: Input should be a valid string, not '2'$"):
        parse_as(Point, {"x": 1, "tags": ["a", 2]})
