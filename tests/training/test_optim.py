"""Optimizers, plateau schedule and weight average against torch and closed forms."""

import pytest
import torch
from torch import nn

from crowdray.config import OptimizerConfig
from crowdray.training.optim import (
    ExponentialMovingAverage,
    Plateau,
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_restored_optimizer_steps_like_the_original(name: str) -> None:
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]

    def build() -> tuple[nn.Conv2d, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return layer, build_optimizer(config, layer.parameters(), 0.1)

    def step(layer: nn.Conv2d, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        layer(torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    layer, optimizer = build()
    for seed in range(3):
        step(layer, optimizer, seed)
    saved = {k: v.clone().contiguous() for k, v in optimizer_tensors(optimizer).items()}  # as in a file
    weights = {k: v.clone() for k, v in layer.state_dict().items()}
    step(layer, optimizer, 3)
    other, restored = build()
    other.load_state_dict(weights)
    restore_optimizer(restored, saved, 0.1)
    step(other, restored, 3)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))


def test_muon_equals_torch_muon_on_convolutions_and_adam_elsewhere() -> None:
    """torch's own Muon accepts only matrices; a convolution is compared as one."""
    torch.manual_seed(0)
    layer, head = nn.Conv2d(5, 8, 3), nn.Linear(6, 2)
    matrix = nn.Parameter(layer.weight.detach().flatten(1).clone())
    others = [nn.Parameter(p.detach().clone()) for p in (layer.bias, *head.parameters()) if p is not None]
    ours = build_optimizer(
        OptimizerConfig(name="muon", weight_decay=0.1), [*layer.parameters(), *head.parameters()], 0.01
    )
    muon = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, eps=1e-10)
    for _ in range(4):
        layer.weight.grad = torch.randn_like(layer.weight)
        matrix.grad = layer.weight.grad.flatten(1).clone()
        for mine, theirs in zip((layer.bias, *head.parameters()), others, strict=True):
            assert mine is not None
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        for optimizer in (ours, muon, adam):
            optimizer.step()
    torch.testing.assert_close(layer.weight.flatten(1), matrix, atol=1e-4, rtol=0)
    for mine, theirs in zip((layer.bias, *head.parameters()), others, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_plateau_reduces_after_its_patience_also_when_restored() -> None:
    config = OptimizerConfig(plateau_patience=1, plateau_factor=0.1)
    errors = [5.0, 4.0, 4.5, 4.6, 3.0, 3.5, 3.4, 3.3]

    def rates(restore_after: int | None) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule, seen = Plateau(optimizer, config), []
        for index, error in enumerate(errors):
            schedule.step(error)
            seen.append(optimizer.param_groups[0]["lr"])
            if index == restore_after:
                state = schedule.state_dict()
                optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=seen[-1])
                schedule = Plateau(optimizer, config)
                schedule.load_state_dict(state)
        return seen

    unbroken = rates(None)
    assert unbroken == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    for index in range(len(errors) - 1):
        assert rates(index) == unbroken


@pytest.mark.parametrize("configured", [0.9, 0.0])
def test_moving_average_equals_closed_form(configured: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    average, expected = ExponentialMovingAverage({"w": weight}, configured), 1.0
    for number in range(1, 40):
        with torch.no_grad():
            weight.fill_(float(number))
        average.update()
        decay = min(configured, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * number
    assert average.values["w"].item() == pytest.approx(expected, rel=1e-5)
