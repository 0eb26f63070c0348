"""Presets: each a function that returns a whole configuration, found by its name on the command line."""

from collections.abc import Callable
from dataclasses import replace

from crowdray.config import (
    Config,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    StageConfig,
    StagesConfig,
    TargetConfig,
)
from crowdray.errors import UserError


def demo() -> Config:
    """Synthetic scenes of 320x240, minutes on two CPU cores; whole images as context, small crops for the count."""
    return Config(
        sampling=SamplingConfig(crop=96, context=112, batch=4, brightness=0.1, contrast=0.1, colour=0.1),
        loss=LossConfig(gradient_share=0.3),
        optimizer=OptimizerConfig(ema_decay=0.995, warmup=30),
        stages=StagesConfig(
            baseline=StageConfig(epochs=3, learning_rate=2e-3),
            decoders=StageConfig(epochs=1, learning_rate=2e-3),
            joint=StageConfig(epochs=5, learning_rate=1e-3),
        ),
    )


def mall_cfcn() -> Config:
    """Mall at 320x240 as in the paper, whole frames as context; a run of training frames validates, since
    neighbours show the same people.

    Sizes and colours vary much: the few people who stay for hundreds of frames are not to be learnt by heart. The
    tasks pay where the encoder still learns, so the joint stage is the long one.
    """
    return Config(
        sampling=SamplingConfig(
            validation="run",
            downsample=2,
            crop=160,
            context=80,
            brightness=0.25,
            contrast=0.3,
            colour=0.2,
            scale=0.25,
        ),
        loss=LossConfig(gradient_share=0.5),
        optimizer=OptimizerConfig(weight_decay=0.5, ema_decay=0.98, plateau_patience=2, plateau_factor=0.3),
        stages=StagesConfig(
            baseline=StageConfig(epochs=3, learning_rate=1e-3),
            decoders=StageConfig(epochs=1, learning_rate=1e-3),
            joint=StageConfig(epochs=16, learning_rate=1e-3),
        ),
    )


def shb_cfcn() -> Config:
    """ShanghaiTech B with the light network, 160-pixel crops."""
    return Config(sampling=SamplingConfig(crops_per_image=4, brightness=0.1, contrast=0.1))


def cfcn() -> Config:
    """The light network on data of one's own."""
    return Config(sampling=SamplingConfig(crops_per_image=2, brightness=0.1, contrast=0.1))


def csrnet() -> Config:
    """CSRNet, AT-CSRNet with its tasks, on data of one's own; --model.weights names VGG-16's on ImageNet.

    The paper's count decoder has 206 million parameters here, ten times all others, and is thrown away: the pooled one
    is the default (docs/lab-notes.md).
    """
    return Config(
        sampling=SamplingConfig(crop=224, context=0, crops_per_image=2, brightness=0.1, contrast=0.1),
        model=ModelConfig(backbone="csrnet", count_decoder="pooled"),
        stages=StagesConfig(
            baseline=StageConfig(epochs=40, learning_rate=1e-4),
            decoders=StageConfig(epochs=4, learning_rate=1e-3),
            joint=StageConfig(epochs=20, learning_rate=1e-4),
        ),
    )


def shb_csrnet() -> Config:
    """ShanghaiTech B with CSRNet, the paper's crops of 224 pixels; four of each photo of 1024x768."""
    config = csrnet()
    return replace(config, sampling=replace(config.sampling, crops_per_image=4))


def sha_csrnet() -> Config:
    """ShanghaiTech A with CSRNet: photos of many sizes, heads closer together."""
    config = csrnet()
    return replace(config, target=TargetConfig(sigma=3.0))


def worldexpo_csrnet() -> Config:
    """WorldExpo'10 with CSRNet: scenes of video, so a run of frames validates."""
    config = csrnet()
    return replace(config, sampling=replace(config.sampling, validation="run", crops_per_image=1))


def debug() -> Config:
    """The whole way in seconds: what the tests use."""
    return Config(
        sampling=SamplingConfig(crop=32, context=36, batch=4),
        target=TargetConfig(sigma=2.0),
        stages=StagesConfig(
            baseline=StageConfig(epochs=2, learning_rate=3e-4),
            decoders=StageConfig(epochs=1, learning_rate=1e-3),
            joint=StageConfig(epochs=2, learning_rate=3e-4),
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "mall-cfcn": mall_cfcn,
    "shb-cfcn": shb_cfcn,
    "shb-csrnet": shb_csrnet,
    "sha-csrnet": sha_csrnet,
    "worldexpo-csrnet": worldexpo_csrnet,
    "cfcn": cfcn,
    "csrnet": csrnet,
    "debug": debug,
}


def preset(name: str) -> Config:
    """The configuration of a preset; a UserError names those there are."""
    if name not in PRESETS:
        raise UserError(
            f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}, or give the path of a config.json"
        )
    return PRESETS[name]()
