"""The protocol of an ablation: its cells, and what they have in common.

A cell is one training run: an arm at a label fraction, with a backbone and a seed. Arms of one seed have the same
initial weights, order of data, windows and number of updates. The folder in --storage:

- ablation.json: the identity; a start under the same name must have the same. Seeds may be added.
- cells/NAME/: a finished cell: its weights as a checkpoint, and cell.json, written last.
- test-read.json: each time that the test split was read, written before it is read.
- cells/NAME/tested.json: the cell with its counts of the test split.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from crowdray import storage
from crowdray.ablation.arms import Arm, default_arms, parse_arms
from crowdray.ablation.reads import TEST_READ_FILE
from crowdray.config import Config, ModelConfig, StageConfig, to_json
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.errors import UserError
from crowdray.models.build import backbone_class
from crowdray.pipeline.identity import RunIdentity, default_name
from crowdray.pipeline.run import plan_run
from crowdray.stage_cache.keys import backbone_digest, code_digest
from crowdray.training.stages import build_stages

ABLATION_FILE = "ablation.json"
CELL_FILE, TESTED_FILE = "cell.json", "tested.json"


@dataclass(frozen=True)
class Cell:
    """One training run of an ablation."""

    arm: Arm
    fraction: float
    """Fraction of the training split that it uses."""
    backbone: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^\w.+=-]", "-", f"{self.arm.name}_{self.backbone}_{self.fraction:g}_seed{self.seed}")

    @property
    def group(self) -> tuple[float, str]:
        """Cells of one group are compared with each other."""
        return self.fraction, self.backbone


@dataclass(frozen=True)
class Ablation:
    """A comparison of arms."""

    identity: RunIdentity
    """Base configuration with an annealed end, dataset and location; one worker per cell."""
    arms: tuple[Arm, ...]
    fractions: tuple[float, ...]
    backbones: tuple[str, ...]
    seeds: tuple[int, ...]
    preset: str = ""
    """Preset that the configuration started from."""

    @property
    def uri(self) -> str:
        """Its folder."""
        return self.identity.uri

    @property
    def identity_file(self) -> str:
        """File with the recorded identity; it exists before the first cell starts."""
        return storage.join(self.uri, ABLATION_FILE)

    @property
    def test_read_file(self) -> str:
        """File that records each read of the test split."""
        return storage.join(self.uri, TEST_READ_FILE)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, those of one seed together."""
        varied = product(self.seeds, self.backbones, self.fractions, self.arms)
        return tuple(Cell(arm, fraction, backbone, seed) for seed, backbone, fraction, arm in varied)

    def folder(self, cell: Cell) -> str:
        """URI of a cell's folder."""
        return storage.join(self.uri, "cells", cell.name)

    def config(self, cell: Cell, dataset: Dataset) -> Config:
        """Return what a cell trains."""
        return cell_config(self.identity.config, cell, len(dataset.rows("train")))

    def create_or_verify(self, **fixed: str) -> None:
        """Record the identity, or check that the folder belongs to this very ablation; see RunIdentity.

        Args:
            fixed: What cells that are still to be trained or evaluated must have in common with finished ones.
        """
        self.identity.create_or_verify(
            self.identity_file,
            arms={arm.name: asdict(arm) for arm in self.arms},
            fractions=list(self.fractions),
            backbones=_backbone_digests(self.identity.config, self.backbones),
            **fixed,
        )


def plan_ablation(
    config: Config,
    data: str,
    preset: str,
    *,
    arms: Sequence[str] | None,
    sweeps: Sequence[str],
    fractions: Sequence[float],
    backbones: Sequence[str],
    seeds: Sequence[int],
    threads: int,
    folder: str,
    name: str | None,
    tracking_uri: str | None,
) -> Ablation:
    """Resolve a command's options into an ablation; its default name depends on all of them but the seeds.

    Args:
        config: The base configuration; `seeds` replace its seed.
        arms: Names of arms; None for those of the tasks that have a weight.
        sweeps: Sweeps of one weight, as `parse_arms` takes them.
        fractions: Label fractions.
        backbones: Names of backbones; none for that of the configuration.
        threads: CPU threads of each cell.
        folder: Parent folder or URI.

    Raises:
        UserError: An option, the dataset or the configuration of a cell cannot be used.
    """
    for option, values in (("--seeds", seeds), ("--fractions", fractions), ("--backbones", backbones)):
        if len(set(values)) < len(values) or (option == "--seeds" and not values):
            raise UserError(f"{option} is {','.join(map(str, values)) or 'empty'}; give different values")
    if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise UserError(f"--fractions has {wrong[0]:g}; give numbers above 0 up to 1")
    if threads < 1:
        raise UserError(f"--cpus-per-run is {threads}; give at least 1")
    base = with_annealed_end(replace(config, seed=0, numerics=replace(config.numerics, threads=threads)))
    parsed = parse_arms(default_arms(base.loss) if arms is None else arms, sweeps, base.loss)
    if Dataset.open(data).index.depth_teacher == "none" and any(arm.weights["depth"] for arm in parsed):
        raise UserError(
            f"{data} has no depth, so that arms with it would train without: give --loss.depth 0, or convert the "
            "dataset with --depth"
        )
    identity = plan_run(base, data, 1, folder, name, preset, tracking_uri=tracking_uri).identity
    backbones = tuple(backbones) or (base.model.backbone,)
    ablation = Ablation(identity, parsed, tuple(fractions), backbones, tuple(seeds), preset)
    if name is None:
        digests = _backbone_digests(identity.config, backbones)
        facts = (to_json(identity.config), identity.data_digest, code_digest(), repr((parsed, fractions, digests)))
        ablation = replace(ablation, identity=replace(identity, name=f"ablate-{default_name(preset, *facts)}"))
    return ablation


