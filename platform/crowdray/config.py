"""Configuration of a training run: typed groups of fields, validated together, and their JSON form."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from crowdray.documents import parse_json
from crowdray.errors import InfeasibleConfigError

Device = Literal["auto", "cpu", "gpu"]
"""Where to compute; auto takes a GPU where there is one."""

Precision = Literal["fp32", "bf16"]
"""Arithmetic of an exported model's convolutions."""

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
class Limits:
    """Range of a number, both ends included."""

    lowest: float
    highest: float = math.inf

    def problems(self, name: str, value: float) -> Iterator[str]:
        """A message if the value is outside."""
        if not (math.isfinite(value) and self.lowest <= value <= self.highest):
            wanted = "at least {0}" if self.highest == math.inf else "a number from {0} to {1}"
            yield f"{name} is {value}; give {wanted.format(self.lowest, self.highest)}"


Positive = Annotated[int, Limits(1)]
NonNegativeInt = Annotated[int, Limits(0)]
NonNegative = Annotated[float, Limits(0.0)]
Fraction = Annotated[float, Limits(0.0, 1.0)]


class _Group:
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class SamplingConfig(_Group):
    """Validation split, crops, batches and augmentation."""

    validation: Literal["random", "run"] = "random"
    """How validation images are chosen from the training split: random takes them one by one (the paper), run takes
    consecutive images from a random start (for video, where frames seconds apart show the same people)."""
    validation_fraction: Annotated[float, Limits(0.0, 0.9)] = 1 / 6
    """Fraction of the training split held out for validation."""
    images: NonNegativeInt = 0
    """Use only this many images of the training split, the validation images among them: the first ones of an order
    drawn with the seed. 0 uses all."""
    downsample: Positive = 1
    """Factor by which images are average-pooled first: in training, evaluation and the exported model."""
    crop: Annotated[int, Limits(16)] = 160
    """Side in pixels (after downsampling) of the square crop whose heads the count decoder regresses."""
    context: NonNegativeInt = 36
    """Image pixels around the crop that the network sees too: crop and context form the window. The losses of the maps
    exclude pixels whose receptive field the window cuts, so that windows train what whole images need. The radius of
    CFCN's receptive field is 34 pixels."""
    batch: Positive = 8
    """Global batch size: windows per update over all workers."""
    crops_per_image: Positive = 1
    """Windows drawn from each decoded image per epoch."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    brightness: Fraction = 0.0
    """Maximum brightness shift, as a fraction of the full range."""
    contrast: Fraction = 0.0
    """Maximum relative change of contrast."""
    colour: Fraction = 0.0
    """Maximum relative change of each colour channel."""
    scale: Fraction = 0.0
    """Maximum relative change of size: each batch is resized by one factor from 1 / (1 + scale) to 1 + scale."""
    roi: bool = True
    """Restrict losses and counts to the dataset's region of interest, where it has one."""
    cache_gib: NonNegative = 2.0
    """Memory in GiB per worker for decoded images."""
    gpu_cache_gib: NonNegative = 0.0
    """GPU memory in GiB per worker for all decoded training images, so that windows are cut on the GPU. The CPU cuts
    them when the images do not fit (always with 0) or when scale is not 0."""


def crop_problems(sampling: SamplingConfig, stride: int) -> Iterator[str]:
    """Crop and context that are not multiples of the backbone's stride, one message each."""
    for name in ("crop", "context"):
        if (value := getattr(sampling, name)) % stride:
            nearest = max(stride, value // stride * stride)
            yield f"sampling.{name} is {value}; the model's stride of {stride} must divide it: try {nearest}"


@dataclass(frozen=True)
class TargetConfig(_Group):
    """Training targets made from annotated points."""

    sigma: Annotated[float, Limits(0.25, 64.0)] = 4.0
    """Standard deviation (pixels) of the Gaussian kernel of one head in the density map."""
    threshold: Annotated[float, Limits(0.001, 0.999)] = 0.3
    """A pixel is foreground where the density exceeds this fraction of the peak of one head's kernel."""


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
    "lite0": KnownBackbone("crowdray.models.efficientnet_lite:EfficientNetLite0", 16),
    "lite2": KnownBackbone("crowdray.models.efficientnet_lite:EfficientNetLite2", 16),
}
"""Built-in backbones by the name that model.backbone takes."""


IMAGENET = "imagenet"
"""Value of model.weights for the weights in the backbone's `imagenet_package`."""


