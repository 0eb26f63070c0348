"""Build a counter from a configuration: the weights are a function of the seed."""

import pkgutil

import torch

from crowdray.config import BACKBONES, Config, ConfigError, crop_problems
from crowdray.models.backbone import Backbone
from crowdray.models.counter import COUNT, DENSITY, DEPTH, SEGMENTATION, Counter
from crowdray.models.decoders import PooledCountDecoder

NUMBERS = ("channels", "stride", "output_stride", "receptive_radius")
"""What a backbone has to say of itself."""


def backbone_of(config: Config) -> type[Backbone]:
    """The class of the configured backbone. Raises ConfigError where there is none of that name, or the crop does not
    fit it."""
    path = BACKBONES[config.model.backbone].path if config.model.backbone in BACKBONES else config.model.backbone
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        mend = "give a class that Python finds where the job runs, as package.module:Class"
        raise ConfigError([f"model.backbone is {path!r}: {error}; {mend}"]) from error
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise ConfigError([f"model.backbone is {path!r}, which is no subclass of crowdray.models.backbone.Backbone"])
    if missing := [name for name in NUMBERS if not isinstance(getattr(found, name, None), int)]:
        raise ConfigError(
            [f"model.backbone is {path!r}, whose class sets no {', no '.join(missing)}: docs/backbone.md"]
        )
    if found.stride % found.output_stride:
        raise ConfigError([f"{path}: its output_stride {found.output_stride} has to divide its stride {found.stride}"])
    if problems := list(crop_problems(config.sampling, found.stride)):
        raise ConfigError(problems)
    return found


def build_counter(config: Config, density_scale: float) -> Counter:
    """A counter with all four decoders in the memory format in which it trains fastest; torch's global
    generator is left alone."""
    backbone = backbone_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = backbone()
        side = config.sampling.crop // encoder.stride
        pooled = config.model.count_decoder == "pooled"
        decoders = {task: encoder.map_decoder(task) for task in (DENSITY, SEGMENTATION, DEPTH)}
        decoders[COUNT] = PooledCountDecoder(encoder.channels, side) if pooled else encoder.count_decoder(side)
    counter = Counter(encoder, decoders, density_scale)
    counter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return counter
