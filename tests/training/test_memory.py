"""A batch that does not fit into memory: one message with what does fit, found by trying.

The memory is one that holds so many windows: under a real limit of the process, oneDNN now and then ends it instead of
saying that it got none.
"""

import dataclasses
import re
from typing import Any

import pytest
import torch

from crowdray.config import OptimizerConfig
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.models.counter import Counter
from crowdray.presets import preset
from crowdray.training.loop import Training
from crowdray.training.world import World

BATCH = 40


def train(discs: Dataset, accumulate: int) -> None:
    base = preset("debug")
    sampling = dataclasses.replace(
        base.sampling, batch=BATCH, crops_per_image=4, crop=32, context=32, validation_fraction=0.25
    )
    config = dataclasses.replace(base, sampling=sampling, optimizer=OptimizerConfig(name="sgd", accumulate=accumulate))
    run = Training(config, discs, world=World(), device=torch.device("cpu"))
    run.stages = run.stages[:1]
    run.run()


@pytest.mark.parametrize("room", [12, 25, 39])
@pytest.mark.parametrize(
    "refusal", [torch.OutOfMemoryError("out of memory"), RuntimeError("could not create a primitive")], ids=str
)
def test_what_fits_is_found_and_does_fit(
    discs: Dataset, monkeypatch: pytest.MonkeyPatch, room: int, refusal: RuntimeError
) -> None:
    forward = Counter.forward

    def bounded(self: Counter, image: torch.Tensor, *rest: Any) -> Any:
        if torch.is_grad_enabled() and len(image) > room:  # validation counts whole images one by one
            raise refusal
        return forward(self, image, *rest)

    monkeypatch.setattr(Counter, "forward", bounded)
    with pytest.raises(UserError) as caught:
        train(discs, accumulate=1)
    said = str(caught.value)
    found = re.search(r"(\d+) windows of 64x96 .*memory of cpu, (\d+) at a time do: .*accumulate (\d+)", said)
    assert found and int(found[1]) > room >= int(found[2]) > room / 4, said
    assert int(found[2]) * int(found[3]) >= BATCH
    train(discs, accumulate=int(found[3]))
