"""What a backbone costs: an update of the plain one, with all tasks, and without what makes it fast; taken in turn.

The reference is the same network in torch's defaults: fp32, one channel plane after the other, no autocast. Times are
medians; the roofline is the rate at which this device multiplies large matrices in the same precision.
"""

import argparse
import sys
import time
from collections.abc import Callable
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


def running_stage(config: Config, dataset: Dataset, stage: int, defaults: bool = False) -> StageTrainer:
    """A stage ready to be stepped; with torch's defaults in its layout of memory."""
    training = Trainer(config, dataset, world=World(), device=pick_device())
    if defaults:
        training.state.counter.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return training.stage_trainer(training.stages[stage])


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, the first round left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: median(taken[1:]) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="shb-csrnet")
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paper", action="store_true", help="the paper's count decoder too: gigabytes for csrnet")
    arguments = parser.parse_args()
    base = preset(arguments.preset)
    base = replace(base, sampling=replace(base.sampling, batch=arguments.batch))
    plain = replace(base, numerics=replace(base.numerics, precision="fp32"))
    dataset = Dataset.open(arguments.data)
    stages = {
        DEFAULTS: running_stage(plain, dataset, BASELINE, defaults=True),
        "plain": running_stage(base, dataset, BASELINE),
        "all tasks": running_stage(base, dataset, JOINT),
    }
    if arguments.paper:
        paper = replace(base, model=replace(base.model, count_decoder="paper"))
        stages["all tasks, the paper's count decoder"] = running_stage(paper, dataset, JOINT)
    batch: Batch = next(stages["plain"].loader.epoch(1)).to(stages["plain"].state.device)
    planes = replace(batch, image=batch.image.contiguous())
    updates = in_turn(
        {name: partial(s.train_step, planes if name == DEFAULTS else batch) for name, s in stages.items()},
        arguments.rounds,
    )
    height, width = batch.image.shape[-2:]
    device, threads = stages["plain"].state.device, torch.get_num_threads()
    print(f"{arguments.preset}, {arguments.batch} windows of {height}x{width}, {device}, {threads} threads")
    for name, seconds in updates.items():
        share = stages[name].mfu(arguments.batch / seconds)
        pace = f"{1000 * seconds:.0f} ms an update, {arguments.batch / seconds:.2f} windows/s"
        print(f"  {name}: {pace}, {share:.0%} of the matrix rate in {stages[name].precision}")
    for name in list(stages)[2:]:
        print(f"  {name} / plain: {updates[name] / updates['plain']:.3f} (goal with the pooled one: at most 1.15)")
    print(f"  {DEFAULTS} / plain: {updates[DEFAULTS] / updates['plain']:.2f} (goal: at least 1.3)")

    photo = torch.randint(0, 256, (1, 3, 768, 1024), dtype=torch.uint8, device=device)

    def count(stage: StageTrainer) -> None:
        stage.state.counter.eval()
        with torch.inference_mode(), stage.autocast():
            stage.state.counter.density(photo)

    counted = in_turn({name: partial(count, stages[name]) for name in (DEFAULTS, "plain")}, arguments.rounds)
    print(f"  a photo of 768x1024: plain {counted['plain']:.2f} s, {DEFAULTS} {counted[DEFAULTS]:.2f} s")
    print(f"  {DEFAULTS} / plain: {counted[DEFAULTS] / counted['plain']:.2f} (goal: at least 1.3)")


if __name__ == "__main__":
    main()
