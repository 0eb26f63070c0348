"""Build a counter from a configuration: the weights are a function of the seed."""

import torch

from crowdray.config import Config
from crowdray.models.cfcn import CFCNEncoder
from crowdray.models.counter import COUNT, DENSITY, DEPTH, SEGMENTATION, Counter
from crowdray.models.decoders import CountDecoder, LogitDecoder, MapDecoder


def build_counter(config: Config, density_scale: float) -> Counter:
    """A counter with all four decoders in the memory format in which it trains fastest; torch's global
    generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = CFCNEncoder()
        channels = encoder.channels
        decoders = {
            DENSITY: MapDecoder(channels),
            SEGMENTATION: LogitDecoder(channels),
            DEPTH: MapDecoder(channels),
            COUNT: CountDecoder(channels, config.sampling.crop // encoder.stride),
        }
    counter = Counter(encoder, decoders, density_scale)
    counter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return counter
