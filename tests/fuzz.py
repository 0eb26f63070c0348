"""Read many damaged files of every kind that crowdray reads, in processes with limited memory and time.

    python -m tests.fuzz --mutations 200000

Prints how many cases were rejected with a message, and how many were read. A case that ends otherwise (an exception, a
wrong result, a signal, too much memory or time) is printed with its number and fails the command.
"""

import argparse
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from crowdray.errors import UserError

from .datasets.sources import conftest, test_fuzz
from .support.fuzz_targets import TARGETS, Files, Target
from .support.mutations import damage

MEMORY_BYTES = 8 * 2**30
"""Address space of a process, of which torch reserves some without using it."""
CASE_SECONDS = 30
CHUNK = 500
"""Cases of one process."""
SOURCE_SHARE = 4.0
"""Part of the mutations of each annotation format."""
FORK = multiprocessing.get_context("fork")


def source_target(name: str) -> Target:
    """A format of annotated images; the depth option is chosen by the damaged content."""

    def check(files: Files, folder: Path) -> None:
        depth = test_fuzz.DEPTHS[sum(map(len, files.values())) % len(test_fuzz.DEPTHS)]
        if not test_fuzz.check(name, files, depth):
            raise UserError("no item was read")

    return Target(test_fuzz.FORMATS[name].make, check, SOURCE_SHARE)


def read_cases(name: str, target: Target, files: Files, cases: range, results: Connection) -> None:
    """Send what happened in each case of a target."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="crowdray-fuzz-") as folder:
        for case in cases:
            signal.alarm(CASE_SECONDS)  # ends the process
            try:
                target.check(damage(name, files, case), Path(folder))
                outcome = "read"
            except UserError as error:
                outcome = "rejected" if str(error) else "rejected without a message"
            except BaseException:
                outcome = traceback.format_exc()
            results.send((case, outcome))
        signal.alarm(0)


def outcomes(name: str, target: Target, files: Files, cases: range) -> Iterator[tuple[int, str]]:
    """Yield the cases of a target with what happened, from processes that may crash."""
    while cases:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = FORK.Process(target=read_cases, args=(name, target, files, cases, sender))
        process.start()
        sender.close()
        try:
            while True:
                case, outcome = receiver.recv()
                cases = cases[1:]
                yield case, outcome
        except EOFError:
            process.join()
        if cases:
            yield cases[0], f"the process ended with {process.exitcode}"
            cases = cases[1:]


ALL_TARGETS = TARGETS | {name: source_target(name) for name in test_fuzz.FORMATS}


def fuzz(name: str, mutations: int) -> list[str]:
    """Print the outcome of a target's mutations, and return the failed cases."""
    started, target = time.monotonic(), ALL_TARGETS[name]
    failed, counted = [], {"rejected": 0, "read": 0}
    with tempfile.TemporaryDirectory(prefix="crowdray-fuzz-") as folder:
        files = target.make(Path(folder))
    for start in range(0, mutations, CHUNK):
        for case, outcome in outcomes(name, target, files, range(start, min(start + CHUNK, mutations))):
            if outcome in counted:
                counted[outcome] += 1
            else:
                failed.append(f"{name}, case {case}: {outcome}")
    seconds = time.monotonic() - started
    print(f"{name:<18} {mutations:7} mutations in {seconds:5.0f} s: {counted['rejected']} rejected, ", end="")
    print(f"{counted['read']} read, {len(failed)} failed", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=200_000, help="of all targets together")
    parser.add_argument("--targets", nargs="*", help="names of targets; all by default")
    parser.add_argument("--processes", type=int, default=2, help="targets at a time")
    arguments = parser.parse_args()
    for module, name, value in conftest.SMALL:
        setattr(module, name, value)
    names = arguments.targets or list(ALL_TARGETS)
    total = sum(ALL_TARGETS[name].share for name in names)
    # Forked, so that they read the small datasets; a process each, as torch cannot export in two threads.
    with ProcessPoolExecutor(arguments.processes, FORK) as pool:
        futures = [
            pool.submit(fuzz, name, round(arguments.mutations * ALL_TARGETS[name].share / total)) for name in names
        ]
        failed = [failure for future in futures for failure in future.result()]
    print(*failed[:50], sep="\n")
    print(f"{len(failed)} failed")
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main())
