"""Loss balancing: scale auxiliary losses by their gradients at the encoder's features."""

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from crowdray.config import PAPER_WEIGHTS, Config, LossConfig
from crowdray.data.batch import Batch
from crowdray.models.counter import AUXILIARY, DENSITY, Counter
from crowdray.training.losses import LocalCounts, Scales, build_targets, task_losses

BALANCING_BATCHES = 8
"""Batches over which gradient norms are averaged."""


def measure_gradient_norms(
    counter: Counter,
    batches: Generator[Batch, None, None],
    tasks: tuple[str, ...],
    config: Config,
    scales: Scales,
    autocast: Callable[[], AbstractContextManager[object]],
) -> dict[str, float]:
    """Average the norm of each task's gradient at the features over the first batches.

    Uses the microbatches of training: their gradients are disjoint entries of the batch's gradient. Leaves
    the gradients of parameters untouched.
    """
    counter.eval()
    device = counter.mean.device
    totals, seen = dict.fromkeys(tasks, 0.0), 0
    for _, batch in zip(range(BALANCING_BATCHES), batches, strict=False):
        norms: dict[str, list[float]] = {task: [] for task in tasks}
        for microbatch in batch.to(device).microbatches(config.optimizer.grad_accumulation_steps):
            with torch.no_grad(), autocast():
                features = counter.features(microbatch.augmented_images())
            features = features.float().requires_grad_()
            with autocast():
                outputs = counter.decode(features, tasks, microbatch.image.shape[-2:], microbatch.corners)
            stride = counter.encoder.output_stride
            targets, local_counts = build_targets(microbatch, config, stride), LocalCounts.of(config, stride)
            losses = task_losses(outputs, targets, scales, local_counts)
            fraction = len(microbatch.rows) / len(batch.rows)
            for task, norm in gradient_norms(losses, features).items():
                norms[task].append(fraction * norm)
        for task in tasks:
            totals[task] += math.hypot(*norms[task])
        seen += 1
    batches.close()
    return {task: total / seen for task, total in totals.items()}


def gradient_norms(losses: Mapping[str, Tensor], features: Tensor) -> dict[str, float]:
    """Return the Euclidean norm of each loss's gradient at the features."""
    return {
        task: float(torch.autograd.grad(loss, features, retain_graph=True)[0].norm()) for task, loss in losses.items()
    }


def balanced_weights(config: LossConfig, norms: Mapping[str, float]) -> dict[str, float]:
    """Return the loss weights of eq. 5 from gradient norms at the start of the joint stage.

    The paper does not state the scale of its losses. Here an auxiliary loss at the paper's weight has
    `config.gradient_share` times the density loss's gradient at the features; other weights are relative to
    the paper's. A task with zero gradient gets weight 0.
    """
    weights = {DENSITY: 1.0}
    for task in AUXILIARY:
        if task in norms:
            relative = getattr(config, task) / PAPER_WEIGHTS[task]
            norm = norms[task]
            weights[task] = config.gradient_share * relative * norms[DENSITY] / norm if norm > 0 else 0.0
    return weights
