"""Names and messages reach a terminal without control characters and cannot forge a line."""

import io
import logging
import textwrap
import unicodedata
from collections.abc import Callable

import pytest
from rich.console import Console

from crowdray.console.evaluation_tables import show_evaluation
from crowdray.console.main import run_job
from crowdray.console.progress import LiveDisplay, image_progress
from crowdray.console.tables import show_prediction, validation_table
from crowdray.console.terminal import print_message
from crowdray.datasets.statistics import DatasetStats, UnusableItem, image_stats
from crowdray.datasets.validation import validate
from crowdray.errors import UserError, escaped
from crowdray.evaluation.images import FailedImage
from crowdray.pipeline.count_table import PhotoCount
from crowdray.pipeline.predict import Prediction

from ..support.builders import samples
from ..support.evaluations import evaluated_image, evaluation_report

HOSTILE = "a\x1b[31m\x1b]0;t\x07\x9b2J\u202e\u2066\x85\u2028\r\nerror:forged[bold]\udce9"
SHOWN = r"a\x1b[31m\x1b]0;t\x07\x9b2J\u202e\u2066\x85\u2028\r\nerror:forged[bold]\udce9"


def check_text(text: str) -> None:
    """No control characters but line breaks, and no line that starts like one of our own."""
    assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert not [line for line in text.splitlines() if line.strip(" │┃").startswith("error:forged")]
    assert SHOWN in "".join(text.split())


def test_escaped_shows_control_characters_and_leaves_names_of_all_languages() -> None:
    assert escaped(HOSTILE) == SHOWN
    for name in ("Straße 12.jpg", "写真\u3000一.jpg", "صورة.jpg", "Ελλάδα é e\u0301.jpg", "a\u00a0b"):
        assert escaped(name) == name


def test_tables_show_hostile_names_escaped() -> None:
    images = [evaluated_image(row, 1, 1.0, scene=f"{row}{HOSTILE}", whole=1.0, name=HOSTILE) for row in (0, 1)]
    evaluated = evaluation_report({HOSTILE: [*images, FailedImage(2, HOSTILE, HOSTILE)]}, data=HOSTILE)
    stats = DatasetStats([image_stats(sample) for sample in samples(3)], [UnusableItem(HOSTILE, HOSTILE, "", HOSTILE)])
    report = validate(HOSTILE, "none", stats)
    counted = PhotoCount(HOSTILE, HOSTILE, count=1.0, width=1, height=1, warnings=(HOSTILE,))
    prediction = Prediction(f"/{HOSTILE}/counts.csv", HOSTILE, 2, 2.0, first=[counted], unlike_example=counted)
    shown: list[Callable[[Console], None]] = [
        lambda console: show_evaluation(evaluated, console),
        lambda console: console.print(validation_table(report)),
        lambda console: show_prediction(prediction, console),
    ]
    for show in shown:
        console = Console(width=500, file=io.StringIO(), record=True)
        show(console)
        check_text(console.export_text())
    check_text(report.problems[0])


def test_messages_and_logs_show_hostile_names_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    def job(arguments: list[str]) -> None:
        logger = logging.Logger("job")
        assert logging.lastResort
        logger.addHandler(logging.lastResort)
        logger.warning("cannot read %s", HOSTILE)
        LiveDisplay(Console(file=io.StringIO())).on_status(HOSTILE)
        with image_progress(1, console=Console(file=io.StringIO())) as advance:
            advance(1)
        raise UserError(f"2 problems:\n  {HOSTILE}\n  another")

    with pytest.raises(SystemExit):
        run_job(job, [])
    out, err = capsys.readouterr()
    for text in (out, err):
        check_text(text)
    assert len(out.splitlines()) == 2
    assert err.splitlines()[1:] == ["error: 2 problems:", f"  {SHOWN}", "  another"]


def test_print_message_breaks_sentences_between_words_and_keeps_paths_whole() -> None:
    sentence = "warning: 3 of 9 photos are unlike the training data: contrast, distance 7.2"
    path = f"counts: /data/{'x' * 40}/counts.csv"
    for terminal, printed in ((True, [*textwrap.wrap(sentence, 30), path]), (False, [sentence, path])):
        console = Console(width=30, file=io.StringIO(), force_terminal=terminal, color_system=None)
        print_message(console, sentence)
        print_message(console, path)
        assert isinstance(console.file, io.StringIO)
        assert [line.rstrip() for line in console.file.getvalue().splitlines()] == printed
