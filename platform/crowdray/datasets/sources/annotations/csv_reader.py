"""Read CSV tables as spreadsheets and annotation tools write them.

Excel writes UTF-8 with a byte order mark or UTF-16, semicolons or tabs where the comma separates decimals, an optional
first line `sep=;`, and empty cells and rows behind the table.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence

from crowdray import storage
from crowdray.datasets.sources.annotations.annotation import parse_number
from crowdray.errors import DataError

SEPARATORS = ",;\t"


def read_text(uri: str) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark; DataError for other encodings."""
    content = storage.read_bytes(uri)
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} is not UTF-8 ({error}); save it with that encoding, in Excel 'CSV UTF-8'") from error


def read_table(uri: str) -> tuple[str, Iterator[tuple[str, list[str]]]]:
    """Return the separator of a table, and the location and stripped cells of each row, first of the header.

    Empty rows, and empty cells behind the header, are left out. A row may be shorter than the header.

    Raises:
        DataError: while rows are read, for broken quotes or a row with more cells than the header.
    """
    text = read_text(uri)
    declared = re.match(r"sep=(.)(\r\n?|\n)", text)
    first_line = next(iter(text.splitlines()), "")
    separator = declared[1] if declared else max(SEPARATORS, key=first_line.count)
    return separator, _rows(uri, text[declared.end() :] if declared else text, separator, first=2 if declared else 1)


def _rows(uri: str, text: str, separator: str, first: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of a table whose text starts in line `first` of the file."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # Label Studio writes all heads into one cell
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    width = 0
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            while len(cells) > width and not cells[-1]:
                cells.pop()
            width = width or len(cells)
            where = f"{uri}, line {reader.line_num + first - 1}"
            if len(cells) > width:
                raise DataError(f"{where} has {len(cells)} cells, the header has {width}; correct it")
            yield where, cells
    except csv.Error as error:
        raise DataError(f"{uri}, line {reader.line_num + first - 1}: {error}; correct it") from error


def parse_decimals(cells: Sequence[str], locations: Sequence[str]) -> list[float]:
    """Parse the numbers of a row, which may have decimal commas; DataError with the location of a wrong one."""
    joined = " ".join(cells)
    if "," in joined and "." in joined:
        raise DataError(f"{locations[0]}: {joined[:60]!r} mixes decimal points and commas; use one of them")
    return [parse_number(cell.replace(",", "."), where) for cell, where in zip(cells, locations, strict=True)]


def read_records(uri: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the location and the cells by column name of each row below the header; DataError for a shorter row."""
    _, rows = read_table(uri)
    _, header = next(rows, (uri, []))
    for where, cells in rows:
        if len(cells) < len(header):
            raise DataError(f"{where} has {len(cells)} cells, the header has {len(header)}; export it again")
        yield where, dict(zip(header, cells, strict=True))
