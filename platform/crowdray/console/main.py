"""The `crowdray` command; the scripts in jobs/ call it with their own name as the first argument."""

import difflib
import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from crowdray import __version__
from crowdray.console import terminal
from crowdray.credentials import hide_credentials, redacted
from crowdray.errors import RESUME_HINT, JobFailed, UserError

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
"""Exit status of a job: done, failed, invalid input; 128 and its number after a signal."""

COMMANDS = {
    "convert": "convert a dataset into shards, or check its annotations",
    "train": "train a counter in three stages and register it",
    "tune": "search loss weights and stage lengths, and register the best counter",
    "ablate": "compare what the auxiliary tasks contribute, over seeds and with a placebo",
    "evaluate": "score a packaged counter on a split",
    "predict": "count the people in photos",
    "promote": "make the candidate of a registered model its champion, if it is better",
    "submit": "run one of these commands on a Ray cluster",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command named by the first argument, sys.argv by default, and exit with its status."""
    _require_dependencies()
    name, *rest = arguments or sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:<10}{summary}" for command, summary in COMMANDS.items()]
        more = "\nCOMMAND --help shows its common options and examples, COMMAND --help-all every option."
        print("usage: crowdray COMMAND [options]\n", *lines, more, sep="\n")
    elif name == "--version":
        print(f"crowdray {__version__}")
    elif name in COMMANDS:
        # Imported late: --help stays fast, and a signal meanwhile ends the job as any later one does.
        run_job(lambda rest: importlib.import_module(f"crowdray.console.commands.{name}").main(rest), rest)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1) or [", ".join(COMMANDS)]
        sys.exit(_print_error(f"unknown command {name!r}; use {close[0]}", EXIT_USAGE))


def _require_dependencies() -> None:
    """Start again in the checkout's .venv if this interpreter lacks the dependencies, as one outside of it does."""
    if importlib.util.find_spec("tyro"):
        return
    environment = Path(__file__).resolve().parents[3] / ".venv"
    python = str(environment / "bin" / "python")
    if os.access(python, os.X_OK) and Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [python, *sys.argv])
    sys.exit(_print_error(_missing("tyro"), EXIT_USAGE))


def _missing(package: str) -> str:
    return (
        f"the package {package} is not installed for {sys.executable}: run `make setup` in the checkout, and the job "
        "with .venv/bin/python"
    )


def run_job(job: Callable[[list[str]], None], arguments: Sequence[str]) -> None:
    """Call a job with its arguments; exit if it fails.

    UserError, JobFailed, Ctrl-C, SIGTERM and SIGHUP are printed as one message. Every other exception is a bug and
    keeps its traceback. Nothing that is printed contains the credentials of a URI.
    """
    if logging.lastResort:
        logging.lastResort.setFormatter(terminal.OneLineFormatter())
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # a damaged image is reported with its name and a fix
    warnings.filterwarnings("ignore", module=r"PIL\b")
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names in figures
    sys.excepthook = _print_traceback
    sys.path.append(os.getcwd())  # custom backbones are imported from here; Ray's workers search it too
    signals: list[int] = []
    try:
        with _signals_raise(signals):
            job([hide_credentials(argument) for argument in arguments])
    except UserError as error:
        sys.exit(_print_error(error, EXIT_USAGE))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "crowdray"):
            raise
        sys.exit(_print_error(_missing(package), EXIT_USAGE))
    except JobFailed as error:
        sys.exit(_print_error(error, EXIT_FAILED))
    except KeyboardInterrupt:
        reason = f"terminated by {signal.Signals(signals[0]).name}" if signals else "interrupted"
        sys.exit(_print_error(f"{reason}; {RESUME_HINT}", 128 + (signals or [signal.SIGINT])[0]))


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True)


@contextmanager
def _signals_raise(received: list[int]) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block at the first SIGTERM or SIGHUP, unless it is handled or ignored already.

    The number of the signal goes into a list: Ray replaces an exception that a handler raises during its calls.
    """

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the cleaning up
        received.append(number)
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if in_main and not signal.getsignal(number)]
    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _print_error(message: object, status: int) -> int:
    print(terminal.message(f"error: {message}"), file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
