"""The three stages of Section 3.3, as data: the loop is the same for all of them."""

from dataclasses import dataclass

from crowdray.config import Config, StageConfig
from crowdray.models.counter import AUXILIARY, DENSITY

ENCODER = "encoder"


@dataclass(frozen=True)
class Stage:
    """What trains, what counts, and for how long."""

    name: str
    """baseline, decoders or joint."""
    schedule: StageConfig
    """Epochs, learning rate, early stop."""
    tasks: tuple[str, ...]
    """Tasks that are predicted and whose losses count."""
    modules: tuple[str, ...]
    """The encoder and decoders whose parameters train; all others are frozen."""
    calibrated: bool = False
    """Weigh the losses by calibration (joint) instead of equally: on disjoint parameters equal weights change
    nothing."""

    @property
    def trains_encoder(self) -> bool:
        """Whether the encoder's graph is needed, and the shipped model changes."""
        return ENCODER in self.modules


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a training in order; those without epochs are left out, tasks with weight 0 too.

    In the decoders stage the auxiliary decoders share one frozen encoder and do not influence each other, so
    training them side by side gives the weights that training them in succession on the same batches gives.
    """
    auxiliary = tuple(task for task in AUXILIARY if getattr(config.loss, task) > 0)
    stages = [Stage("baseline", config.stages.baseline, (DENSITY,), (ENCODER, DENSITY))]
    if auxiliary:
        stages.append(Stage("decoders", config.stages.decoders, auxiliary, auxiliary))
    everything = (DENSITY, *auxiliary)
    stages.append(Stage("joint", config.stages.joint, everything, (ENCODER, *everything), calibrated=True))
    return tuple(stage for stage in stages if stage.schedule.epochs > 0)


def module_of(parameter: str) -> str:
    """The stage module that a parameter of the counter belongs to: the encoder or a decoder's task."""
    parts = parameter.split(".")
    return ENCODER if parts[0] == ENCODER else parts[1]
