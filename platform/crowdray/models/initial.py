"""Initial weights of a training run: encoder and density decoder of a packaged counter, as a file of plain tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from crowdray.errors import DataError
from crowdray.models.counter import Counter
from crowdray.models.export import ExportedCounter, weights_digest

_SCALE = "density_scale"
_MAX_LISTED = 3


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Weights of a stripped counter, and the unit in which its density decoder predicts."""

    tensors: Mapping[str, Tensor]
    """Parameters and buffers of encoder and density decoder."""
    density_scale: float
    """Unit of the density decoder's output; a run that starts from these weights keeps it."""
    source: str
    """URI, for messages."""

    def mismatches(self, counter: Counter) -> str:
        """List the tensors that only one side has, and those of different shapes; "" if all fit."""
        own = counter.strip().state_dict()
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        kinds = {
            "missing": [name for name in own if name not in self.tensors],
            "unexpected": [name for name in self.tensors if name not in own],
            "of another shape": [
                f"{name} {tuple(value.shape)} instead of {shapes[name]}"
                for name, value in self.tensors.items()
                if name in own and tuple(value.shape) != shapes[name]
            ],
        }
        return "; ".join(f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names)

    def load_into(self, counter: Counter, sha256: str) -> None:
        """Replace the weights of encoder and density decoder; auxiliary decoders stay as they are.

        Raises:
            DataError: The weights do not have this digest.
        """
        if not self.mismatches(counter):
            counter.strip().load_state_dict(dict(self.tensors))
            if weights_digest(ExportedCounter(counter)) == sha256:
                return
        raise DataError(
            f"{self.source} does not contain the weights {sha256}; delete it and run the same command again"
        )

    def to_bytes(self) -> bytes:
        """Serialize to safetensors."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        return save(tensors | {_SCALE: torch.tensor(self.density_scale, dtype=torch.float64)})

    @classmethod
    def from_bytes(cls, content: bytes, uri: str) -> "InitialWeights":
        """Parse what `to_bytes` returned; raises DataError for anything else."""
        try:
            tensors = load(content)
            return cls(tensors, tensors.pop(_SCALE).item(), uri)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise DataError(f"{uri} is damaged; delete it and run the same command again") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
