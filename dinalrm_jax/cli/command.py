"""How every command begins and ends: its flags, its help, its errors in one line, and its exit status."""

import logging
import pathlib
import sys
import threading
import warnings
from collections.abc import Callable
from typing import NoReturn, TypeVar

from absl import logging as absl_logging
from tqdm import tqdm

from dinalrm_jax.cli.flags import UsageError, asks_for_help, help_text, parse

T = TypeVar("T")


def answer_help(module: str, doc: str, options: type) -> None:
    """Answers `--help`, and refuses flags that cannot be, before a command's module imports what takes a second.

    Args:
        module: the caller's `__name__`; where it is imported and not run, nothing happens.
        doc: its docstring, the middle part of the help.
    """
    if module != "__main__":
        return
    if asks_for_help(sys.argv[1:]):
        print(help_text(f"python -m dinalrm_jax.{pathlib.Path(sys.argv[0]).stem}", doc, options))
        sys.exit(0)
    try:
        parse(options, sys.argv[1:])
    except UsageError as error:
        tell(f"error: {error}")
        sys.exit(2)


def run_command(
    main: Callable[[T], int | None],
    options: type[T],
    *,
    errors: tuple[type[Exception], ...],
    interrupted: str,
    leave: Callable[[int], NoReturn] = sys.exit,
) -> NoReturn:
    """Runs a command, of which `answer_help` has read the flags already, and ends the process.

    The exit status is what `main` returns, 2 after an error that is told in one line, 130 after Ctrl-C.

    Args:
        errors: those whose message says all; any other is a bug and keeps its traceback.
        interrupted: what Ctrl-C leaves behind, for people.
        leave: ends the process after an error; `processes.leave` for commands that run as several.
    """
    quieten_libraries()
    try:
        sys.exit(main(parse(options, sys.argv[1:])) or 0)
    except errors as error:
        tell(f"error: {error}")
        leave(2)
    except KeyboardInterrupt:
        tell(f"\ninterrupted; {interrupted}")
        leave(130)


def tell(text: str) -> None:
    """Writes to standard error on a line of its own, whatever progress bar stands there."""
    tqdm.write(text, file=sys.stderr)


class _OverBars(logging.Handler):
    """Log lines on lines of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def quieten_libraries() -> None:
    """Warnings of libraries, by `warnings` or by `logging`, as one line each that no progress bar runs into."""
    handler = _OverBars()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    absl_logging.set_verbosity(absl_logging.WARNING)

    def one_line(message, category, filename, lineno, file=None, line=None) -> None:
        tell(f"warning: {message}")

    warnings.showwarning = one_line


def quieten_writers() -> None:
    """Of what orbax and TensorBoard do in threads, failures are told once: in the main thread, which raises them too.

    (A full disk is a thousand lines otherwise; and orbax and tfds tell every file they touch.)
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What a failed save did not get to, which Python says when it clears up.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    threading.excepthook = lambda failure: None
    sys.unraisablehook = lambda failure: None
    told = sys.excepthook  # which tensorstore calls from threads of its own

    def of_the_main_thread(*failure):
        if threading.current_thread() is threading.main_thread():
            told(*failure)

    sys.excepthook = of_the_main_thread
