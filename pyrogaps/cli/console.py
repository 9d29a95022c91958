"""Messages of the command on stderr, one line each."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyrogaps import processes


class _StderrHandler(logging.Handler):
    """Prints log records on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"pyrogaps: {record.getMessage()}")


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print warnings and log records in one line, without the line of code that they come from."""
    show, log, handler = warnings.showwarning, logging.getLogger("pyrogaps"), _StderrHandler()

    def show_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:  # from any process: the first may not have raised it
            print(f"pyrogaps: {message}", file=sys.stderr, flush=True)
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show_line
        log.setLevel(logging.INFO)
        log.addHandler(handler)
        try:
            yield
        finally:
            log.removeHandler(handler)


def shows_bars() -> bool:
    """Whether progress bars can be seen: in a log, whole lines are all there is room for."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def say(line: str) -> None:
    """Print a line on stderr, from the first process only."""
    if processes.is_reporting():
        print(line, file=sys.stderr, flush=True)
