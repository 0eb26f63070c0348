"""Records of an ablation: a cell is one training run, the result is what is published of all of them."""

from dataclasses import asdict, dataclass
from typing import Self

from crowdray.documents import parse_as, parse_document, to_document
from crowdray.errors import DataError
from crowdray.evaluation.metrics import ImageCount


@dataclass(frozen=True)
class CellResult:
    """Counts of one training run of an ablation."""

    arm: str
    """Name of its arm."""
    fraction: float
    """Fraction of the training images that it used."""
    backbone: str
    """Name of its backbone."""
    seed: int
    """Its seed."""
    updates: int
    """Number of optimizer updates."""
    seconds: float
    """Training time in seconds."""
    validation: list[ImageCount]
    """Counts of the validation images by the exported weights."""
    test: list[ImageCount] | None
    """Counts of the test images; None before the test split is read, and for a dataset without one."""

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return to_document(asdict(self))

    @classmethod
    def from_json(cls, text: bytes | str, uri: str) -> Self:
        """Parse the text of `to_json`; raise DataError naming `uri` if it is damaged."""
        try:
            return parse_as(cls, parse_document(text))
        except ValueError as error:
            raise DataError(f"{uri} is damaged ({error}); delete it and run the same command again") from error
