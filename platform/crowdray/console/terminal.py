"""Text for terminals and logs: names of files and messages act neither as markup nor as control characters."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from crowdray.credentials import redacted
from crowdray.errors import escaped

if TYPE_CHECKING:  # main imports this module before it knows whether the dependencies are installed
    from rich.console import Console
    from rich.text import Text


def one_line(text: str, style: str = "") -> Text:
    """Return text for a table: a cell, a title or a column."""
    from rich.text import Text

    return Text(escaped(text), style)


def message(text: str) -> str:
    """Return a message of several lines, which continue with an indent of two spaces; other line breaks are escaped."""
    return "\n  ".join(escaped(line) for line in text.split("\n  "))


def print_line(text: str) -> None:
    """Print a line of a log at once."""
    print(escaped(text), flush=True)


def print_message(console: Console, text: str, style: str = "") -> None:
    """Print a message; a terminal breaks its lines between words, but not those of paths, URLs and commands."""
    from rich.text import Text

    copied = "/" in text  # a line break in it would be pasted too
    console.print(Text(message(text), style), soft_wrap=copied or not console.is_terminal)


class OneLineFormatter(logging.Formatter):
    """Formats a message on one line; a traceback follows on others."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the escaped message."""
        return escaped(redacted(super().formatMessage(record)))
