"""Cost of a training step of a backbone: alone, with all tasks, and without our optimizations, interleaved.

The reference is the same network with torch's defaults: fp32, channels first, no autocast. Times are medians; MFU is
relative to the FLOP/s of large matrix products on this device in the same precision.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.config import Config
from crowdray.data.batch import Batch
from crowdray.data.shards import Dataset
from crowdray.presets import preset
from crowdray.training.distributed import World, pick_device
from crowdray.training.stage_trainer import StageTrainer
from crowdray.training.trainer import Trainer

BASELINE, JOINT = 0, -1
DEFAULTS = "torch's defaults"


def stage_trainer_of(config: Config, dataset: Dataset, stage: int, defaults: bool = False) -> StageTrainer:
    """Build a stage's trainer, with torch's default memory format if wanted."""
    trainer = Trainer(config, dataset, world=World(), device=pick_device())
    if defaults:
        trainer.state.counter.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return trainer.stage_trainer(trainer.stages[stage])


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median seconds of each call over interleaved rounds, without the first one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(clock() - started)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shb-csrnet")
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    base = preset(arguments.preset)
    base = replace(base, sampling=replace(base.sampling, batch=arguments.batch))
    plain = replace(base, numerics=replace(base.numerics, precision="fp32"))
    dataset = Dataset.open(arguments.data)
    stages = {
        DEFAULTS: stage_trainer_of(plain, dataset, BASELINE, defaults=True),
        "plain": stage_trainer_of(base, dataset, BASELINE),
        "all tasks": stage_trainer_of(base, dataset, JOINT),
    }
    batch: Batch = next(stages["plain"].loader.epoch(1)).to(stages["plain"].state.device)
    channels_first = replace(batch, image=batch.image.contiguous())
    steps = time_interleaved(
        {name: partial(s.train_step, channels_first if name == DEFAULTS else batch) for name, s in stages.items()},
        arguments.rounds,
    )
    height, width = batch.image.shape[-2:]
    device, threads = stages["plain"].state.device, torch.get_num_threads()
    print(f"{arguments.preset}, {arguments.batch} windows of {height}x{width}, {device}, {threads} threads")
    for name, seconds in steps.items():
        mfu = stages[name].mfu(arguments.batch / seconds)
        speed = f"{1000 * seconds:.0f} ms per step, {arguments.batch / seconds:.2f} windows/s"
        print(f"  {name}: {speed}, {mfu:.0%} MFU in {stages[name].precision}")
    print(f"  all tasks / plain: {steps['all tasks'] / steps['plain']:.3f} (goal: at most 1.15)")
    print(f"  {DEFAULTS} / plain: {steps[DEFAULTS] / steps['plain']:.2f} (goal: at least 1.3)")

    image = torch.randint(0, 256, (1, 3, 768, 1024), dtype=torch.uint8, device=device)

    def count(stage: StageTrainer) -> None:
        stage.state.counter.eval()
        with torch.inference_mode(), stage.autocast():
            stage.state.counter.density(image)

    counted = time_interleaved({name: partial(count, stages[name]) for name in (DEFAULTS, "plain")}, arguments.rounds)
    print(f"  inference on 768x1024: plain {counted['plain']:.2f} s, {DEFAULTS} {counted[DEFAULTS]:.2f} s")
    print(f"  {DEFAULTS} / plain: {counted[DEFAULTS] / counted['plain']:.2f} (goal: at least 1.3)")


if __name__ == "__main__":
    main()
