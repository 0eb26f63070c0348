"""Model cards: facts in words, snippets that are Python, and descriptions that the database stores."""

from dataclasses import replace

import pytest

from crowdray.registry.card import MAX_DESCRIPTION, Source

from ..support.cards import model_card

SOURCE = Source("http://127.0.0.1:5000", "models:/crowdray-mall/3", "r" * 32, "7", "s" * 32)


def test_card_says_what_the_counter_was_trained_on_and_how_to_load_and_repeat_it() -> None:
    card = model_card()
    text = card.to_markdown(SOURCE)
    for part in (
        "720 photos of mall, 320x240 to 640x480 pixels, 13 to 53 heads each, median 31, of one scene; downsampled by 2",
        "| test (6) | this counter | 2.00 | 2.00 to 2.00 | 2.00 | +0.00 |",
        "| dense | 45 to 90 | 2 | 2.00 |",
        "Data: not recorded",
        card.command,
        f"![Photos, heads and densities](get-artifact?path=figures%2Fcard.png&run_uuid={SOURCE.run_id})",
        f"[Run](#/experiments/7/runs/{SOURCE.run_id}), [study](#/experiments/7/runs/{SOURCE.study_id})",
    ):
        assert part in text
    assert "does not beat" not in text
    rendered = model_card(data=replace(card.data, rendered=True)).to_markdown()
    assert "720 rendered scenes" in rendered and "never seen a photo" in rendered
    own, constant = card.errors["test"]
    assert (
        "does not beat always 26.2"
        in model_card(
            errors={"test": [replace(constant, predictor=own.predictor), replace(own, predictor=constant.predictor)]}
        ).to_markdown()
    )


@pytest.mark.parametrize("source", [None, SOURCE])
def test_snippet_of_a_card_is_python(source: Source | None) -> None:
    snippet = model_card().to_markdown(source).partition("```python\n")[2].partition("```")[0]
    compile(snippet, "card", "exec")
    assert (SOURCE.model_uri if source else "runs/mall-1/model") in snippet


@pytest.mark.parametrize("length", [1, 2000, 9000])
def test_description_of_any_card_fits_the_database(length: int) -> None:
    card = model_card(command="x" * length)
    text = card.description(SOURCE)
    assert len(text) < MAX_DESCRIPTION and "## Load it" in text
    assert text.endswith("among the artifacts of the run.") == (length > 1)
