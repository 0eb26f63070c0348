"""Read XML annotation files, element by element."""

import io
from collections.abc import Iterator
from xml.etree.ElementTree import Element, ParseError

from crowdray import storage
from crowdray.datasets.extras import import_extra
from crowdray.errors import DataError


def read_elements(uri: str, root: str, fix: str) -> Iterator[Element]:
    """Yield the elements below the root and free each one after use: exports can be large.

    Args:
        uri: Location of the file.
        root: Tag of the root element.
        fix: How to export the right file, for messages.
    """
    content = io.BytesIO(storage.read_bytes(uri))
    parser = import_extra("defusedxml.ElementTree", "XML")
    depth = 0
    try:
        for event, element in parser.iterparse(content, events=("start", "end")):
            depth += 1 if event == "start" else -1
            if event == "start" and depth == 1 and element.tag != root:
                raise DataError(f"{uri} starts with <{element.tag}>, not with <{root}>; {fix}")
            if event == "end" and depth == 1:
                yield element
                element.clear()
    except DataError:
        raise
    except (ParseError, ValueError, LookupError) as error:  # forbidden entities and unknown encodings
        raise DataError(f"{uri} is not readable XML ({error}); {fix}") from error
