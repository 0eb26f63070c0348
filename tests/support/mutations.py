"""Random damage to the content of a file."""

import zlib
from collections.abc import Mapping

import numpy as np

NUMBERS = [np.float64(value).tobytes() for value in (np.nan, np.inf, -1.0, 1e300, 1e9, 0.0)]
WORDS = [b"nan", b"-inf", b"1e999", b"1e30", b"-3", b"", b"[]", b"null", b'"a"', b"9" * 5000, b"\xff", b"1 1"]


def mutated(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Flip bits, truncate, overwrite a number or a word, delete bytes, or swap in another file."""
    data = bytearray(content)
    if not data:
        return bytes(rng.choice(np.array(WORDS, dtype=object)))
    position = int(rng.integers(len(data)))
    match rng.integers(7):
        case 0:
            for bit in rng.integers(len(data), size=rng.integers(1, 9)):
                data[bit] ^= 1 << int(rng.integers(8))
        case 1:
            del data[position:]
        case 2:
            data[position : position + 8] = NUMBERS[rng.integers(len(NUMBERS))]
        case 3:  # aligned to the doubles of a MATLAB file
            position -= position % 8
            data[position : position + 8] = NUMBERS[rng.integers(len(NUMBERS))]
        case 4:
            words = content.split()
            word = words[rng.integers(len(words))] if words else b""
            data = bytearray(content.replace(word, WORDS[rng.integers(len(WORDS))], int(rng.integers(1, 3))))
        case 5:
            del data[position : position + int(rng.integers(1, 17))]
        case 6:
            return others[rng.integers(len(others))]
    return bytes(data)


def damage(name: str, files: Mapping[str, bytes], case: int) -> dict[str, bytes]:
    """The files after the damage of a case, which depends on its number alone."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), case])
    path = sorted(files)[rng.integers(len(files))]
    return {**files, path: mutated(files[path], list(files.values()), rng)}
