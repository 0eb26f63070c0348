"""Restart markers in JPEGs, with which training decodes only the rows of its windows.

jpegtran, of libjpeg-turbo, writes the same coefficients again with a marker after each row of MCUs: about 0.1% more
bytes, the same pixels.
"""

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from crowdray.data.decoding import decode_image, orientation
from crowdray.data.jpeg_strips import END_OF_IMAGE, has_restart_rows, read_jpeg_header
from crowdray.data.sample import Sample
from crowdray.errors import DataError, UserError

PROGRAM = "jpegtran"


def program_version() -> str:
    """What the program prints as its version. Raises UserError if it is missing."""
    done = _run("-version", content=b"")
    return (done.stdout + done.stderr).decode(errors="replace")


def with_restart_markers(sample: Sample) -> Sample:
    """The sample, with restart markers in its image if `add_restart_markers` adds them, and its source's hash."""
    source_sha256 = sample.source_sha256 or sample.sha256
    content = add_restart_markers(bytes(sample.image))
    if content is None:
        return replace(sample, source_sha256=source_sha256)
    return replace(sample, image=content, sha256=hashlib.sha256(content).hexdigest(), source_sha256=source_sha256)


def add_restart_markers(content: bytes) -> bytes | None:
    """Add a restart marker after each row of MCUs of a JPEG, losslessly.

    Returns:
        None if it must stay as it is: it is not a baseline JPEG of one scan in grey or colour, it has the markers,
        other data follows the image, as in photos with previews, or the result has other pixels or another orientation.

    Raises:
        UserError: The program is missing.
    """
    header = read_jpeg_header(content) if content.startswith(b"\xff\xd8\xff") else None
    if header is None or has_restart_rows(content):
        return None
    if content.find(END_OF_IMAGE, header.scan) != len(content) - len(END_OF_IMAGE):
        return None
    done = _run("-copy", "all", "-restart", "1", content=content)
    return done.stdout if done.returncode == 0 and _is_equivalent(done.stdout, content) else None


def _is_equivalent(content: bytes, original: bytes) -> bool:
    try:
        same = np.array_equal(decode_image(content), decode_image(original))
    except DataError:
        return False
    return same and has_restart_rows(content) and orientation(content) == orientation(original)


def _run(*arguments: str, content: bytes) -> "subprocess.CompletedProcess[bytes]":
    command: Sequence[str] = (PROGRAM, *arguments)
    try:
        return subprocess.run(command, input=content, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"--restart-markers runs {PROGRAM}, which is not installed here; install libjpeg-turbo's programs "
            "(Debian, Ubuntu: apt-get install libjpeg-turbo-progs; Fedora: libjpeg-turbo-utils; macOS: jpeg-turbo)"
        ) from error