@dataclass(frozen=True)
class ModelConfig(_Group):
    """Network and pretrained weights."""

    backbone: str = "cfcn"
    """cfcn (light), csrnet (VGG-16, as published), csrnet-table1 (as the paper's Table 1 prints it), lite0 and lite2
    (EfficientNet-Lite: pretrained and fast on CPUs), convnext (modern; needs transformers), or your own class as
    package.module:Class (docs/backbone.md)."""
    count_decoder: Literal["paper", "pooled"] = "paper"
    """Auxiliary count decoder: paper has a first layer that spans the whole crop (13 million parameters for cfcn, 206
    million for csrnet), pooled averages over the crop. The exported model contains neither."""
    weights: str = ""
    """Path or URI of pretrained encoder weights, .safetensors or .pth: for csrnet, VGG-16 on ImageNet in torchvision's
    layout. imagenet: those of the Python package for lite0, or lite2 (extra lite2). Empty: random initialization."""
    weights_sha256: str = ""
    """Expected SHA-256 of that file; empty: the actual one is recorded."""
    init: str = ""
    """Packaged counter whose encoder and density decoder training starts from: models:/NAME@ALIAS, models:/NAME/3,
    runs:/ID/model, or the folder of a run or package. An alias is recorded as its version."""
    init_sha256: str = ""
    """Expected SHA-256 of that counter's weights, a registered version's tag crowdray.weights; empty: the actual one is
    recorded."""


PAPER_WEIGHTS = {"segmentation": 0.04, "depth": 0.6, "count": 1.0}
"""Loss weights of the auxiliary tasks in the paper (Section 5.2)."""


@dataclass(frozen=True)
class LossConfig(_Group):
    """Weights of the auxiliary losses in the joint stage (eq. 5), on the paper's scale."""

    segmentation: NonNegative = PAPER_WEIGHTS["segmentation"]
    """Weight of the segmentation's cross-entropy (eq. 1); 0 removes the task."""
    depth: NonNegative = PAPER_WEIGHTS["depth"]
    """Weight of the distilled depth's squared error (eq. 2); 0 removes the task."""
    count: NonNegative = PAPER_WEIGHTS["count"]
    """Weight of the count's squared error (eq. 3); 0 removes the task."""
    gradient_share: NonNegative = 0.1
    """Loss balancing: at the start of the joint stage each auxiliary loss is scaled so that, at the paper's weight, the
    norm of its gradient at the encoder's features is this fraction of the density loss's."""
    local_counts: NonNegative = 0.0
    """Weight of local counts in the density loss: squared errors of the counts in blocks of 16, 32 and 64 pixels and in
    the window. The squared error of cells alone hardly notices a faint density that covers the whole image."""
    placebo: bool = False
    """Control experiment: the auxiliary tasks learn the targets of another image of the batch. What it gains, the tasks
    gain without information about the image."""


@dataclass(frozen=True)
class OptimizerConfig(_Group):
    """Optimizer, learning-rate schedule and weight averaging."""

    name: Literal["sgd", "adamw", "muon"] = "muon"
    """sgd is the paper's; muon needed a quarter of adamw's epochs here (docs/lab-notes.md)."""
    momentum: Annotated[float, Limits(0.0, 0.9999)] = 0.9
    """Momentum of sgd."""
    weight_decay: NonNegative = 5e-4
    """L2 penalty for sgd, decoupled weight decay for adamw and muon."""
    warmup: NonNegativeInt = 100
    """Updates of linear warmup at the start of each stage: fresh Adam moments at the full rate can kill ReLUs."""
    plateau_patience: NonNegativeInt = 5
    """Epochs without a better validation error before the learning rate is reduced."""
    plateau_factor: Annotated[float, Limits(0.001, 0.999)] = 0.1
    """Factor of that reduction."""
    clip: NonNegative = 1.0
    """Maximum norm of all gradients together; 0 disables clipping."""
    grad_accumulation_steps: Positive = 1
    """Microbatches per update on each worker, to save memory: the update is the same up to rounding, except with
    BatchNorm or dropout."""
    ema_decay: Annotated[float, Limits(0.0, 0.99999)] = 0.99
    """Decay per update of the exponential moving average of the weights, which is validated and exported; 0 uses the
    weights of the last update."""


@dataclass(frozen=True)
class StageConfig(_Group):
    """Length and learning rate of one stage."""

    epochs: NonNegativeInt
    """Passes over the training images; 0 skips the stage."""
    learning_rate: Annotated[float, Limits(1e-9, 10.0)]
    """Initial learning rate. Without annealing only plateaus reduce it, so that a short stage is the prefix of a long
    one."""
    patience: NonNegativeInt = 0
    """Early stopping: epochs without a better validation error before the stage ends; 0 disables it."""
    anneal_epochs: NonNegativeInt = 0
    """Annealing: the learning rate is constant, then falls linearly to 0 in the last so many epochs, and the stage's
    result is its last epoch. 0 disables it; the result is then the epoch with the lowest validation error."""


@dataclass(frozen=True)
class StagesConfig(_Group):
    """The three training stages (Section 3.3)."""

    baseline: StageConfig = field(default_factory=lambda: StageConfig(epochs=40, learning_rate=3e-4))
    """Trains encoder and density decoder on the density loss."""
    decoders: StageConfig = field(default_factory=lambda: StageConfig(epochs=4, learning_rate=1e-3))
    """Trains the auxiliary decoders on frozen features."""
    joint: StageConfig = field(default_factory=lambda: StageConfig(epochs=20, learning_rate=3e-4))
    """Trains everything end to end."""