def with_annealed_end(config: Config) -> Config:
    """Return the configuration with an annealed joint stage, the last third of it unless it says otherwise.

    Raises:
        UserError: The joint stage has 0 epochs, or a stage may stop early, which ends arms after different updates.
    """
    stages = config.stages
    if stages.joint.epochs == 0:
        raise UserError("stages.joint.epochs is 0; the arms differ in the joint stage: give at least 1")
    for name, stage in vars(stages).items():
        if stage.patience:
            raise UserError(
                f"stages.{name}.patience is {stage.patience}; a stage that stops early ends arms after different "
                f"numbers of updates: give --stages.{name}.patience 0"
            )
    if stages.joint.anneal_epochs:
        return config
    joint = replace(stages.joint, anneal_epochs=-(-stages.joint.epochs // 3))
    return replace(config, stages=replace(stages, joint=joint))


def cell_config(base: Config, cell: Cell, train_images: int) -> Config:
    """Return what a cell trains: a pure function of the base configuration and the cell.

    Without auxiliary tasks, the joint stage trains the epochs of the decoders stage too. At a fraction of the images,
    all lengths in epochs grow by its inverse, so that they keep their numbers of updates.

    Args:
        train_images: Size of the training split.
    """
    stages, sampling, optimizer = base.stages, base.sampling, base.optimizer
    if cell.fraction < 1:
        sampling = replace(sampling, images=max(1, round((sampling.images or train_images) * cell.fraction)))
        stages = replace(stages, **{name: _longer(stage, cell.fraction) for name, stage in vars(stages).items()})
        optimizer = replace(optimizer, plateau_patience=round(optimizer.plateau_patience / cell.fraction))
    if not any(cell.arm.weights.values()):
        joint = replace(stages.joint, epochs=stages.joint.epochs + stages.decoders.epochs)
        stages = replace(stages, joint=joint)
    model = base.model
    if cell.backbone != model.backbone:  # pretrained and initial weights belong to one backbone
        model = ModelConfig(cell.backbone, model.count_decoder)
    return replace(
        base,
        seed=cell.seed,
        loss=replace(base.loss, **cell.arm.weights, placebo=cell.arm.placebo),
        stages=stages,
        sampling=sampling,
        optimizer=optimizer,
        model=model,
    )


def _longer(stage: StageConfig, fraction: float) -> StageConfig:
    lengths = {name: round(getattr(stage, name) / fraction) for name in ("epochs", "anneal_epochs")}
    return replace(stage, **lengths)


def planned_updates(config: Config, dataset: Dataset) -> int:
    """Return the number of updates of a run on one worker (`Loader.steps` for each epoch)."""
    train_rows, _ = split_rows(config, dataset, workers=1)
    sampling = config.sampling
    steps = max(1, len(train_rows) * sampling.crops_per_image // sampling.batch)
    return steps * sum(stage.schedule.epochs for stage in build_stages(config))


def check_updates(updates: Mapping[Cell, int]) -> None:
    """Check that all arms have as many updates at each fraction and backbone.

    Raises:
        UserError: They do not; the message names the arms and their numbers.
    """
    for group in dict.fromkeys(cell.group for cell in updates):
        numbers = {(cell.arm.name, number): None for cell, number in updates.items() if cell.group == group}
        if len({number for _, number in numbers}) > 1:
            listed = ", ".join(f"{arm} {number:,}" for arm, number in numbers)
            raise UserError(
                f"the arms cannot be compared, as their numbers of updates differ at fraction {group[0]:g} of "
                f"{group[1]}: {listed}; leave out the arm that differs"
            )


def _backbone_digests(config: Config, backbones: Sequence[str]) -> dict[str, str]:
    """Return the digest of each backbone's code, "" for a built-in one."""
    models = {name: replace(config.model, backbone=name) for name in backbones}
    return {name: backbone_digest(backbone_class(replace(config, model=model))) for name, model in models.items()}
