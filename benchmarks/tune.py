"""Prefix caching against plain Ray Tune on the same configurations: worker-seconds, with equal results.

32 TPE trials over continuous loss weights and stage lengths in the proportions {20, 40, 60}, {10, 20}, {20, 40},
shortened, on small synthetic scenes. Plain trials start from scratch, with the three decoders trained together or, as
in the paper, one after the other. The search with pruning is compared with training all of its trials to their end.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))
import torch
from mlflow import MlflowClient
from pydantic import TypeAdapter
from ray import tune

from crowdray.cluster.runtime import connect
from crowdray.config import Config, StageConfig, StagesConfig, to_json
from crowdray.data.shards import Dataset
from crowdray.presets import preset
from crowdray.training.distributed import World
from crowdray.training.trainer import Trainer
from crowdray.tune.record import StudyRecord
from crowdray.tune.space import Range, default_space, load_space

LENGTHS = {"baseline": (20, 40, 60), "decoders": (10, 20), "joint": (20, 40)}
"""Epochs of the study to measure; shortened by a common divisor."""


def base_config(divisor: int) -> Config:
    """The demo's configuration with one thread and the shortest lengths."""
    config = preset("demo")
    pace = config.stages
    stages = StagesConfig(
        *(
            StageConfig(min(LENGTHS[name]) // divisor, getattr(pace, name).learning_rate)
            for name in ("baseline", "decoders", "joint")
        )
    )
    sampling = dataclasses.replace(config.sampling, crop=64, context=64)
    numerics = dataclasses.replace(config.numerics, threads=1)
    optimizer = dataclasses.replace(config.optimizer, ema_decay=0.95, warmup=10)  # updates are hundreds, not thousands
    return dataclasses.replace(config, stages=stages, sampling=sampling, numerics=numerics, optimizer=optimizer)


def render(folder: Path, images: int) -> None:
    """Convert small synthetic scenes to a dataset in `folder`."""
    convert = [sys.executable, str(ROOT / "jobs" / "convert.py"), "synthetic", "--dest", str(folder)]
    convert += ["--train", str(images), "--test", "8", "--width", "160", "--height", "120"]
    subprocess.run(convert, check=True, capture_output=True)


def vary_lengths(divisor: int) -> list[str]:
    """Items of --vary for the three stage lengths."""
    shortened = {name: [length // divisor for length in lengths] for name, lengths in LENGTHS.items()}
    return [f"stages.{name}.epochs={json.dumps(lengths)}" for name, lengths in shortened.items()]


def search(folder: Path, name: str, vary: Sequence[str], trials: int, *options: str) -> StudyRecord:
    """Run a study with a stage cache of its own, through the job, and return its record."""
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), "--preset", str(folder / "config.json")]
    command += ["--data", str(folder / "data"), "--trials", str(trials), "--name", name, *options]
    command += ["--storage", str(folder / "runs"), "--stage-cache", str(folder / f"stages-{name}"), "--vary", *vary]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    record = (folder / "runs" / name / "record.json").read_bytes()
    return TypeAdapter(StudyRecord).validate_json(record)


def overheads(tracking: str, study: StudyRecord) -> dict[int, float]:
    """Seconds of each trial outside of its trained epochs, by number, in the order of their starts.

    Without the best trial: its MLflow run ends once more when its counter is registered.
    """
    client = MlflowClient(tracking)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"run_name like '% of {study.name}'", order_by=["start_time"])
    trials = {f"trial-{trial.number:04d} of {study.name}": trial for trial in study.trials if trial != study.best()}
    found = {}
    for run in runs:
        if trial := trials.get(run.info.run_name):
            epochs = sorted(
                client.get_metric_history(run.info.run_id, "system/epoch_seconds"), key=lambda metric: metric.step
            )
            own = [epoch >= cost.reused for cost in trial.stage_costs for epoch in range(cost.epochs)]
            trained = sum(epoch.value for epoch, counts in zip(epochs, own, strict=True) if counts)
            found[trial.number] = (run.info.end_time - run.info.start_time) / 1000 - trained
    return found


