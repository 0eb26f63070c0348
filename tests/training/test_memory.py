"""Lack of memory in training steps: one message with a batch size that fits, found by trying.

The limit is simulated as a number of windows: under a real limit of the process, oneDNN sometimes aborts it
instead of reporting a failed allocation.
"""

import re
import weakref
from typing import Any, Literal

import pytest
import torch

from crowdray.config import NumericsConfig, OptimizerConfig
from crowdray.data.shards import Dataset
from crowdray.errors import InfeasibleConfigError
from crowdray.models.counter import Counter

from ..support.trainers import debug_config, equal_tensors, limit_windows, trainer_of

BATCH = 40


def train_baseline(
    discs: Dataset, grad_accumulation_steps: int = 1, compiled: Literal["no", "yes", "graphs"] = "no"
) -> dict[str, torch.Tensor]:
    """Train the baseline stage on batches of 40 windows; returns the weights."""
    config = debug_config(
        sampling={"batch": BATCH, "crops_per_image": 4, "crop": 32, "context": 32},
        optimizer=OptimizerConfig(name="sgd", grad_accumulation_steps=grad_accumulation_steps),
        numerics=NumericsConfig(compile=compiled),
    )
    trainer = trainer_of(discs, config)
    trainer.stages = trainer.stages[:1]
    trainer.fit()
    return trainer.state.counter.state_dict()


def test_fit_with_optimizer_state_too_large_names_its_parameters(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.SGD, "step", refuse)
    with pytest.raises(
        InfeasibleConfigError, match=r"baseline stage: .* [\d,]+ parameters .*--model.count-decoder pooled"
    ):
        train_baseline(discs)


def test_fit_with_compiled_model_releases_it(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled call and its model reference each other, and would stay until the garbage collector runs."""
    models: list[torch.nn.Module] = []

    def compile(call: Any, **_: Any) -> Any:
        models.append(call.__self__)
        return call

    monkeypatch.setattr(torch, "compile", compile)
    train_baseline(discs, compiled="yes")
    assert models and all(model._compiled_call_impl is None for model in models)


def test_trainer_without_compiler_raises_at_once(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(InfeasibleConfigError, match=r"numerics.compile is yes, .* C\+\+ compiler .*; install g\+\+"):
        train_baseline(discs, compiled="yes")


@pytest.mark.parametrize("limit", [12, 25, 39])
@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("out of memory"), RuntimeError("could not create a primitive")], ids=str
)
def test_fit_with_batch_too_large_suggests_steps_that_fit(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch, limit: int, failure: RuntimeError
) -> None:
    limit_windows(monkeypatch, limit, failure)
    with pytest.raises(InfeasibleConfigError) as caught:
        train_baseline(discs)
    pattern = r"(\d+) windows of 64x96 .*memory of cpu, (\d+) at a time do: .*grad_accumulation_steps (\d+)"
    found = re.search(pattern, str(caught.value))
    assert found and int(found[1]) > limit >= int(found[2]) > limit / 4, caught.value
    assert int(found[2]) * int(found[3]) >= BATCH
    train_baseline(discs, grad_accumulation_steps=int(found[3]))


def test_fit_with_batch_too_large_frees_each_attempt_before_the_next(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the backward pass runs out of memory, the graph of that attempt still holds its activations."""
    forward, saved, remaining = Counter.forward, weakref.WeakSet[torch.Tensor](), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(held := tensor.detach())  # undetached, a result would keep its own graph alive
        return held

    def refuse(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    def limited(self: Counter, image: torch.Tensor, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, image, *rest)
        remaining.append(len(saved))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
            outputs = forward(self, image, *rest)
        if len(image) > 7:
            outputs["density"].register_hook(refuse)  # type: ignore[no-untyped-call]
        return outputs

    monkeypatch.setattr(Counter, "forward", limited)
    with pytest.raises(InfeasibleConfigError, match="5 at a time do"):
        train_baseline(discs)
    assert len(remaining) > 3 and not any(remaining[1:])


def test_gradients_accumulated_outside_cuda_graphs_are_equal(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next replay of a graph would overwrite gradients in its memory, so they keep their addresses."""
    monkeypatch.setattr(Counter, "compile", lambda *_, **__: None)
    addresses: list[frozenset[int]] = []
    step = torch.optim.SGD.step

    def recorded(self: torch.optim.SGD, *rest: Any) -> None:
        addresses.append(frozenset(parameter.grad.data_ptr() for parameter in self.param_groups[0]["params"]))
        step(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    plain = train_baseline(discs, grad_accumulation_steps=2)
    graphs = train_baseline(discs, grad_accumulation_steps=2, compiled="graphs")
    assert equal_tensors(plain, graphs)
    assert len(set(addresses[len(addresses) // 2 :])) == 1