def _from_bool(value: Any) -> Any:
    """Accept files from when `compile` was a bool."""
    return {False: "no", True: "yes"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class NumericsConfig(_Group):
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
    threads: NonNegativeInt = 0
    """CPU threads per worker; 0 divides the machine's cores among the workers."""
    grad_allreduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the gradient all-reduce: bf16 halves the bytes sent, and rounds the gradients."""


@dataclass(frozen=True)
class Config(_Group):
    """Everything that decides the result of a training run, but not where it runs."""

    seed: Annotated[int, Limits(0, 2**31 - 1)] = 0
    """Random seed of initial weights, validation split, sample order and augmentation."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)

    def __post_init__(self) -> None:
        if problems := [*_range_problems(self), *_consistency_problems(self)]:
            raise ConfigError(problems)


def _range_problems(group: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(group):
        value = getattr(group, item.name)
        if dataclasses.is_dataclass(value):
            yield from _range_problems(value, f"{prefix}{item.name}.")
        for limits in getattr(item.type, "__metadata__", ()):
            if isinstance(limits, Limits):
                yield from limits.problems(prefix + item.name, value)


def _consistency_problems(config: Config) -> Iterator[str]:
    model, stages, numerics = config.model, config.stages, config.numerics
    if known := BACKBONES.get(model.backbone):
        yield from crop_problems(config.sampling, known.stride)
    elif ":" not in model.backbone:
        yield (
            f"model.backbone is {model.backbone!r}; choose one of {', '.join(BACKBONES)}, or give your own "
            "class as package.module:Class"
        )
    for name in ("weights_sha256", "init_sha256"):
        if (digest := getattr(model, name)) and not re.fullmatch(r"[0-9a-f]{64}", digest):
            yield f"model.{name} is {digest!r}; a SHA-256 has 64 lower-case hexadecimal digits"
    if model.init and model.weights:
        yield (
            f"model.init is {model.init} and model.weights {model.weights}; a counter's weights include its "
            "encoder's: set only one of them"
        )
    if stages.baseline.epochs == 0:
        yield "stages.baseline.epochs is 0; the later stages start from the baseline: give at least 1"
    if stages.joint.epochs > 0 and stages.decoders.epochs == 0:
        yield (
            "stages.decoders.epochs is 0 but stages.joint.epochs is not; fresh decoders would disturb the encoder: "
            "give at least 1"
        )
    for name in ("baseline", "decoders", "joint"):
        yield from _annealing_problems(f"stages.{name}", getattr(stages, name))
    if numerics.activation_checkpointing and numerics.compile != "no":
        yield (
            f"numerics.activation_checkpointing is True and numerics.compile is {numerics.compile}; "
            "the compiler decides itself what to recompute: set only one of them"
        )
    if numerics.compile == "graphs" and config.sampling.scale:
        yield (
            f"numerics.compile is graphs and sampling.scale {config.sampling.scale}; every window size would "
            "record its own CUDA graph: give --numerics.compile yes or --sampling.scale 0"
        )


def _annealing_problems(name: str, stage: StageConfig) -> Iterator[str]:
    if stage.anneal_epochs > stage.epochs:
        yield f"{name}.anneal_epochs is {stage.anneal_epochs}, of {stage.epochs} epochs: give at most {stage.epochs}"
    if stage.anneal_epochs and stage.patience:
        yield (
            f"{name}.anneal_epochs is {stage.anneal_epochs} and {name}.patience {stage.patience}; a stage that stops "
            "early is not annealed: set only one of them"
        )


def _leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(group).items():
        yield from _leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [(prefix + name, hint)]


FIELDS: dict[str, Any] = dict(_leaves(Config))
"""Type of each field of the configuration, by dotted name."""


def with_init(config: Config, uri: str) -> Config:
    """The same configuration with the weights of a packaged counter to start from, instead of pretrained ones."""
    return replace(config, model=replace(config.model, init=uri, init_sha256="", weights="", weights_sha256=""))


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
        content = parse_json(text)
    except ValueError as error:
        raise ConfigError([f"{source} is not valid JSON: {error}"]) from error
    _rename_fields(content)
    try:
        return TypeAdapter(Config).validate_python(content)
    except ValidationError as error:
        raise ConfigError(_problems(error, source)) from None


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
        name = ".".join(map(str, item["loc"]))
        if isinstance(cause := item.get("ctx", {}).get("error"), ConfigError):
            problems += cause.problems
        elif item["type"] == "unexpected_keyword_argument":
            problems.append(f"unknown field {name} in {source}; --help-all lists the fields of the configuration")
        else:
            problems.append(f"{name} in {source} is {item['input']!r}: {item['msg'].lower()}")
    return problems
