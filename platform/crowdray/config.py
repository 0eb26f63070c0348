"""Typed configuration of a training: groups of fields with their meaning and unit, validated together, and
its JSON form."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from crowdray.errors import InfeasibleConfigError


class ConfigError(InfeasibleConfigError):
    """All problems of a configuration together: each with its field, the value given, and the mend."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("the configuration cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class SamplingConfig:
    """Which pixels a training step sees."""

    validation: Literal["random", "run"] = "random"
    """How validation images are taken from the training split: drawn at random (the paper), or one run of
    neighbours at a place drawn at random (video, where frames seconds apart show the same people)."""
    validation_fraction: float = 1 / 6
    """Share of the training split that is kept for validation."""
    downsample: int = 1
    """Images are averaged over squares of this many pixels before anything else, in training, evaluation and
    the shipped model."""
    crop: int = 160
    """Side in pixels (after downsampling) of the square whose heads the count decoder regresses."""
    context: int = 36
    """Real pixels around the crop that the network sees as well. Map losses count every pixel of this window
    whose receptive field the window does not cut, so that a pixel is trained as it will be used: inside a
    whole image. CFCN reaches 34 pixels."""
    batch: int = 8
    """Windows of one update, over all workers together."""
    crops_per_image: int = 1
    """Windows drawn from one decoded image in an epoch."""
    flip: float = 0.5
    """Probability of a horizontal mirror."""
    brightness: float = 0.0
    """Largest shift of all pixels, as a share of the full range."""
    contrast: float = 0.0
    """Largest relative change of contrast."""
    colour: float = 0.0
    """Largest relative change of each of the three colours."""
    scale: float = 0.0
    """Largest relative change of size: a batch is shown at one size between 1 / (1 + scale) and 1 + scale."""
    roi: bool = True
    """Keep losses and counts inside the dataset's region of interest, where it has one."""
    cache_gib: float = 2.0
    """Memory in GiB of each worker for decoded images."""
    gpu_cache_gib: float = 0.0
    """Memory in GiB of each worker's GPU for all decoded training images, of which windows are then cut there; where
    they might take more, as with 0, and where scale varies their size, the CPU cuts them."""

    def problems(self) -> Iterator[str]:
        """What cannot be used, one sentence each."""
        yield from _within("sampling.validation_fraction", self.validation_fraction, 0.0, 0.9)
        yield from _at_least("sampling.downsample", self.downsample, 1)
        yield from _at_least("sampling.batch", self.batch, 1)
        yield from _at_least("sampling.crops_per_image", self.crops_per_image, 1)
        for name in ("cache_gib", "gpu_cache_gib"):
            yield from _at_least(f"sampling.{name}", getattr(self, name), 0.0)
        yield from _at_least("sampling.context", self.context, 0)
        for name in ("flip", "brightness", "contrast", "colour", "scale"):
            yield from _within(f"sampling.{name}", getattr(self, name), 0.0, 1.0)
        yield from _at_least("sampling.crop", self.crop, 16)


