"""Presets: functions that return a complete configuration, by the name that --preset takes."""

from dataclasses import replace

from crowdray.config import (
    IMAGENET,
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
    """The rendered scenes of convert.py synthetic: minutes on two CPU cores, to see the whole way work.

    EfficientNet-Lite0 on whole images of 320x240 as windows, small crops for the count.
    """
    return Config(
        sampling=SamplingConfig(crop=96, context=112, batch=8, brightness=0.1, contrast=0.1, colour=0.1),
        model=ModelConfig(backbone="lite0", count_decoder="pooled", weights=IMAGENET),
        optimizer=OptimizerConfig(name="adamw"),
        stages=StagesConfig(
            baseline=StageConfig(epochs=4, learning_rate=1e-3),
            decoders=StageConfig(epochs=1, learning_rate=1e-3),
            joint=StageConfig(epochs=5, learning_rate=1e-3),
        ),
    )


def mall_cfcn() -> Config:
    """Mall, and video of one fixed camera: frames of 640x480 at half size, validated on consecutive frames.

    Whole frames as windows, at 320x240 as in the paper. Neighbouring frames show the same people, some for hundreds of
    frames: strong augmentation of size and colour keeps the network from memorizing them. The auxiliary tasks help
    while the encoder still learns, so the joint stage is the longest.
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
    """ShanghaiTech B with the light CFCN: street photos of one size, crops of 160 pixels."""
    return Config(sampling=SamplingConfig(crops_per_image=4, brightness=0.1, contrast=0.1))


def lite0() -> Config:
    """Your own photos: EfficientNet-Lite0, pretrained on ImageNet and fast on CPUs; start here.

    Network, loss and rate were compared on ShanghaiTech B (docs/lab-notes.md); the lengths of the stages are untested.
    """
    return Config(
        sampling=SamplingConfig(
            crop=224, context=0, batch=16, crops_per_image=4, brightness=0.1, contrast=0.1, colour=0.1, scale=0.3
        ),
        model=ModelConfig(backbone="lite0", count_decoder="pooled", weights=IMAGENET),
        loss=LossConfig(local_counts=0.1),
        optimizer=OptimizerConfig(name="adamw"),
        stages=StagesConfig(
            baseline=StageConfig(epochs=6, learning_rate=5e-4),
            decoders=StageConfig(epochs=1, learning_rate=1e-3),
            joint=StageConfig(epochs=12, learning_rate=5e-4, anneal_epochs=6),
        ),
    )


def cfcn() -> Config:
    """Your own photos: CFCN, a small network without pretrained weights."""
    return Config(sampling=SamplingConfig(crops_per_image=2, brightness=0.1, contrast=0.1))


def adapt() -> Config:
    """Few photos of your own camera, up to some 200: the density loss alone, from ImageNet or a counter (--init).

    200 updates on 50 photos; `training_options` changes the number of epochs for other numbers.
    """
    config = lite0()
    return replace(
        config,
        sampling=replace(config.sampling, brightness=0.25, contrast=0.3, colour=0.2, scale=0.25),
        optimizer=replace(config.optimizer, ema_decay=0.98, warmup=20),
        stages=StagesConfig(
            baseline=StageConfig(epochs=20, learning_rate=5e-4, anneal_epochs=10),
            decoders=StageConfig(epochs=0, learning_rate=1e-3),
            joint=StageConfig(epochs=0, learning_rate=1e-3),
        ),
    )


def csrnet() -> Config:
    """Your own photos of dense crowds, with a GPU: CSRNet; --model.weights takes ImageNet's VGG-16.

    With the auxiliary tasks it is the paper's AT-CSRNet.

    The paper's count decoder would have 206 million parameters, ten times all the others, for a model that is exported
    without it: the pooled one is used instead (docs/lab-notes.md).
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
    """ShanghaiTech B with CSRNet, on a GPU: the paper's crops of 224 pixels, four per image of 1024x768."""
    config = csrnet()
    return replace(config, sampling=replace(config.sampling, crops_per_image=4))


def sha_csrnet() -> Config:
    """ShanghaiTech A with CSRNet, on a GPU: images of many sizes, heads closer together."""
    config = csrnet()
    return replace(config, target=TargetConfig(sigma=3.0))


def worldexpo_csrnet() -> Config:
    """WorldExpo'10 with CSRNet, on a GPU: validated on consecutive frames because the scenes are video."""
    config = csrnet()
    return replace(config, sampling=replace(config.sampling, validation="run", crops_per_image=1))


def debug() -> Config:
    """For tests: all stages in seconds, without a useful result."""
    return Config(
        sampling=SamplingConfig(crop=32, context=36, batch=4),
        target=TargetConfig(sigma=2.0),
        stages=StagesConfig(
            baseline=StageConfig(epochs=2, learning_rate=3e-4),
            decoders=StageConfig(epochs=1, learning_rate=1e-3),
            joint=StageConfig(epochs=2, learning_rate=3e-4),
        ),
    )


_FUNCTIONS = (demo, mall_cfcn, shb_cfcn, shb_csrnet, sha_csrnet, worldexpo_csrnet, lite0, cfcn, adapt, csrnet, debug)
PRESETS = {function.__name__.replace("_", "-"): function for function in _FUNCTIONS}

_PRESET_OF_DATASET = {
    "synthetic": "demo",
    "mall": "mall-cfcn",
    "shanghaitech-a": "sha-csrnet",
    "shanghaitech-b": "lite0",
    "worldexpo": "worldexpo-csrnet",
}


def preset(name: str) -> Config:
    """The configuration of a preset. Raises UserError, listing the presets, for an unknown name."""
    if name not in PRESETS:
        raise UserError(
            f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}, or give the path of a config.json"
        )
    return PRESETS[name]()


def preset_summaries() -> dict[str, str]:
    """When to use each preset, by name: the first line of its docstring."""
    return {name: (function.__doc__ or "").splitlines()[0].rstrip(".") for name, function in PRESETS.items()}


FEW_PHOTOS = 200
"""Up to this number of photos for training, `training_options` suggests the preset adapt."""


def preset_for(dataset: str) -> str:
    """The preset made for a dataset by its name, else the one for your own photos."""
    return _PRESET_OF_DATASET.get(dataset, "lite0")


def training_options(dataset: str, photos: int) -> str:
    """Options of the training job for a dataset by its name and its number of photos for training.

    Few photos need more epochs for the same number of updates.
    """
    if dataset in _PRESET_OF_DATASET or photos > FEW_PHOTOS:
        return f"--preset {preset_for(dataset)}"
    epochs = min(200, round(adapt().stages.baseline.epochs * 50 / max(photos, 1)))
    return f"--preset adapt --stages.baseline.epochs {epochs} --stages.baseline.anneal-epochs {epochs // 2}"
