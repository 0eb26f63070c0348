"""What the paper's loss weights mean here: the gradients that the losses send to the features."""

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from crowdray.config import PAPER_WEIGHTS, Config, LossConfig
from crowdray.data.batch import Batch
from crowdray.models.counter import AUXILIARY, DENSITY, Counter
from crowdray.training.losses import Scales, targets_of, task_losses

CALIBRATION_BATCHES = 8
"""Batches whose gradients are measured."""


def measured_norms(
    counter: Counter,
    batches: Generator[Batch, None, None],
    tasks: tuple[str, ...],
    config: Config,
    scales: Scales,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, float]:
    """Mean norm of each task's gradient at the features over the first batches; no parameter gets a gradient.

    A batch is taken in the same parts as in training: their gradients are different entries of the whole one's.
    """
    counter.eval()
    device = counter.mean.device
    totals, seen = dict.fromkeys(tasks, 0.0), 0
    for _, batch in zip(range(CALIBRATION_BATCHES), batches, strict=False):
        norms: dict[str, list[float]] = {task: [] for task in tasks}
        for part in batch.to(device).parts(config.optimizer.grad_accumulation_steps):
            with torch.no_grad(), autocast():
                features = counter.features(part.augmented())
            features = features.float().requires_grad_()
            with autocast():
                outputs = counter.decode(features, tasks, part.image.shape[-2:], part.corners)
            losses = task_losses(outputs, targets_of(part, config, counter.encoder.output_stride), scales)
            share = len(part.rows) / len(batch.rows)
            for task, norm in gradient_norms(losses, features).items():
                norms[task].append(share * norm)
        for task in tasks:
            totals[task] += math.hypot(*norms[task])
        seen += 1
    batches.close()
    return {task: total / seen for task, total in totals.items()}


def gradient_norms(losses: Mapping[str, Tensor], features: Tensor) -> dict[str, float]:
    """Euclidean norm of each loss's gradient at the encoder's features."""
    return {
        task: float(torch.autograd.grad(loss, features, retain_graph=True)[0].norm()) for task, loss in losses.items()
    }


def calibrated_weights(config: LossConfig, norms: Mapping[str, float]) -> dict[str, float]:
    """Factors of the losses in eq. 5, from the gradient norms seen at the start of the joint stage.

    The paper's weights belong to losses whose scale it does not state. Here an auxiliary task at the paper's
    weight pulls at the features with `config.share` of the density's gradient; other weights are relative to
    that. A task whose gradient vanishes keeps weight 0.
    """
    factors = {DENSITY: 1.0}
    for task in AUXILIARY:
        if task in norms:
            relative = getattr(config, task) / PAPER_WEIGHTS[task]
            norm = norms[task]
            factors[task] = config.gradient_share * relative * norms[DENSITY] / norm if norm > 0 else 0.0
    return factors
