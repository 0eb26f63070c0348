"""Building a counter from a configuration; the initial weights are a function of the seed."""

import pkgutil

import torch

from crowdray.config import BACKBONES, Config, ConfigError, crop_problems
from crowdray.errors import missing_package
from crowdray.models.backbone import Backbone
from crowdray.models.counter import COUNT, DENSITY, DEPTH, SEGMENTATION, Counter
from crowdray.models.decoders import PooledCountDecoder

REQUIRED_NUMBERS = ("channels", "stride", "output_stride", "receptive_radius")
"""Class attributes that every backbone must set."""


def backbone_class(config: Config) -> type[Backbone]:
    """The class of the configured backbone.

    Raises:
        ConfigError: If it cannot be imported or is incomplete, or the crop does not fit its stride.
    """
    path = BACKBONES[config.model.backbone].path if config.model.backbone in BACKBONES else config.model.backbone
    problem = f"model.backbone is {path!r}"
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        if isinstance(error, ImportError) and error.name and not path.startswith(error.name):
            raise ConfigError([f"{problem}: {missing_package(error)}"]) from error
        fix = "give a class that Python can import where the job runs, as package.module:Class"
        raise ConfigError([f"{problem}: {error}; {fix}"]) from error
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise ConfigError([f"{problem}, which is not a subclass of crowdray.models.backbone.Backbone"])
    if missing := [name for name in REQUIRED_NUMBERS if not isinstance(getattr(found, name, None), int)]:
        raise ConfigError([f"{problem}, whose class must also set {', '.join(missing)}: see docs/backbone.md"])
    if found.stride % found.output_stride:
        raise ConfigError([f"{problem}, whose output_stride {found.output_stride} must divide its stride"])
    if problems := list(crop_problems(config.sampling, found.stride)):
        raise ConfigError(problems)
    return found


def build_counter(config: Config, density_scale: float) -> Counter:
    """A counter with all four decoders, channels last in memory; torch's global random generator is not advanced."""
    backbone = backbone_class(config)
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
