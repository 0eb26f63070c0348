"""Optimizers, the plateau schedule and the weight average, with states of tensors and numbers only."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crowdray.config import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """Build the configured optimizer over the parameters of one stage.

    muon (Jordan et al. 2024): the update of a convolution, seen as the matrix (output channels, inputs), is its
    momentum with all singular values set to about 1, scaled by 0.2 sqrt(larger side) so that its entries are as
    large as Adam's (Liu et al. 2025, arXiv 2502.16982) and one learning rate serves both. Biases, and the
    millions of linear weights of the count decoder, use Adam.
    """
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            foreach=True,
        )
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=config.weight_decay, fused=True)
    from pytorch_optimizer import Muon  # late: it imports transformers where that is installed, which takes seconds

    listed = list(parameters)
    common = {"lr": learning_rate, "weight_decay": config.weight_decay}
    groups = [
        {"params": [p for p in listed if p.ndim == 4], "use_muon": True, "use_adjusted_lr": True, **common},
        {"params": [p for p in listed if p.ndim != 4], "use_muon": False, "betas": (0.9, 0.999), **common},
    ]
    return Muon([group for group in groups if group["params"]])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Plateau:
    """Reduce the learning rate after epochs without a lower validation error, as in the paper.

    The rule never looks ahead, so a run cut short equals the prefix of a longer one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        self._scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.plateau_factor, patience=config.plateau_patience
        )

    def step(self, error: float) -> None:
        """Update the learning rate after an epoch with this validation error."""
        self._scheduler.step(error)

    def state_dict(self) -> dict[str, float | None]:
        """Return the state as JSON values."""
        best = self._scheduler.best
        return {
            "best": best if math.isfinite(best) else None,
            "bad_epochs": self._scheduler.num_bad_epochs,
            "epoch": self._scheduler.last_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._scheduler.best = math.inf if state["best"] is None else state["best"]
        self._scheduler.num_bad_epochs = state["bad_epochs"]
        self._scheduler.last_epoch = state["epoch"]


class ExponentialMovingAverage:
    """Exponential moving average of named tensors; with decay 0, their last values.

    The decay warms up as (1 + n) / (10 + n) over the first updates n, to forget the random initialization soon.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self._tensors = tensors
        self._decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Average in the current values of the tensors."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        current = [value.detach() for value in self._tensors.values()]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - decay)

    def restore(self, values: Mapping[str, Tensor], updates: int) -> None:
        """Restore the average and its number of updates."""
        for name, value in self.values.items():
            value.copy_(values[name])
        self.updates = updates


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors by name.

    Names are "<parameter index>.<name>", and "group.<index>" for optimizers that count steps per group.
    """
    saved = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value
        for index, entry in saved["state"].items()
        for name, value in entry.items()
        if value is not None
    }
    steps = {index: group["step"] for index, group in enumerate(saved["param_groups"]) if "step" in group}
    return tensors | {f"group.{index}": torch.tensor(step) for index, step in steps.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], learning_rate: float) -> None:
    """Restore what `optimizer_tensors` returned, and the learning rate."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        if index == "group":
            groups[int(name)]["step"] = int(value)
            continue
        like = parameters[int(index)]
        # Fused kernels iterate over raw memory: a moment needs the memory format of its parameter.
        moment = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
        state.setdefault(int(index), {})[name] = moment
    for group in groups:
        group["lr"] = learning_rate
    optimizer.load_state_dict({"state": state, "param_groups": groups})
