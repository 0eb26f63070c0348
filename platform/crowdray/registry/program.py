"""Loading of exported programs (pt2) without running anything that they contain."""

import io
import logging
import math
import os
import stat
import warnings
import zipfile
from pathlib import Path
from typing import IO

import torch
from pydantic import ValidationError
from torch import nn

from crowdray.errors import escaped, first_line
from crowdray.registry.program_schema import Program, StoredTensor, StoredTensors

MAX_ARCHIVE_BYTES = 4 * 2**30
MAX_JSON_BYTES = 8 * 2**20

_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_ITEM_BYTES = dict(zip(range(1, 14), (1, 1, 2, 4, 8, 2, 4, 8, 4, 8, 16, 1, 2), strict=True))
"""Bytes of a value by torch's number of its dtype."""


class ProgramError(ValueError):
    """The file is not the exported program of a counter, or contains more than one may."""


def load_program(path: Path) -> nn.Module:
    """Load an exported program of one input, `image`.

    torch evaluates expressions and unpickles example inputs of the archive that it reads. It therefore gets a new
    archive, of the parts that are checked here and no others, and reads no byte of the given one.

    Raises:
        ProgramError: A part is missing, damaged or not allowed.
        FileNotFoundError: There is no such file.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        checked = checked_archive(path)
        with warnings.catch_warnings(action="ignore"):
            return torch.export.load(checked).module()
    except (FileNotFoundError, ProgramError):
        raise
    except Exception as error:  # the program is data: whatever zipfile and torch raise is about it
        raise ProgramError(_reason(error)) from error
    finally:
        logger.setLevel(level)


def open_regular(path: Path, limit: int) -> IO[bytes]:
    """Open a file for reading. Raises ProgramError if it is a device or a pipe, or larger than `limit` bytes."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file
    file.close()
    raise ProgramError(f"{path.name} is not a regular file of at most {limit} bytes")


def checked_archive(path: Path) -> io.BytesIO:
    """Return the archive of the checked parts of an exported program, the one that `load_program` loads."""
    with open_regular(path, MAX_ARCHIVE_BYTES) as file, zipfile.ZipFile(file) as archive:
        return _checked_copy(archive, path.stat().st_size)


def _checked_copy(archive: zipfile.ZipFile, size: int) -> io.BytesIO:
    """Return a copy of the allowed members, with empty metadata and example inputs.

    Args:
        archive: The archive.
        size: Its size in bytes, more than which members that do not overlap cannot have.
    """
    members = {name.partition("/")[2]: name for name in archive.namelist()}
    parts: dict[str, bytes] = {}

    def read(member: str, limit: int = MAX_ARCHIVE_BYTES) -> bytes:
        info = archive.getinfo(members[member])
        limit = min(limit, size - sum(map(len, parts.values())))
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise ProgramError(f"{member} is compressed or larger than {limit} bytes")
        return archive.read(info)

    program = Program.model_validate_json(read("models/model.json", MAX_JSON_BYTES))
    for node in program.graph_module.graph.nodes:
        node.metadata.clear()
    program.graph_module.metadata.clear()
    for folder, config in ((_WEIGHTS, "model_weights_config.json"), (_CONSTANTS, "model_constants_config.json")):
        stored = StoredTensors.model_validate_json(read(folder + config, MAX_JSON_BYTES))
        for name, tensor in stored.config.items():
            member = folder + tensor.path_name
            if member not in parts:
                parts[member] = read(member)
            _check_tensor(name, tensor, len(parts[member]))
        parts[folder + config] = stored.model_dump_json().encode()
    parts |= {
        "models/model.json": program.model_dump_json(exclude_unset=True).encode(),
        "data/sample_inputs/model.pt": _example_input(),
        "archive_format": b"pt2",
        "archive_version": b"0",
        ".data/version": b"3\n",
        "byteorder": b"little",
    }
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        for member, content in parts.items():
            target.writestr("model/" + member, content)
    copy.seek(0)
    return copy


def _example_input() -> bytes:
    """Return the arguments of one call as torch stores them; without them it checks no guard."""
    content = io.BytesIO()
    torch.save(((torch.zeros(2, 3, 64, 84, dtype=torch.uint8),), {}), content)
    return content.getvalue()


def _check_tensor(name: str, tensor: StoredTensor, size: int) -> None:
    """Raise ProgramError unless all values of a tensor lie within the `size` bytes that are stored."""
    meta = tensor.tensor_meta
    shape = [part.as_int for part in meta.sizes]
    last = meta.storage_offset.as_int + sum(
        (side - 1) * stride.as_int for side, stride in zip(shape, meta.strides, strict=False)
    )
    values, rest = divmod(size, _ITEM_BYTES[meta.dtype])
    if len(shape) != len(meta.strides) or rest or last >= values or not 0 < math.prod(shape) <= values:
        raise ProgramError(f"{name[:80]} of shape {tuple(shape)} does not fit its {size} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        position = ".".join(str(part) for part in first["loc"][-4:])
        reason = f"{position}: {first['msg'].removeprefix('Value error, ')}"
    else:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else first_line(error)
    return escaped(reason)[:300]
