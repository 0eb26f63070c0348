"""Throughput of DDP through Ray Train against the same loop under torchrun, on one machine.

Both run the demo's baseline stage for a few epochs with the same workers and threads; the first epoch is left out.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))
import torch

from crowdray.config import Config, to_json
from crowdray.data.shards import Dataset
from crowdray.presets import preset
from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer


def short(epochs: int) -> Config:
    """The demo's baseline stage alone, validated on a handful of images."""
    config = preset("demo")
    stages = dataclasses.replace(
        config.stages,
        baseline=dataclasses.replace(config.stages.baseline, epochs=epochs),
        decoders=dataclasses.replace(config.stages.decoders, epochs=0),
        joint=dataclasses.replace(config.stages.joint, epochs=0),
    )
    return dataclasses.replace(config, stages=stages, numerics=dataclasses.replace(config.numerics, threads=1))


def under_torchrun(data: str, epochs: int) -> None:
    """Train in one torchrun process, and print every epoch."""
    torch.distributed.init_process_group("gloo")
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    torch.set_num_threads(1)
    training = Trainer(short(epochs), Dataset.open(data), world=world, device=torch.device("cpu"))

    def report(row: EpochMetrics, save: object) -> None:
        if world.rank == 0:
            print(json.dumps(row), flush=True)

    training.fit(report)
    torch.distributed.destroy_process_group()


def torchrun_rate(data: str, workers: int, epochs: int) -> float:
    """Median images/s under torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={workers}",
        __file__,
    ]
    command += ["--inside", "--data", data, "--epochs", str(epochs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return median(float(row["images_per_s"]) for row in rows[1:])


def ray_rate(data: str, workers: int, epochs: int) -> float:
    """Median images/s through Ray Train, read from the result of a run in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(to_json(short(epochs)))
        command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--preset", str(config), "--data", data]
        command += ["--workers", str(workers), "--device", "cpu", "--storage", folder, "--name", "bench"]
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        result = next(Path(folder).rglob("result.json"))
        rows = json.loads(result.read_text())["history"]
    return median(float(row["images_per_s"]) for row in rows[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        under_torchrun(arguments.data, arguments.epochs)
        return
    ratios = []
    for _ in range(2):
        alone = torchrun_rate(arguments.data, arguments.workers, arguments.epochs)
        through = ray_rate(arguments.data, arguments.workers, arguments.epochs)
        ratios.append(through / alone)
        print(f"  images/s: torchrun {alone:.1f}, Ray Train {through:.1f}", flush=True)
    ratio = mean(ratios)
    print(f"  Ray Train / torchrun {ratio:.3f} (goal: at least 0.97), {arguments.workers} workers of one thread")


if __name__ == "__main__":
    main()
