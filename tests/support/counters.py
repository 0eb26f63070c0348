"""Small exported counters, random photos, and provenance to package them with."""

import torch
from torch import Tensor, nn

from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter
from crowdray.presets import debug


def exported_counter(
    kind: type[ExportedCounter] = ExportedCounter, *, downsample: int = 1, seed: int = 0
) -> ExportedCounter:
    """A counter of the debug preset with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(build_counter(debug(), density_scale=10.0), downsample).eval()


def photo(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    """Random photos: uint8 (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


METRICS = {"val/mae": 2.5, "val/rmse": 3.25}
TAGS = {
    "crowdray.data_digest": "d" * 64,
    "crowdray.git_revision": "abc+dirty",
    "crowdray.dataset_uri": "s3://b/c",
    "crowdray.validation_images": "v" * 64,
    "mean_predictor/val/mae": "9.5",
}
