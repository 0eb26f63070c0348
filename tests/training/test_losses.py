"""Losses against their equations in numpy, and the calibration's law."""

import numpy as np
import pytest
import torch

from crowdray.config import LossConfig
from crowdray.models.counter import COUNT, DENSITY, DEPTH, SEGMENTATION, TASKS
from crowdray.training.loss_balancing import balanced_weights, gradient_norms
from crowdray.training.losses import MapTargets, Scales, task_losses

SCALES = Scales(density=50.0, count=4.0)


def example(batch: int = 4) -> tuple[dict[str, torch.Tensor], MapTargets]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    outputs = {
        DENSITY: rand(batch, 1, 6, 8),
        SEGMENTATION: rand(batch, 1, 6, 8) * 8 - 4,
        DEPTH: rand(batch, 1, 6, 8),
        COUNT: rand(batch),
    }
    crowd = (rand(batch, 1, 6, 8) > 0.6).float()
    known = torch.tensor([1.0, 0.0, 1.0, 1.0])[:batch]
    targets = MapTargets(rand(batch, 1, 6, 8) / 50, crowd, crowd * 0.5, rand(batch) * 9, rand(batch, 1, 6, 8), known)
    return outputs, targets


def test_each_loss_is_its_equation() -> None:
    outputs, targets = example()
    losses = {name: value.item() for name, value in task_losses(outputs, targets, SCALES).items()}
    o = {name: value.double().numpy() for name, value in outputs.items()}
    t = {name: value.double().numpy() for name, value in vars(targets).items()}
    probability = 1 / (1 + np.exp(-o[SEGMENTATION]))
    entropy = -(t["segmentation"] * np.log(probability) + (1 - t["segmentation"]) * np.log(1 - probability))
    expected = {
        DENSITY: ((o[DENSITY] - 50 * t["density"]) ** 2 * t["weight"]).mean(),
        SEGMENTATION: (entropy * t["weight"]).mean(),
        DEPTH: ((o[DEPTH] - t["depth"]) ** 2 * t["weight"] * t["has_depth"][:, None, None, None]).mean(),
        COUNT: ((o[COUNT] - t["count"] / 4) ** 2).mean(),
    }
    assert losses == pytest.approx(expected, rel=1e-5)


def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch() -> None:
    outputs, targets = example()
    whole = task_losses(outputs, targets, SCALES)
    halves = []
    for part in (slice(0, 4, 2), slice(1, 4, 2)):
        share = MapTargets(**{name: value[part] for name, value in vars(targets).items()})
        halves.append(task_losses({name: value[part] for name, value in outputs.items()}, share, SCALES))
    for task in TASKS:
        torch.testing.assert_close((halves[0][task] + halves[1][task]) / 2, whole[task])


def test_at_the_papers_weights_each_task_pulls_with_the_stated_share_of_the_density_gradient() -> None:
    features = torch.rand(3, 5, requires_grad=True, generator=torch.Generator().manual_seed(1))
    losses = {
        DENSITY: features.square().sum(), SEGMENTATION: (7 * features).sum(),
        DEPTH: features.pow(3).mean(), COUNT: features[0].exp().sum() * 100,
    }  # fmt: skip
    norms = gradient_norms(losses, features)
    factors = balanced_weights(LossConfig(gradient_share=0.25), norms)
    for task in (SEGMENTATION, DEPTH, COUNT):
        weighted = torch.autograd.grad(factors[task] * losses[task], features, retain_graph=True)[0].norm()
        assert weighted.item() == pytest.approx(0.25 * norms[DENSITY], rel=1e-5)
    double = balanced_weights(LossConfig(gradient_share=0.25, depth=1.2), norms)
    assert double[DEPTH] == pytest.approx(2 * factors[DEPTH])
    assert double[COUNT] == factors[COUNT]
    assert factors[DENSITY] == 1
