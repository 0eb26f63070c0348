"""Loading of exported programs (pt2) without running anything that they contain."""

import io
import logging
import math
import zipfile
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from crowdray.registry.program_schema import Program, StoredTensor, StoredTensors

MAX_ARCHIVE_BYTES = 8 * 2**30
MAX_JSON_BYTES = 32 * 2**20

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
    try:
        if path.stat().st_size > MAX_ARCHIVE_BYTES:
            raise ProgramError(f"the file is larger than {MAX_ARCHIVE_BYTES // 2**30} GiB")
        with zipfile.ZipFile(path) as archive:
            checked = _checked_archive(archive)
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, KeyError, ValidationError) as error:
        raise ProgramError(_reason(error)) from error
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return torch.export.load(checked).module()
    except Exception as error:  # the program is data: whatever torch raises is about it
        raise ProgramError(f"torch rejects it: {_first_line(error)}") from error
    finally:
        logger.setLevel(level)


def _checked_archive(archive: zipfile.ZipFile) -> io.BytesIO:
    """Return a copy of the allowed members, with empty metadata and example inputs."""
    members = {name.partition("/")[2]: name for name in archive.namelist()}

    def read(member: str, limit: int = MAX_JSON_BYTES) -> bytes:
        info = archive.getinfo(members[member])
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise ProgramError(f"{member} is compressed or larger than {limit} bytes")
        return archive.read(info)

    program = Program.model_validate_json(read("models/model.json"))
    for node in program.graph_module.graph.nodes:
        node.metadata.clear()
    program.graph_module.metadata.clear()
    parts = {
        "models/model.json": program.model_dump_json(exclude_unset=True).encode(),
        "data/sample_inputs/model.pt": _example_input(),
        "archive_format": b"pt2",
        "archive_version": b"0",
        ".data/version": b"3\n",
        "byteorder": b"little",
    }
    for folder, config in ((_WEIGHTS, "model_weights_config.json"), (_CONSTANTS, "model_constants_config.json")):
        stored = StoredTensors.model_validate_json(read(folder + config))
        parts[folder + config] = stored.model_dump_json().encode()
        for name, tensor in stored.config.items():
            content = parts.setdefault(folder + tensor.path_name, read(folder + tensor.path_name, MAX_ARCHIVE_BYTES))
            _check_tensor(name, tensor, len(content))
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
    reach = meta.storage_offset.as_int + sum(
        (side - 1) * stride.as_int for side, stride in zip(shape, meta.strides, strict=False)
    )
    needed = (reach + 1) * _ITEM_BYTES[meta.dtype]
    if len(shape) != len(meta.strides) or not math.prod(shape) or needed > size or size % _ITEM_BYTES[meta.dtype]:
        raise ProgramError(f"{name} of shape {tuple(shape)} does not fit its {size} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        position = ".".join(str(part) for part in first["loc"][-4:])
        return f"{position}: {first['msg'].removeprefix('Value error, ')}"
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
