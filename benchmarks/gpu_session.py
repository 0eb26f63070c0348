"""Training runs and measurements of a short GPU session, several at a time, each result stored as it comes.

Groups, in the order of --only: the tests of tests/gpu; the throughput of benchmarks/gpu.py; csrnet, lite0 and lite2
compare the density loss alone with local counts; arms compares none, all and placebo at 10% and 100% of the labels.
Every run is validated on the same images; the test split is not read. The same command again continues with the
entries that have no result for the present code, configuration and data; --table prints the results so far.

    .venv/bin/python benchmarks/gpu_session.py --minutes 12 --data data/shb --weights vgg16.pth
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from filelock import Timeout
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]
from benchmarks.support.session import RESULT_LINE, RESULTS_FILE, Entry, Record, Session, end_with_session, read_records

from crowdray.ablation.arms import ALL, NONE, PLACEBO, parse_arms
from crowdray.ablation.protocol import Cell, cell_config, with_annealed_end
from crowdray.ablation.summary import count_errors
from crowdray.config import Config, StageConfig, StagesConfig
from crowdray.data.shards import Dataset
from crowdray.data.splits import draw_subset, split_rows
from crowdray.documents import parse_as
from crowdray.evaluation.comparison import compare_errors, summarise_errors
from crowdray.evaluation.metrics import Metrics, summarise
from crowdray.models.pretrained import pin_weights
from crowdray.presets import preset
from crowdray.registry.provenance import git_revision
from crowdray.stage_cache.keys import code_digest, numerics_facts, stage_keys
from crowdray.training.distributed import World, pick_device
from crowdray.training.stages import build_stages
from crowdray.training.trainer import Trainer

PRESETS = {"csrnet": "shb-csrnet", "lite0": "lite0", "lite2": "lite0", "arms": "shb-csrnet"}
"""Preset of each group of training runs."""
GUESSED_EPOCH_S = {"csrnet": 4.0, "lite0": 6.0, "lite2": 8.0, "arms-10%": 0.8, "arms-100%": 4.0}
"""Guessed seconds of an epoch with other runs on the same GPU, until a run of the kind has finished."""
START_S = 20.0
"""Guessed seconds before the first epoch and after the last one."""
FRACTIONS = (0.1, 1.0)
LOCAL_COUNTS = (0.0, 0.1)
"""Values of loss.local_counts that are compared; the first is the reference."""
VALIDATION_SEED = 0
"""Seed of the validation images, whatever the seed of a run."""


@dataclass(frozen=True)
class Script:
    """A measurement that is a program of its own."""

    arguments: tuple[str, ...]
    """Arguments of Python."""
    sources: tuple[str, ...]
    """Patterns of the files that decide its result, besides the package."""
    guess_s: float
    """Expected seconds."""


_THROUGHPUT = ("--batch", "8", "128", "256", "--compile", "no", "yes", "--gpu-cache-gib", "0", "4")
SCRIPTS = {
    "tests": Script(("-m", "pytest", "-q", str(ROOT / "tests/gpu")), ("tests/conftest.py", "tests/gpu/*.py"), 120),
    "throughput": Script(
        (str(ROOT / "benchmarks/gpu.py"), *_THROUGHPUT),
        ("benchmarks/gpu.py", "benchmarks/reading.py", "benchmarks/peers/*.py"),
        360,
    ),
}
"""Groups of a single entry, which runs alone and needs a GPU."""


@dataclass(frozen=True)
class Run:
    """A training run, and what it is compared with."""

    group: str
    change: str
    config: Config
    reference: Config
    """Configuration of the reference of its group."""

    @property
    def name(self) -> str:
        return f"{self.group}-{self.change}-seed{self.config.seed}"


@dataclass(frozen=True)
class RunResult:
    """Result of a training run."""

    group: str
    change: str
    seed: int
    experiment: str
    """Key of the reference: runs in which it is equal are compared."""
    is_reference: bool
    updates: int
    epochs: int
    epoch_s: float
    """Mean seconds of an epoch, with its validation."""
    memory_gib: float
    """Peak memory: of the GPU as torch allocated it, or of the process on a CPU."""
    validation: Metrics
    errors: list[float]
    """Predicted minus true count of each validation image, in the dataset's order."""


def base_config(name: str, options: argparse.Namespace) -> Config:
    """The configuration that the runs of a group have in common."""
    config = preset(options.preset or PRESETS[name])
    if not options.preset and config.model.backbone == "csrnet":
        # As on the H200 of the lab notes: half of the preset's updates at twice its rate, in half of the time.
        baseline = replace(config.stages.baseline, learning_rate=2 * config.stages.baseline.learning_rate)
        config = replace(
            config,
            sampling=replace(config.sampling, batch=16),
            model=replace(config.model, weights=options.weights),
            stages=replace(config.stages, baseline=baseline),
        )
    if not options.preset and name == "lite2":
        config = replace(config, model=replace(config.model, backbone=name))
    config = replace(config, numerics=replace(config.numerics, threads=options.threads))
    return pin_weights(config) if options.weights and config.model.weights == options.weights else config


