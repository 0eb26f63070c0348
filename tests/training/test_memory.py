"""A batch that does not fit into memory: one message with what does fit, found by trying.

The memory is one that holds so many windows: under a real limit of the process, oneDNN now and then ends it instead of
saying that it got none.
"""

import dataclasses
import re
import weakref
from typing import Any, Literal

import pytest
import torch

from crowdray.config import NumericsConfig, OptimizerConfig
from crowdray.data.shards import Dataset
from crowdray.errors import InfeasibleConfigError, UserError
from crowdray.models.counter import Counter
from crowdray.presets import preset
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer

BATCH = 40


class Kept:
    """A tensor that a backward pass will need."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def train(
    discs: Dataset, grad_accumulation_steps: int, compiled: Literal["no", "yes", "graphs"] = "no"
) -> dict[str, torch.Tensor]:
    """The baseline's weights."""
    base = preset("debug")
    sampling = dataclasses.replace(
        base.sampling, batch=BATCH, crops_per_image=4, crop=32, context=32, validation_fraction=0.25
    )
    optimizer, numerics = (
        OptimizerConfig(name="sgd", grad_accumulation_steps=grad_accumulation_steps),
        NumericsConfig(compile=compiled),
    )
    config = dataclasses.replace(base, sampling=sampling, optimizer=optimizer, numerics=numerics)
    run = Trainer(config, discs, world=World(), device=torch.device("cpu"))
    run.stages = run.stages[:1]
    run.fit()
    return run.state.counter.state_dict()


def test_an_optimizer_that_does_not_fit_says_how_many_parameters_it_has(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.SGD, "step", refuse)
    with pytest.raises(
        InfeasibleConfigError, match=r"baseline stage: .* [\d,]+ parameters .*--model.count-decoder pooled"
    ):
        train(discs, grad_accumulation_steps=1)


def test_a_compiled_network_is_gone_with_its_training(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled refers to its network: a process that trains again would keep both until the collector comes."""
    networks: list[torch.nn.Module] = []

    def compile(call: Any, **_: Any) -> Any:
        networks.append(call.__self__)
        return call

    monkeypatch.setattr(torch, "compile", compile)
    train(discs, grad_accumulation_steps=1, compiled="yes")
    assert networks and all(network._compiled_call_impl is None for network in networks)


def test_a_compiler_that_is_not_there_is_missed_at_the_start(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(InfeasibleConfigError, match=r"numerics.compile is yes, .* C\+\+ compiler .*; install g\+\+"):
        train(discs, grad_accumulation_steps=1, compiled="yes")


@pytest.mark.parametrize("room", [12, 25, 39])
@pytest.mark.parametrize(
    "refusal", [torch.OutOfMemoryError("out of memory"), RuntimeError("could not create a primitive")], ids=str
)
def test_what_fits_is_found_and_does_fit(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch, room: int, refusal: RuntimeError
) -> None:
    forward = Counter.forward

    def request_timeout(self: Counter, image: torch.Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled() and len(image) > room:  # validation counts whole images one by one
            raise refusal
        return forward(self, image, *rest)

    monkeypatch.setattr(Counter, "forward", request_timeout)
    with pytest.raises(UserError) as caught:
        train(discs, grad_accumulation_steps=1)
    said = str(caught.value)
    found = re.search(
        r"(\d+) windows of 64x96 .*memory of cpu, (\d+) at a time do: .*grad_accumulation_steps (\d+)", said
    )
    assert found and int(found[1]) > room >= int(found[2]) > room / 4, said
    assert int(found[2]) * int(found[3]) >= BATCH
    train(discs, grad_accumulation_steps=int(found[3]))


def test_an_attempt_leaves_nothing_in_the_memory_of_the_next(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory ends in the backward pass, the graph of that attempt is full of activations."""
    forward, kept, left = Counter.forward, weakref.WeakSet[Kept](), []

    def pack(tensor: torch.Tensor) -> Kept:
        kept.add(held := Kept(tensor.detach()))  # itself, as some result, it would be held by its own graph
        return held

    def refuse(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    def request_timeout(self: Counter, image: torch.Tensor, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, image, *rest)
        left.append(len(kept))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            outputs = forward(self, image, *rest)
        if len(image) > 7:
            outputs["density"].register_hook(refuse)  # type: ignore[no-untyped-call]
        return outputs

    monkeypatch.setattr(Counter, "forward", request_timeout)
    with pytest.raises(UserError, match="5 at a time do"):
        train(discs, grad_accumulation_steps=1)
    assert len(left) > 3 and not any(left[1:])


def test_gradients_that_are_kept_for_cuda_graphs_are_those_that_are_not(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the parts of an update, a gradient that lies in a graph's memory would be overwritten."""
    monkeypatch.setattr(Counter, "compile", lambda *_, **__: None)
    steps: list[set[int]] = []

    def watched(self: torch.optim.SGD, *rest: Any) -> None:
        steps.append({parameter.grad.data_ptr() for parameter in self.param_groups[0]["params"]})
        step(self, *rest)

    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    plain, kept = (train(discs, grad_accumulation_steps=2, compiled=compiled) for compiled in ("no", "graphs"))
    assert plain.keys() == kept.keys() and all(torch.equal(plain[name], kept[name]) for name in plain)
    assert len({frozenset(places) for places in steps[len(steps) // 2 :]}) == 1
