"""Configuration of a training run: typed groups of fields, validated together, and their JSON form."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from crowdray.errors import InfeasibleConfigError

Device = Literal["auto", "cpu", "gpu"]
"""Where to compute; auto takes a GPU where there is one."""

RENAMED_FIELDS = {
    "loss.share": "loss.gradient_share",
    "optimizer.accumulate": "optimizer.grad_accumulation_steps",
    "optimizer.average": "optimizer.ema_decay",
    "numerics.recompute": "numerics.activation_checkpointing",
    "numerics.exchange": "numerics.grad_allreduce_dtype",
}
"""Fields that files and command lines may still call by their previous names, until the next version."""


class ConfigError(InfeasibleConfigError):
    """All problems of a configuration, each with field, value and fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("invalid configuration:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class SamplingConfig:
    """Validation split, crops, batches and augmentation."""

    validation: Literal["random", "run"] = "random"
    """How validation images are chosen from the training split: random takes them one by one (the paper), run takes
    consecutive images from a random start (for video, where frames seconds apart show the same people)."""
    validation_fraction: float = 1 / 6
    """Fraction of the training split held out for validation."""
    downsample: int = 1
    """Factor by which images are average-pooled first: in training, evaluation and the exported model."""
    crop: int = 160
    """Side in pixels (after downsampling) of the square crop whose heads the count decoder regresses."""
    context: int = 36
    """Image pixels around the crop that the network sees too: crop and context form the window. The losses of the maps
    exclude pixels whose receptive field the window cuts, so that windows train what whole images need. The radius of
    CFCN's receptive field is 34 pixels."""
    batch: int = 8
    """Global batch size: windows per update over all workers."""
    crops_per_image: int = 1
    """Windows drawn from each decoded image per epoch."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    brightness: float = 0.0
    """Maximum brightness shift, as a fraction of the full range."""
    contrast: float = 0.0
    """Maximum relative change of contrast."""
    colour: float = 0.0
    """Maximum relative change of each colour channel."""
    scale: float = 0.0
    """Maximum relative change of size: each batch is resized by one factor from 1 / (1 + scale) to 1 + scale."""
    roi: bool = True
    """Restrict losses and counts to the dataset's region of interest, where it has one."""
    cache_gib: float = 2.0
    """Memory in GiB per worker for decoded images."""
    gpu_cache_gib: float = 0.0
    """GPU memory in GiB per worker for all decoded training images, so that windows are cut on the GPU. The CPU cuts
    them when the images do not fit (always with 0) or when scale is not 0."""

    def problems(self) -> Iterator[str]:
        """Invalid values, one message each."""
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
    """Crop and context that are not multiples of the backbone's stride, one message each."""
    for name in ("crop", "context"):
        if (value := getattr(sampling, name)) % stride:
            nearest = max(stride, value // stride * stride)
            yield f"sampling.{name} is {value}; the model's stride of {stride} must divide it: try {nearest}"


@dataclass(frozen=True)
class TargetConfig:
    """Training targets made from annotated points."""

    sigma: float = 4.0
    """Standard deviation (pixels) of the Gaussian kernel of one head in the density map."""
    threshold: float = 0.3
    """A pixel is foreground where the density exceeds this fraction of the peak of one head's kernel."""

    def problems(self) -> Iterator[str]:
        """Invalid values, one message each."""
        yield from _within("target.sigma", self.sigma, 0.25, 64.0)
        if not 0 < self.threshold < 1:
            yield f"target.threshold is {self.threshold}; give a fraction of one head's peak, between 0 and 1"


@dataclass(frozen=True)
class KnownBackbone:
    """A built-in backbone."""

    path: str
    """Its class, as module:Class."""
    stride: int
    """Its stride in pixels, so that crops are checked without importing it."""


BACKBONES = {
    "cfcn": KnownBackbone("crowdray.models.cfcn:CFCN", 4),
    "csrnet": KnownBackbone("crowdray.models.csrnet:CSRNet", 8),
    "csrnet-table1": KnownBackbone("crowdray.models.csrnet:CSRNetTable1", 16),
    "convnext": KnownBackbone("crowdray.models.convnext:ConvNeXt", 16),
}
"""Built-in backbones by the name that model.backbone takes."""


@dataclass(frozen=True)
class ModelConfig:
    """Network and pretrained weights."""

    backbone: str = "cfcn"
    """cfcn (light), csrnet (VGG-16, as published), csrnet-table1 (as the paper's Table 1 prints it), convnext (modern;
    needs transformers), or your own class as package.module:Class (docs/backbone.md)."""
    count_decoder: Literal["paper", "pooled"] = "paper"
    """Auxiliary count decoder: paper has a first layer that spans the whole crop (13 million parameters for cfcn, 206
    million for csrnet), pooled averages over the crop. The exported model contains neither."""
    weights: str = ""
    """Path or URI of pretrained encoder weights, .safetensors or .pth: for csrnet, VGG-16 on ImageNet in torchvision's
    layout. Empty: random initialization."""
    weights_sha256: str = ""
    """Expected SHA-256 of that file; empty: the actual one is recorded."""

    def problems(self) -> Iterator[str]:
        """Invalid values, one message each."""
        if self.backbone not in BACKBONES and ":" not in self.backbone:
            yield (
                f"model.backbone is {self.backbone!r}; choose one of {', '.join(BACKBONES)}, or give your own "
                "class as package.module:Class"
            )
        if self.weights_sha256 and not re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            yield f"model.weights_sha256 is {self.weights_sha256!r}; a SHA-256 has 64 lower-case hexadecimal digits"


PAPER_WEIGHTS = {"segmentation": 0.04, "depth": 0.6, "count": 1.0}
"""Loss weights of the auxiliary tasks in the paper (Section 5.2)."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the auxiliary losses in the joint stage (eq. 5), on the paper's scale."""

    segmentation: float = PAPER_WEIGHTS["segmentation"]
    """Weight of the segmentation's cross-entropy (eq. 1); 0 removes the task."""
    depth: float = PAPER_WEIGHTS["depth"]
    """Weight of the distilled depth's squared error (eq. 2); 0 removes the task."""
    count: float = PAPER_WEIGHTS["count"]
    """Weight of the count's squared error (eq. 3); 0 removes the task."""
    gradient_share: float = 0.1
    """Loss balancing: at the start of the joint stage each auxiliary loss is scaled so that, at the paper's weight, the
    norm of its gradient at the encoder's features is this fraction of the density loss's."""

    def problems(self) -> Iterator[str]:
        """Invalid values, one message each."""
        for name in ("segmentation", "depth", "count", "gradient_share"):
            yield from _at_least(f"loss.{name}", getattr(self, name), 0.0)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and weight averaging."""

    name: Literal["sgd", "adamw", "muon"] = "muon"
    """sgd is the paper's; muon needed a quarter of adamw's epochs here (docs/lab-notes.md)."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """L2 penalty for sgd, decoupled weight decay for adamw and muon."""
    warmup: int = 100
    """Updates of linear warmup at the start of each stage: fresh Adam moments at the full rate can kill ReLUs."""
    plateau_patience: int = 5
    """Epochs without a better validation error before the learning rate is reduced."""
    plateau_factor: float = 0.1
    """Factor of that reduction."""
    clip: float = 1.0
    """Maximum norm of all gradients together; 0 disables clipping."""
    grad_accumulation_steps: int = 1
    """Microbatches per update on each worker, to save memory: the update is the same up to rounding, except with
    BatchNorm or dropout."""
    ema_decay: float = 0.99
    """Decay per update of the exponential moving average of the weights, which is validated and exported; 0 uses the
    weights of the last update."""

    def problems(self) -> Iterator[str]:
        """Invalid values, one message each."""
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
    """Length and learning rate of one stage."""

    epochs: int
    """Passes over the training images; 0 skips the stage."""
    learning_rate: float
    """Initial learning rate; only plateaus reduce it, so the schedule does not depend on the stage's length."""
    patience: int = 0
    """Early stopping: epochs without a better validation error before the stage ends; 0 disables it."""

    def problems(self, name: str) -> Iterator[str]:
        """Invalid values, one message each."""
        yield from _at_least(f"{name}.epochs", self.epochs, 0)
        yield from _at_least(f"{name}.patience", self.patience, 0)
        yield from _within(f"{name}.learning_rate", self.learning_rate, 1e-9, 10.0)


@dataclass(frozen=True)
class StagesConfig:
    """The three training stages (Section 3.3)."""

    baseline: StageConfig = field(default_factory=lambda: StageConfig(epochs=40, learning_rate=3e-4))
    """Trains encoder and density decoder on the density loss."""
    decoders: StageConfig = field(default_factory=lambda: StageConfig(epochs=4, learning_rate=1e-3))
    """Trains the auxiliary decoders on frozen features."""
    joint: StageConfig = field(default_factory=lambda: StageConfig(epochs=20, learning_rate=3e-4))
    """Trains everything end to end."""

    def problems(self) -> Iterator[str]:
        """Invalid values, one message each."""
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


def _from_bool(value: Any) -> Any:
    """Accept files from when `compile` was a bool."""
    return {False: "no", True: "yes"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class NumericsConfig:
    """Precision, compilation and memory of the computation."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast dtype; auto chooses bf16 where the processor supports it natively. Weights, losses, targets and
    evaluation are always fp32."""
    tf32: bool = False
    """Use TensorFloat-32 on GPUs: faster fp32 products with 10-bit mantissas."""
    compile: Annotated[Literal["no", "yes", "graphs"], BeforeValidator(_from_bool)] = "no"
    """Use torch.compile: faster steps after minutes of compilation; on a CPU it needs g++. graphs also records CUDA
    graphs: less launch overhead of small kernels for more memory."""
    activation_checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass instead of storing them: less memory, about a third
    more time, same results."""
    threads: int = 0
    """CPU threads per worker; 0 divides the machine's cores among the workers."""
    grad_allreduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the gradient all-reduce: bf16 halves the bytes sent, and rounds the gradients."""

    def problems(self) -> Iterator[str]:
        """Invalid values, one message each."""
        yield from _at_least("numerics.threads", self.threads, 0)
        if self.activation_checkpointing and self.compile != "no":
            yield (
                f"numerics.activation_checkpointing is True and numerics.compile is {self.compile}; "
                "the compiler decides itself what to recompute: set only one of them"
            )


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a training run, but not where it runs."""

    seed: int = 0
    """Random seed of initial weights, validation split, sample order and augmentation."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)

    def __post_init__(self) -> None:
        groups = (self.sampling, self.target, self.model, self.loss, self.optimizer, self.stages, self.numerics)
        problems = [problem for group in groups for problem in group.problems()]
        if known := BACKBONES.get(self.model.backbone):
            problems += crop_problems(self.sampling, known.stride)
        if self.numerics.compile == "graphs" and self.sampling.scale:
            problems.append(
                f"numerics.compile is graphs and sampling.scale {self.sampling.scale}; every window size would "
                "record its own CUDA graph: give --numerics.compile yes or --sampling.scale 0"
            )
        if not 0 <= self.seed < 2**31:
            problems.insert(0, f"seed is {self.seed}; give a number from 0 to {2**31 - 1}")
        if problems:
            raise ConfigError(problems)


def to_json(config: Config) -> str:
    """The configuration as JSON text; the inverse of `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def result_fields(config: Config) -> dict[str, Any]:
    """The fields that decide the result of a training run: all except cache sizes, which only affect its speed."""
    sampling = {name: value for name, value in dataclasses.asdict(config.sampling).items() if "cache_gib" not in name}
    return dataclasses.asdict(config) | {"sampling": sampling}


def from_json(text: str | bytes, source: str) -> Config:
    """Parse and validate a configuration.

    Fields that are left out have their defaults; those of RENAMED_FIELDS are accepted by their previous names.

    Args:
        text: A JSON object.
        source: Where it comes from, for messages.

    Raises:
        ConfigError: With all problems together: no JSON, unknown fields, wrong types and invalid values.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError([f"{source} is not valid JSON: {error}"]) from error
    _rename_fields(content)
    unknown = [
        f"unknown field {name} in {source}; --help lists the fields of the configuration"
        for name in _unknown_fields(content, Config)
    ]
    try:
        config = TypeAdapter(Config).validate_python(content)
    except ConfigError as error:
        raise ConfigError(unknown + error.problems) from None
    except ValidationError as error:
        raise ConfigError(unknown + _problems(error, source)) from None
    if unknown:
        raise ConfigError(unknown)
    return config


def _rename_fields(content: Any) -> None:
    """Give the fields of parsed JSON their present names, in place; a field that has both names keeps the present."""
    for old, new in RENAMED_FIELDS.items():
        group, before = old.split(".")
        fields = content.get(group) if isinstance(content, dict) else None
        if isinstance(fields, dict) and before in fields:
            fields.setdefault(new.split(".")[1], fields.pop(before))


def _problems(error: ValidationError, source: str) -> list[str]:
    problems = []
    for item in error.errors(include_url=False):
        if isinstance(cause := item.get("ctx", {}).get("error"), ConfigError):
            problems += cause.problems
        else:
            name = ".".join(map(str, item["loc"]))
            problems.append(f"{name} in {source} is {item['input']!r}: {item['msg'].lower()}")
    return problems


def _unknown_fields(content: Any, group: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(content, dict):
        return
    known = {item.name: item.type for item in dataclasses.fields(group)}
    for name, value in content.items():
        if name not in known:
            yield prefix + name
        elif dataclasses.is_dataclass(known[name]):
            yield from _unknown_fields(value, known[name], f"{prefix}{name}.")


def _at_least(name: str, value: float, lowest: float) -> Iterator[str]:
    if not (math.isfinite(value) and value >= lowest):
        yield f"{name} is {value}; give at least {lowest}"


def _within(name: str, value: float, lowest: float, highest: float) -> Iterator[str]:
    if not (math.isfinite(value) and lowest <= value <= highest):
        yield f"{name} is {value}; give a number from {lowest} to {highest}"
