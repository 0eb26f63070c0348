"""Optimizer, plateau rule and weight average of one stage, with a state made of tensors and numbers only."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pytorch_optimizer import Muon
from torch import Tensor, nn

from crowdray.config import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters of one stage.

    muon (Jordan et al. 2024): the update of a convolution, seen as the matrix (output channels, inputs), is its
    momentum with all singular values set to about 1, scaled by 0.2 sqrt(larger side) so that its entries are as
    large as Adam's (Liu et al. 2025, arXiv 2502.16982) and one learning rate serves both. Biases, and the
    millions of linear weights of the count decoder, take Adam.
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
    listed = list(parameters)
    shared = {"lr": learning_rate, "weight_decay": config.weight_decay}
    groups = [
        {"params": [p for p in listed if p.ndim == 4], "use_muon": True, "use_adjusted_lr": True, **shared},
        {"params": [p for p in listed if p.ndim != 4], "use_muon": False, "betas": (0.9, 0.999), **shared},
    ]
    return Muon([group for group in groups if group["params"]])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Plateau:
    """Multiply the learning rate with a factor when the validation error has not fallen for a number of
    epochs.

    The rule of the paper; it never looks ahead, so a stage cut short equals the beginning of a longer one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
        self._rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.plateau_factor, patience=config.plateau_patience
        )

    def step(self, error: float) -> None:
        """Tell the rule the validation error of an epoch."""
        self._rule.step(error)

    def state(self) -> dict[str, float | None]:
        """What the rule remembers, as JSON."""
        best = self._rule.best
        return {
            "best": best if math.isfinite(best) else None,
            "bad_epochs": self._rule.num_bad_epochs,
            "epoch": self._rule.last_epoch,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self._rule.best = math.inf if state["best"] is None else state["best"]
        self._rule.num_bad_epochs = state["bad_epochs"]
        self._rule.last_epoch = state["epoch"]


class ExponentialMovingAverage:
    """Exponential running average of some modules' parameters; with decay 0 it is the parameters themselves.

    The decay grows to its value over the first updates, (1 + n) / (10 + n), so that the random start is soon
    forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._live = parameters
        self._decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an update."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.values.values()), [live.detach() for live in self._live.values()], 1 - decay)

    def restore(self, values: Mapping[str, Tensor], updates: int) -> None:
        """Take back the average and its number of updates."""
        for name, value in self.values.items():
            value.copy_(values[name])
        self.updates = updates


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: "<parameter number>.<name>", and "group.<number>" for the updates
    that an optimizer counts by group."""
    saved = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": value
        for number, entry in saved["state"].items()
        for name, value in entry.items()
        if value is not None
    }
    counted = {number: group["step"] for number, group in enumerate(saved["param_groups"]) if "step" in group}
    return tensors | {f"group.{number}": torch.tensor(step) for number, step in counted.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], learning_rate: float) -> None:
    """Take back what `optimizer_tensors` gave, and the learning rate it had."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        if number == "group":
            groups[int(name)]["step"] = int(value)
            continue
        like = parameters[int(number)]
        # Fused kernels walk through memory: a moment must lie there in the order of its parameter.
        moment = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
        state.setdefault(int(number), {})[name] = moment
    for group in groups:
        group["lr"] = learning_rate
    optimizer.load_state_dict({"state": state, "param_groups": groups})
