"""The three training stages of Section 3.3 as data; one loop serves all of them."""

from dataclasses import dataclass

from crowdray.config import Config, StageConfig
from crowdray.models.counter import AUXILIARY, DENSITY

ENCODER = "encoder"


@dataclass(frozen=True)
class Stage:
    """Which modules train, on which losses, and for how long."""

    name: str
    """baseline, decoders or joint."""
    schedule: StageConfig
    """Epochs, learning rate, early stopping."""
    tasks: tuple[str, ...]
    """Tasks that are predicted and contribute a loss."""
    modules: tuple[str, ...]
    """Modules with trainable parameters: the encoder and decoders by task; all others are frozen."""
    balanced: bool = False
    """Balance the losses by gradient norm (joint) instead of equally: on disjoint parameters, weights of losses
    change nothing."""

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder trains, and with it the exported model."""
        return ENCODER in self.modules


def build_stages(config: Config) -> tuple[Stage, ...]:
    """Return the stages of a run in order, without stages of 0 epochs and tasks of weight 0.

    In the decoders stage the auxiliary decoders share one frozen encoder and do not influence each other, so
    training them jointly yields the same weights as training them one after another on the same batches.
    """
    auxiliary = tuple(task for task in AUXILIARY if getattr(config.loss, task) > 0)
    stages = [Stage("baseline", config.stages.baseline, (DENSITY,), (ENCODER, DENSITY))]
    if auxiliary:
        stages.append(Stage("decoders", config.stages.decoders, auxiliary, auxiliary))
    tasks = (DENSITY, *auxiliary)
    stages.append(Stage("joint", config.stages.joint, tasks, (ENCODER, *tasks), balanced=True))
    return tuple(stage for stage in stages if stage.schedule.epochs > 0)


def module_of(parameter: str) -> str:
    """Return the module of a counter's parameter name: the encoder, or the task of its decoder."""
    parts = parameter.split(".")
    return ENCODER if parts[0] == ENCODER else parts[1]