def plain_trial(data: str, configs: Sequence[Config], sequential: bool, tune_config: Mapping[str, Any]) -> None:
    """Train one configuration from scratch in a trial of Ray Tune."""
    config = configs[tune_config["number"]]
    torch.set_num_threads(config.numerics.threads)
    started = time.monotonic()
    trainer = Trainer(config, Dataset.open(data), world=World(), device=torch.device("cpu"))
    if sequential:
        one_by_one = [
            [dataclasses.replace(stage, tasks=(task,), modules=(task,)) for task in stage.tasks]
            if stage.name == "decoders"
            else [stage]
            for stage in trainer.stages
        ]
        trainer.stages = tuple(stage for stages in one_by_one for stage in stages)
    trainer.fit()
    tune.report({"mae": trainer.state.progress.best["joint"].mae, "seconds": time.monotonic() - started})


def plain(data: str, configs: Sequence[Config], sequential: bool) -> tuple[list[float], float]:
    """Validation MAE of each configuration and the worker-seconds of all, with plain Ray Tune."""
    with connect(), tempfile.TemporaryDirectory() as scratch:
        trainable = tune.with_resources(partial(plain_trial, data, configs, sequential), {"CPU": 1})
        tuner = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search(list(range(len(configs))))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=scratch, verbose=0),
        )
        grid = tuner.fit()
        ended = [grid[index] for index in range(len(grid))]
        results = {result.config["number"]: result.metrics for result in ended if result.config and result.metrics}
    assert len(results) == len(configs), "a plain trial failed"
    return [results[n]["mae"] for n in range(len(configs))], sum(found["seconds"] for found in results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--divisor", type=int, default=10, help="divisor of the stage lengths")
    parser.add_argument("--images", type=int, default=192)
    arguments = parser.parse_args()
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        folder, base = Path(scratch), base_config(arguments.divisor)
        (folder / "config.json").write_text(to_json(base))
        render(folder / "data", arguments.images)
        vary = vary_lengths(arguments.divisor)
        # No task is dropped: the weights are continuous.
        for name, item in default_space(base).dimensions.items():
            if isinstance(item, Range):
                vary.append(f"{name}=" + json.dumps({"low": item.low, "high": item.high, "log": True}))
        space = load_space(None, vary, base)
        full = search(folder, "full", vary, arguments.trials, "--prune", "False")
        pruned = search(folder, "pruned", vary, arguments.trials)
        idle = list(overheads(f"sqlite:///{folder}/mlflow.db", full).values())
        configs = {s.name: [space.configure(base, t.values) for t in s.trials] for s in (full, pruned)}
        data = str(folder / "data")
        plain_maes, parallel_s = plain(data, configs["full"], sequential=False)
        _, sequential_s = plain(data, configs["full"], sequential=True)
        _, pruned_parallel_s = plain(data, configs["pruned"], sequential=False)
        _, pruned_sequential_s = plain(data, configs["pruned"], sequential=True)
    same = plain_maes == [trial.mae for trial in full.trials]
    print(f"{arguments.trials} trials, worker-seconds; results {'equal to' if same else 'DIFFERENT from'} plain trials")
    print(f"  plain, sequential decoders  {sequential_s:8.0f}")
    print(f"  plain, parallel decoders    {parallel_s:8.0f}")
    print(f"  prefix caching              {full.spent:8.0f}")
    print(f"  sequential / cached {sequential_s / full.spent:.2f} (goal: at least 3.4)")
    print(f"  parallel / cached   {parallel_s / full.spent:.2f} (goal: at least 2.4)")
    print(f"  by its own record: speedup {full.speedup:.2f}")
    ratios = (pruned_sequential_s / pruned.spent, pruned_parallel_s / pruned.spent)
    print(f"  with pruning: {ratios[0]:.2f} and {ratios[1]:.2f} (goals: at least 6.5 and 5)")
    best = [study.best() for study in (full, pruned)]
    first = ", ".join(f"{seconds:.1f}" for seconds in idle[:3])
    print(f"  seconds of a trial outside its epochs: median {median(idle):.1f} (goal: at most 3), the first {first}")
    print("  best validation MAE: " + ", with pruning ".join(f"{trial.mae:.3f}" for trial in best if trial))


if __name__ == "__main__":
    main()
