"""Training throughput with the loader relative to the same steps on batches in memory, in alternation."""

import argparse
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.data.shards import Dataset
from crowdray.presets import preset
from crowdray.training.distributed import World, pick_device
from crowdray.training.flops import synchronize
from crowdray.training.trainer import Trainer

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cache-gib", type=float, help="memory for decoded images; by default that of the preset")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = preset(arguments.preset)
    if arguments.cache_gib is not None:
        config = replace(config, sampling=replace(config.sampling, cache_gib=arguments.cache_gib))
    trainer = Trainer(config, Dataset.open(arguments.data), world=World(), device=pick_device())
    stage_trainer = trainer.stage_trainer(trainer.stages[0])
    memory = [batch.to(trainer.state.device) for batch in islice(trainer.loader.epoch(0), arguments.steps)]
    for batch in memory[:2]:
        stage_trainer.train_step(batch)
    ratios = []
    for number in range(1, ROUNDS + 1):
        started = time.perf_counter()
        for batch in memory:
            stage_trainer.train_step(batch)
        synchronize(trainer.state.device)
        from_memory = sum(len(batch.rows) for batch in memory) / (time.perf_counter() - started)
        images, started = 0, time.perf_counter()
        for batch in islice(trainer.loader.epoch(number), arguments.steps):
            stage_trainer.train_step(batch)
            images += len(batch.rows)
        synchronize(trainer.state.device)
        loaded = images / (time.perf_counter() - started)
        ratios.append(loaded / from_memory)
        decodes = number == 1 or config.sampling.cache_gib == 0
        kind = "decoding" if decodes else "decoded images cached"
        print(f"  in memory {from_memory:.1f} images/s, loader {loaded:.1f} ({kind}), ratio {ratios[-1]:.3f}")
    print(f"  median ratio {sorted(ratios)[len(ratios) // 2]:.3f} (goal: at least 0.9), {arguments.threads} threads")


if __name__ == "__main__":
    main()