def crop_problems(sampling: SamplingConfig, stride: int) -> Iterator[str]:
    """What does not fit a backbone of this stride."""
    for name in ("crop", "context"):
        if (value := getattr(sampling, name)) % stride:
            nearest = max(stride, value // stride * stride)
            yield f"sampling.{name} is {value}; the model's stride of {stride} must divide it: try {nearest}"


@dataclass(frozen=True)
class TargetConfig:
    """How annotated points become targets."""

    sigma: float = 4.0
    """Deviation in pixels of the Gaussian that stands for one head in the density map."""
    threshold: float = 0.3
    """A pixel is crowd where the density exceeds this fraction of one head's peak."""

    def problems(self) -> Iterator[str]:
        """What cannot be used, one sentence each."""
        yield from _within("target.sigma", self.sigma, 0.25, 64.0)
        if not 0 < self.threshold < 1:
            yield f"target.threshold is {self.threshold}; it is a fraction of one head's peak: give one between 0 and 1"


@dataclass(frozen=True)
class KnownBackbone:
    """A backbone with a name of its own."""

    path: str
    """Where its class is: module:Class."""
    stride: int
    """Its stride in pixels, so that crops can be checked before anything is imported."""


BACKBONES = {
    "cfcn": KnownBackbone("crowdray.models.cfcn:CFCN", 4),
    "csrnet": KnownBackbone("crowdray.models.csrnet:CSRNet", 8),
    "csrnet-table1": KnownBackbone("crowdray.models.csrnet:CSRNetTable1", 16),
    "convnext": KnownBackbone("crowdray.models.convnext:ConvNeXt", 16),
}
"""Backbones by their names on the command line."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    backbone: str = "cfcn"
    """cfcn (light), csrnet (VGG-16, as published), csrnet-table1 (as the paper prints it), convnext (modern; needs
    transformers), or a class of your own as package.module:Class (docs/backbone.md)."""
    count_decoder: Literal["paper", "pooled"] = "paper"
    """Auxiliary decoder of the count: the paper's, whose first layer spans the whole crop (13 million parameters for
    cfcn, 206 million for csrnet), or one that averages over it. Both are stripped before the model ships."""
    weights: str = ""
    """Path or URI of published weights of the encoder to begin with, .safetensors or .pth: for csrnet those of VGG-16
    on ImageNet in torchvision's layout."""
    weights_sha256: str = ""
    """Hash that this file must have; without it the one that it has is written down."""

    def problems(self) -> Iterator[str]:
        """What cannot be used, one sentence each."""
        if self.backbone not in BACKBONES and ":" not in self.backbone:
            yield (
                f"model.backbone is {self.backbone!r}; choose one of {', '.join(BACKBONES)}, or give a class of your "
                "own as package.module:Class"
            )
        if self.weights_sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            yield f"model.weights_sha256 is {self.weights_sha256!r}; a SHA-256 has 64 hexadecimal digits, small letters"


PAPER_WEIGHTS = {"segmentation": 0.04, "depth": 0.6, "count": 1.0}
"""Loss weights of the auxiliary tasks in the paper (Section 5.2)."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the auxiliary losses in the joint stage (eq. 5), in the paper's units."""

    segmentation: float = PAPER_WEIGHTS["segmentation"]
    """Weight of the crowd segmentation's cross-entropy (eq. 1); 0 drops the task."""
    depth: float = PAPER_WEIGHTS["depth"]
    """Weight of the distilled depth's squared error (eq. 2); 0 drops the task."""
    count: float = PAPER_WEIGHTS["count"]
    """Weight of the count's squared error (eq. 3); 0 drops the task."""
    gradient_share: float = 0.1
    """What the paper's weights (0.04, 0.6, 1) mean here: at the start of the joint stage each auxiliary loss
    is scaled so that, at the paper's weight, its gradient at the encoder's features is this share of the
    density loss's gradient."""

    def problems(self) -> Iterator[str]:
        """What cannot be used, one sentence each."""
        for name in ("segmentation", "depth", "count", "gradient_share"):
            yield from _at_least(f"loss.{name}", getattr(self, name), 0.0)


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated."""

    name: Literal["sgd", "adamw", "muon"] = "muon"
    """sgd is the paper's; muon needs a quarter of adamw's epochs here (docs/lab-notes.md)."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """L2 penalty of sgd, decoupled decay of adamw and muon."""
    warmup: int = 100
    """Updates over which a stage's learning rate rises from 0; fresh Adam moments at full rate can kill ReLUs
    for good."""
    plateau_patience: int = 5
    """Epochs without a better validation error before the learning rate falls."""
    plateau_factor: float = 0.1
    """What the learning rate is multiplied with then."""
    clip: float = 1.0
    """Largest norm of all gradients together; larger ones are scaled down to it. 0 leaves them."""
    grad_accumulation_steps: int = 1
    """Parts in which a worker takes its share of a batch, to save memory: the update is the same, up to rounding,
    but for networks with BatchNorm or dropout."""
    ema_decay: float = 0.99
    """Decay per update of the running average of the weights, which is what is validated and shipped; 0 ships
    the last weights."""

    def problems(self) -> Iterator[str]:
        """What cannot be used, one sentence each."""
        yield from _within("optimizer.momentum", self.momentum, 0.0, 0.9999)
        yield from _at_least("optimizer.weight_decay", self.weight_decay, 0.0)
        yield from _at_least("optimizer.warmup", self.warmup, 0)
        yield from _at_least("optimizer.plateau_patience", self.plateau_patience, 0)
        yield from _within("optimizer.plateau_factor", self.plateau_factor, 0.001, 0.999)
        yield from _at_least("optimizer.clip", self.clip, 0.0)
        yield from _at_least("optimizer.grad_accumulation_steps", self.grad_accumulation_steps, 1)
        yield from _within("optimizer.ema_decay", self.ema_decay, 0.0, 0.99999)


@dataclass(frozen=True)
class StageConfig:
    """Length and pace of one stage."""

    epochs: int
    """Passes over the training images; 0 leaves the stage out."""
    learning_rate: float
    """First learning rate; it falls on plateaus only, so that it never looks ahead to the stage's length."""
    patience: int = 0
    """Epochs without a better validation error after which the stage ends; 0 goes on to its full length."""

    def problems(self, place: str) -> Iterator[str]:
        """What cannot be used, one sentence each."""
        yield from _at_least(f"{place}.epochs", self.epochs, 0)
        yield from _at_least(f"{place}.patience", self.patience, 0)
        yield from _within(f"{place}.learning_rate", self.learning_rate, 1e-9, 10.0)


