"""Tables that leave out columns where a terminal is too narrow, instead of cutting their cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

_UNLIMITED = 10_000


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    header: RenderableType
    cells: Sequence[RenderableType]
    drop: int = 0
    """Columns with the highest number are left out first, those with 0 never."""
    justify: Any = "right"


def fitting_table(
    columns: Sequence[Column], console: Console, *, styles: Sequence[str] | None = None, **options: Any
) -> Table:
    """Return a table of the columns that fit into the console.

    Args:
        columns: All columns, with equally many cells.
        console: Where the table is printed.
        styles: Style of each row.
        options: Further arguments of the table.
    """
    wide = console.options.update(width=_UNLIMITED)
    while True:
        table = Table(**options)
        for column in columns:
            table.add_column(column.header, justify=column.justify, no_wrap=True)
        rows = zip(*(column.cells for column in columns), strict=True)
        for number, cells in enumerate(rows):
            table.add_row(*cells, style=styles[number] if styles else None)
        bare = Table(**{**options, "title": None, "caption": None})
        bare.columns, bare.rows = table.columns, table.rows
        droppable = max(columns, key=lambda column: column.drop)
        if not droppable.drop or Measurement.get(console, wide, bare).maximum <= console.width:
            return table
        columns = [column for column in columns if column is not droppable]