def loss_runs(name: str, options: argparse.Namespace) -> Iterator[Run]:
    """Runs of one annealed stage, as long as the stages of the preset together, without auxiliary tasks."""
    base = base_config(name, options)
    epochs = options.epochs or sum(stage.epochs for stage in vars(base.stages).values())
    rate = base.stages.baseline.learning_rate
    omitted = StageConfig(0, rate)
    stages = StagesConfig(StageConfig(epochs, rate, anneal_epochs=-(-epochs // 3)), omitted, omitted)
    loss = replace(base.loss, segmentation=0.0, depth=0.0, count=0.0)
    configs = [replace(base, stages=stages, loss=replace(loss, local_counts=weight)) for weight in LOCAL_COUNTS]
    for seed, config in product(options.seeds, configs):
        weight = config.loss.local_counts
        change = f"local-counts-{weight:g}" if weight else "density"
        yield Run(name, change, replace(config, seed=seed), configs[0])


def arm_runs(options: argparse.Namespace, dataset: Dataset) -> Iterator[Run]:
    """Cells of an ablation with an annealed joint stage; depth only for a dataset that has some."""
    base = with_annealed_end(base_config("arms", options))
    if dataset.index.depth_teacher == "none":
        base = replace(base, loss=replace(base.loss, depth=0.0))
    arms, images = parse_arms((NONE, ALL, PLACEBO), (), base.loss), len(fixed_rows(base, dataset)[0])
    for seed, fraction, arm in product(options.seeds, FRACTIONS, arms):
        config, reference = (
            cell_config(base, Cell(one, fraction, base.model.backbone, seed), images) for one in (arm, arms[0])
        )
        yield Run(f"arms-{fraction:.0%}", arm.name, config, reference)


def fixed_rows(config: Config, dataset: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation rows: those of one split, the training rows a subset drawn with the run's seed."""
    whole = replace(config, seed=VALIDATION_SEED, sampling=replace(config.sampling, images=0))
    training, validation = split_rows(whole, dataset, 1)
    images = config.sampling.images
    return draw_subset(training, images, config.seed) if images else training, validation


def run_key(config: Config, dataset: Dataset, device: torch.device) -> str:
    """The key of a run's last stage, which is annealed: its length is part of it."""
    facts = {**numerics_facts(config, device, config.numerics.threads), "validation_seed": VALIDATION_SEED}
    return stage_keys(config, dataset.digest, 1, facts)[-1].key


def train(run: Run, dataset: Dataset, device: torch.device) -> RunResult:
    """Train a run in this process; prints the metrics of each epoch."""
    torch.set_num_threads(run.config.numerics.threads)
    rows = fixed_rows(run.config, dataset)
    trainer = Trainer(run.config, dataset, world=World(), device=device, rows=rows)
    trainer.fit(lambda metrics, _: print(json.dumps(metrics), flush=True))
    counts = trainer.evaluate(trainer.stages[-1].name, trainer.validation_rows)
    history = trainer.state.progress.history
    return RunResult(
        group=run.group,
        change=run.change,
        seed=run.config.seed,
        experiment=run_key(replace(run.reference, seed=0), dataset, device),
        is_reference=replace(run.config, seed=0) == replace(run.reference, seed=0),
        updates=trainer.state.progress.updates,
        epochs=len(history),
        epoch_s=fmean(float(epoch["seconds"]) for epoch in history),
        memory_gib=max(float(epoch["memory_gib"]) for epoch in history),
        validation=summarise(counts),
        errors=count_errors(counts).tolist(),
    )


def plan(
    options: argparse.Namespace, arguments: Sequence[str], dataset: Dataset, device: torch.device
) -> tuple[list[Entry], dict[str, Run]]:
    """Entries in the order of --only, and the training runs among them by name."""
    entries, runs = [], dict[str, Run]()
    for group in options.only:
        if group not in SCRIPTS:
            for run in arm_runs(options, dataset) if group == "arms" else loss_runs(group, options):
                runs[run.name] = run
                epochs = sum(stage.schedule.epochs for stage in build_stages(run.config))
                key, guess_s = run_key(run.config, dataset, device), START_S + epochs * GUESSED_EPOCH_S[run.group]
                kind = f"{run.group}, {epochs} epochs"
                entries.append(Entry(run.name, kind, key, guess_s, child_command(arguments, run.name)))
        elif device.type == "cuda":
            key, guess_s = script_key(SCRIPTS[group], dataset, device), SCRIPTS[group].guess_s
            entries.append(Entry(group, group, key, guess_s, child_command(arguments, group), exclusive=True))
    return entries, runs


def script_key(script: Script, dataset: Dataset, device: torch.device) -> str:
    """The key of a script: its arguments and code, the package, the dataset and the machine."""
    code = [file.read_text() for pattern in script.sources for file in sorted(ROOT.glob(pattern))]
    facts = numerics_facts(preset("debug"), device, 0)
    return hashlib.sha256(
        json.dumps([code_digest(), dataset.digest, facts, script.arguments, code]).encode()
    ).hexdigest()


def child_command(arguments: Sequence[str], name: str) -> tuple[str, ...]:
    """Command of an entry's process."""
    return (sys.executable, str(Path(__file__).resolve()), *arguments, "--entry", name)


def run_entry(name: str, data: str, runs: Mapping[str, Run], dataset: Dataset, device: torch.device) -> int:
    """Run an entry in this process, which the session has started."""
    end_with_session()
    if name in SCRIPTS:
        extra = ("--data", data) if name == "throughput" else ()
        command = [sys.executable, *SCRIPTS[name].arguments, *extra]
        return subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    print(RESULT_LINE + json.dumps(asdict(train(runs[name], dataset, device))), flush=True)
    return 0


def table(records: Sequence[Record]) -> Iterator[str]:
    """Lines of a table: errors of each change over its seeds, its gain over the reference, and other entries."""
    experiments: dict[str, dict[str, dict[int, tuple[Record, RunResult]]]] = {}
    latest: dict[str, Record] = {}
    for record in records:
        if "experiment" in record.result:
            result = parse_as(RunResult, record.result)
            changes = experiments.setdefault(result.experiment, {})
            changes.setdefault(result.change, {})[result.seed] = record, result
            latest.pop(record.entry, None)
        else:
            latest[record.entry] = record
    yield "validation errors with 95% intervals over seeds and images; gain: MAE of the reference less that of a change"
    for changes in experiments.values():
        found = [by_seed for by_seed in changes.values() if next(iter(by_seed.values()))[1].is_reference]
        for by_seed in changes.values():
            yield from _change_lines(by_seed, found[0] if found and found[0] is not by_seed else {})
    for record in latest.values():
        last = record.result.get("output", "").rpartition("\n")[2]
        yield f"{record.entry} ({_short(record.revision)}): {record.status} {record.message}{last}"


def _short(revision: str) -> str:
    return revision[:7] + revision[40:]


def _change_lines(
    by_seed: Mapping[int, tuple[Record, RunResult]], reference: Mapping[int, tuple[Record, RunResult]]
) -> Iterator[str]:
    """Lines of one change: its errors and costs, and its gain over the seeds that the reference has too."""
    records, results = zip(*by_seed.values(), strict=True)
    errors = summarise_errors([result.errors for result in results])
    seeds = ",".join(map(str, sorted(by_seed)))
    interval, bias = errors.mae_interval, errors.bias_interval
    yield (
        f"{results[0].group} {results[0].change} ({_short(records[-1].revision)}), seeds {seeds}: "
        f"MAE {errors.mae:.2f} ({interval.low:.2f} to {interval.high:.2f}), RMSE {errors.rmse:.2f}, "
        f"bias {errors.bias:+.2f} ({bias.low:+.2f} to {bias.high:+.2f}); {results[0].updates:,} updates, "
        f"{fmean(record.seconds for record in records):.0f} s, "
        f"{fmean(result.epoch_s for result in results):.2f} s an epoch, "
        f"{max(result.memory_gib for result in results):.1f} GiB, {records[-1].processes} at a time"
    )
    if both := [seed for seed in by_seed if seed in reference]:
        first, second = ([side[seed][1].errors for seed in both] for side in (reference, by_seed))
        gain = compare_errors(first, second)
        p_value = "" if gain.p_value is None else f", p = {gain.p_value:.2g}"
        name = next(iter(reference.values()))[1].change
        yield (
            f"  gain over {name}, {len(both)} seeds in pairs: {gain.gain:+.2f} "
            f"({gain.interval.low:+.2f} to {gain.interval.high:+.2f}){p_value}"
        )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--data", default="data/shb", help="a converted dataset")
    parser.add_argument("--results", type=Path, default=Path("runs/gpu-session"), help="folder of results and logs")
    parser.add_argument("--table", action="store_true", help="print the results so far, run nothing")
    groups = (*SCRIPTS, *PRESETS)
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, help="groups, the most important first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--processes", type=int, default=4, help="training runs at the same time")
    parser.add_argument("--threads", type=int, help="CPU threads of each; the cores divided by --processes by default")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--weights", default="", help="VGG-16's ImageNet weights for CSRNet; random by default")
    parser.add_argument("--preset", help="instead of the preset of each group, to try the command")
    parser.add_argument("--epochs", type=int, help="of the runs that compare losses; the preset's by default")
    parser.add_argument("--entry", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.processes)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    results = options.results / RESULTS_FILE
    if options.table:
        print(*table(read_records(results)), sep="\n")
        return 0
    if options.device == "gpu" and not torch.cuda.is_available():
        print("torch finds no GPU; --device cpu trains on a CPU")
        return 0
    device = pick_device() if options.device == "gpu" else torch.device("cpu")
    dataset = Dataset.open(options.data)
    entries, runs = plan(options, arguments, dataset, device)
    if options.entry:
        return run_entry(options.entry, options.data, runs, dataset, device)
    session = Session(
        entries,
        options.results,
        processes=options.processes,
        threads=options.threads,
        deadline=started + 60 * options.minutes,
        revision=git_revision(ROOT),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: session.stop())
    try:
        session.run()
    except Timeout:
        print(f"another session writes to {options.results}; give another --results", file=sys.stderr)
        return 2
    print(*table(read_records(results)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