@dataclass(frozen=True)
class StagesConfig:
    """The three stages of Section 3.3."""

    baseline: StageConfig = field(default_factory=lambda: StageConfig(epochs=40, learning_rate=3e-4))
    """Encoder and density decoder, density loss only."""
    decoders: StageConfig = field(default_factory=lambda: StageConfig(epochs=4, learning_rate=1e-3))
    """The auxiliary decoders on frozen features, side by side."""
    joint: StageConfig = field(default_factory=lambda: StageConfig(epochs=20, learning_rate=3e-4))
    """Everything, end to end."""

    def problems(self) -> Iterator[str]:
        """What cannot be used, one sentence each."""
        for name in ("baseline", "decoders", "joint"):
            stage: StageConfig = getattr(self, name)
            yield from stage.problems(f"stages.{name}")
        if self.baseline.epochs == 0:
            yield "stages.baseline.epochs is 0; the later stages start from the baseline: give at least 1"
        if self.joint.epochs > 0 and self.decoders.epochs == 0:
            yield (
                "stages.decoders.epochs is 0 but stages.joint.epochs is not; fresh decoders would disturb the encoder: "
                "give at least 1"
            )


def _once_a_switch(value: Any) -> Any:
    """Files from when `compile` was true or false."""
    return {False: "no", True: "yes"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class NumericsConfig:
    """How numbers are computed."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the convolutions; auto takes bf16 where the processor multiplies it natively. Weights,
    losses, targets and evaluation stay fp32 either way."""
    tf32: bool = False
    """Let a GPU round the factors of fp32 products to 10 bits (TensorFloat-32): faster where precision is fp32."""
    compile: Annotated[Literal["no", "yes", "graphs"], BeforeValidator(_once_a_switch)] = "no"
    """Compile the network with torch.compile: faster steps after minutes of compiling; on a CPU it needs g++. graphs
    records CUDA graphs too: less waiting between small kernels, for memory of their own."""
    activation_checkpointing: bool = False
    """Compute the activations of the encoder again in the backward pass instead of keeping them: less memory for
    about a third more time, and the same results."""
    threads: int = 0
    """CPU threads of each worker; 0 shares the machine's cores between the workers."""
    grad_allreduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic in which workers sum their gradients: bf16 moves half the bytes, and rounds them."""

    def problems(self) -> Iterator[str]:
        """What cannot be used, one sentence each."""
        yield from _at_least("numerics.threads", self.threads, 0)
        if self.activation_checkpointing and self.compile != "no":
            yield (
                f"numerics.activation_checkpointing is True and numerics.compile is {self.compile}; the compiler decides "
                "itself what it recomputes: set only one of them"
            )


@dataclass(frozen=True)
class Config:
    """Everything that decides what a training computes; where it runs is no part of it."""

    seed: int = 0
    """Of the weights, the validation split, the order of samples and their augmentation."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)

    def __post_init__(self) -> None:
        groups = (
            self.sampling,
            self.target,
            self.model,
            self.loss,
            self.optimizer,
            self.stages,
            self.numerics,
        )
        problems = [problem for group in groups for problem in group.problems()]
        if known := BACKBONES.get(self.model.backbone):
            problems += crop_problems(self.sampling, known.stride)
        if self.numerics.compile == "graphs" and self.sampling.scale:
            problems.append(
                f"numerics.compile is graphs and sampling.scale {self.sampling.scale}; each size of window would have "
                "a graph and memory of its own: give --numerics.compile yes, or --sampling.scale 0"
            )
        if not 0 <= self.seed < 2**31:
            problems.insert(0, f"seed is {self.seed}; give a number from 0 to {2**31 - 1}")
        if problems:
            raise ConfigError(problems)


def to_json(config: Config) -> str:
    """The configuration as JSON text, which `from_json` takes back unchanged."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def deciding(config: Config) -> dict[str, Any]:
    """The fields that decide what a training computes: all but the memory given to images, which decides its pace."""
    sampling = {name: value for name, value in dataclasses.asdict(config.sampling).items() if "cache_gib" not in name}
    return dataclasses.asdict(config) | {"sampling": sampling}


def from_json(text: str | bytes, place: str) -> Config:
    """Parse and validate a configuration; `place` names it in messages. Raises ConfigError with all problems
    together.

    Fields that are left out keep their defaults; unknown ones are an error.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError([f"{place} is no JSON: {error}"]) from error
    unknown = [
        f"{name} in {place} is no field; look at the fields of the configuration with --help"
        for name in _unknown(content, Config)
    ]
    try:
        config = TypeAdapter(Config).validate_python(content)
    except ConfigError as error:
        raise ConfigError(unknown + error.problems) from None
    except ValidationError as error:
        raise ConfigError(unknown + _readable(error, place)) from None
    if unknown:
        raise ConfigError(unknown)
    return config


def _readable(error: ValidationError, place: str) -> list[str]:
    problems = []
    for item in error.errors(include_url=False):
        if isinstance(cause := item.get("ctx", {}).get("error"), ConfigError):
            problems += cause.problems
        else:
            where = ".".join(str(part) for part in item["loc"])
            problems.append(f"{where} in {place} is {item['input']!r}: {item['msg'].lower()}")
    return problems


def _unknown(content: Any, group: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(content, dict):
        return
    known = {item.name: item.type for item in dataclasses.fields(group)}
    for name, value in content.items():
        if name not in known:
            yield prefix + name
        elif dataclasses.is_dataclass(known[name]):
            yield from _unknown(value, known[name], f"{prefix}{name}.")


def _at_least(name: str, value: float, lowest: float) -> Iterator[str]:
    if not (math.isfinite(value) and value >= lowest):
        yield f"{name} is {value}; give at least {lowest}"


def _within(name: str, value: float, lowest: float, highest: float) -> Iterator[str]:
    if not (math.isfinite(value) and lowest <= value <= highest):
        yield f"{name} is {value}; give a number from {lowest} to {highest}"
