"""What the command tells its user on the error stream, line by line."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyrogaps import ranks


class _Said(logging.Handler):
    """Says what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"pyrogaps: {record.getMessage()}")


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Say what the library warns of and logs as everything else is said, without the line of code it comes from."""
    show, log, handler = warnings.showwarning, logging.getLogger("pyrogaps"), _Said()

    def said(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:  # of whichever process: others may not have met it
            print(f"pyrogaps: {message}", file=sys.stderr, flush=True)
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.showwarning = said
        log.setLevel(logging.INFO)
        log.addHandler(handler)
        try:
            yield
        finally:
            log.removeHandler(handler)


def say(line: str) -> None:
    """Tell the user, on the error stream; of several processes the first one speaks."""
    if ranks.is_reporting():
        print(line, file=sys.stderr, flush=True)
