"""A batch that does not fit into memory: one message with what does fit, measured."""

import re
import subprocess
import sys
from pathlib import Path

from crowdray.data.shards import Dataset

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import dataclasses, resource, sys
import torch
from crowdray.config import OptimizerConfig, SamplingConfig
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.presets import preset
from crowdray.training.loop import Training
from crowdray.training.world import World

torch.set_num_threads(1)
base = preset("debug")
sampling = dataclasses.replace(
    base.sampling, batch=400, crops_per_image=24, crop=32, context=32, validation_fraction=0.25
)

def train(accumulate):
    optimizer = OptimizerConfig(name="sgd", accumulate=accumulate)
    config = dataclasses.replace(base, sampling=sampling, optimizer=optimizer)
    run = Training(config, Dataset.open(sys.argv[1]), world=World(), device=torch.device("cpu"))
    run.stages = run.stages[:1]
    run.run()

in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + int(sys.argv[2]) * 2**20,) * 2)
train(int(sys.argv[3]))
"""


def trained(discs: Dataset, room_mib: int, accumulate: int) -> str:
    """What a training in so much memory says at its end."""
    command = [sys.executable, "-c", CODE, discs.uri, str(room_mib), str(accumulate)]
    environment = {"PYTHONPATH": str(ROOT / "platform"), "PATH": "/usr/bin:/bin", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    return (done.stderr.strip().splitlines() or [""])[-1]


def test_what_fits_is_found_and_does_fit(discs: Dataset) -> None:
    said = trained(discs, 400, accumulate=1)
    assert "baseline stage: 400 windows of 64x96 pixels do not fit into the memory of cpu, " in said, said
    found = re.search(r"(\d+) at a time do: give --optimizer.accumulate (\d+)", said)
    assert found, said
    assert trained(discs, 400, accumulate=int(found[2])) == ""
