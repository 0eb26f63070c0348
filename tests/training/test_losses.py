"""Losses against their equations in numpy, placebo targets, and loss balancing against its definition."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from crowdray.config import LossConfig
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.errors import InfeasibleConfigError
from crowdray.models.counter import COUNT, DENSITY, DEPTH, SEGMENTATION, TASKS
from crowdray.training.loss_balancing import balanced_weights, gradient_norms
from crowdray.training.losses import LocalCounts, MapTargets, Scales, build_targets, other_images, task_losses

from ..support.trainers import debug_config, trainer_of

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


def test_task_losses_equal_their_equations() -> None:
    outputs, targets = example()
    losses = {name: value.item() for name, value in task_losses(outputs, targets, SCALES).items()}
    predicted = {name: value.double().numpy() for name, value in outputs.items()}
    true = {name: value.double().numpy() for name, value in vars(targets).items()}
    probability = 1 / (1 + np.exp(-predicted[SEGMENTATION]))
    entropy = -(true["segmentation"] * np.log(probability) + (1 - true["segmentation"]) * np.log(1 - probability))
    known = true["has_depth"][:, None, None, None]
    expected = {
        DENSITY: ((predicted[DENSITY] - 50 * true["density"]) ** 2 * true["weight"]).mean(),
        SEGMENTATION: (entropy * true["weight"]).mean(),
        DEPTH: ((predicted[DEPTH] - true["depth"]) ** 2 * true["weight"] * known).mean(),
        COUNT: ((predicted[COUNT] - true["count"] / 4) ** 2).mean(),
    }
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [1, 8])
def test_local_counts_equal_their_equation(stride: int) -> None:
    """Blocks of 16, 32 and 64 pixels, incomplete at the end, and the window; side and unit in cells of 8 pixels."""
    local_counts = LocalCounts(weight=0.5, stride=stride, unit=0.1)
    error = torch.randn(2, 1, 80 // stride, 112 // stride, generator=torch.Generator().manual_seed(0))
    losses = []
    for block in (16, 32, 64):
        side = block // stride
        sums = [
            error[image, 0, top : top + side, left : left + side].sum().item()
            for image in range(2)
            for top in range(0, 80 // stride, side)
            for left in range(0, 112 // stride, side)
        ]
        losses.append(np.mean((np.array(sums) / 0.1 / (block / 8)) ** 2))
    windows = error.sum((1, 2, 3)).numpy() / 0.1
    losses.append(np.mean(windows**2 / (80 / 8 * 112 / 8)))
    assert local_counts.loss(error).item() == pytest.approx(0.5 * np.mean(losses), rel=1e-5)


def test_task_losses_with_local_counts_notice_a_surplus_spread_over_the_image() -> None:
    """Errors of one sign cost more than errors of the same size that cancel."""
    _, targets = example()
    flat = {DENSITY: targets.density * SCALES.density + 0.01}
    signs = torch.ones(6, 8)
    signs[::2, 1::2] = signs[1::2, ::2] = -1
    alternating = {DENSITY: targets.density * SCALES.density + 0.01 * signs}
    targets.weight.fill_(1)
    plain = [task_losses(output, targets, SCALES)[DENSITY] for output in (flat, alternating)]
    torch.testing.assert_close(plain[0], plain[1])
    local_counts = LocalCounts(weight=1.0, stride=8, unit=1 / SCALES.density)
    both = [task_losses(output, targets, SCALES, local_counts)[DENSITY] for output in (flat, alternating)]
    assert both[0] > 3 * both[1] > plain[0]


def test_task_losses_averaged_over_ranks_equal_those_of_the_batch() -> None:
    outputs, targets = example()
    local_counts = LocalCounts(weight=0.5, stride=8, unit=0.1)
    whole = task_losses(outputs, targets, SCALES, local_counts)
    halves = []
    for rank in (slice(0, 4, 2), slice(1, 4, 2)):
        half = MapTargets(**{name: value[rank] for name, value in vars(targets).items()})
        halves.append(task_losses({name: value[rank] for name, value in outputs.items()}, half, SCALES, local_counts))
    for task in TASKS:
        torch.testing.assert_close((halves[0][task] + halves[1][task]) / 2, whole[task])


def test_balanced_weights_at_paper_weights_yield_the_configured_gradient_ratio() -> None:
    features = torch.rand(3, 5, requires_grad=True, generator=torch.Generator().manual_seed(1))
    losses = {
        DENSITY: features.square().sum(), SEGMENTATION: (7 * features).sum(),
        DEPTH: features.pow(3).mean(), COUNT: features[0].exp().sum() * 100,
    }  # fmt: skip
    norms = gradient_norms(losses, features)
    weights = balanced_weights(LossConfig(gradient_share=0.25), norms)
    for task in (SEGMENTATION, DEPTH, COUNT):
        weighted = torch.autograd.grad(weights[task] * losses[task], features, retain_graph=True)[0].norm()
        assert weighted.item() == pytest.approx(0.25 * norms[DENSITY], rel=1e-5)
    doubled = balanced_weights(LossConfig(gradient_share=0.25, depth=1.2), norms)
    assert doubled[DEPTH] == pytest.approx(2 * weights[DEPTH])
    assert doubled[COUNT] == weights[COUNT]
    assert weights[DENSITY] == 1
    assert balanced_weights(LossConfig(), {DENSITY: 1.0, DEPTH: 0.0}) == {DENSITY: 1.0, DEPTH: 0.0}


@given(st.lists(st.integers(1, 3), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_other_images_pairs_each_window_with_one_of_another_image(windows: list[int], shuffle: Random) -> None:
    """For any order of windows of which no image has more than half."""
    rows = [image for image, number in enumerate(windows) for _ in range(number)]
    assume(2 * max(windows) <= len(rows))
    shuffle.shuffle(rows)
    other = other_images(torch.tensor(rows))
    assert sorted(other.tolist()) == list(range(len(rows)))
    assert all(rows[window] != rows[paired] for window, paired in enumerate(other.tolist()))


def test_build_targets_with_placebo_changes_the_auxiliary_targets_only(discs: Dataset) -> None:
    config = debug_config(sampling={"crop": 32, "context": 0, "crops_per_image": 2, "batch": 8})
    batch = next(trainer_of(discs, config).loader.epoch(1))
    own = build_targets(batch, config, 1)
    placebo = build_targets(batch, replace(config, loss=LossConfig(placebo=True)), 1)
    other = other_images(batch.rows)
    for name, value in vars(own).items():
        expected = value[other] if name in ("segmentation", "depth", "has_depth", "count") else value
        assert torch.equal(getattr(placebo, name), expected), name
    assert not torch.equal(placebo.count, own.count)


def test_split_rows_with_placebo_and_one_image_in_a_microbatch_raises(discs: Dataset) -> None:
    config = debug_config(sampling={"crops_per_image": 4, "batch": 8}, loss=LossConfig(placebo=True))
    split_rows(config, discs, 1)
    with pytest.raises(InfeasibleConfigError, match=r"two images in each microbatch, which is 4 windows"):
        split_rows(config, discs, 2)
