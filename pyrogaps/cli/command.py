"""The command `pyrogaps`: `eval`, which may be left out, and its smaller companions."""

import sys
from collections.abc import Callable

from pyrogaps.cli import main as evaluation
from pyrogaps.cli.compare import compare_runs
from pyrogaps.cli.console import say
from pyrogaps.cli.documents import shipped, title_of
from pyrogaps.cli.help import overview, section_text
from pyrogaps.cli.page import write_page
from pyrogaps.errors import InputError
from pyrogaps.version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code, see `pyrogaps.cli.main`."""
    first, *rest = given = list(sys.argv[1:] if arguments is None else arguments) or ["eval"]
    try:
        if first == "--version":
            _alone(first, rest)
            print(f"pyrogaps {__version__}")
            return 0
        if first in ("--help", "-h", "help"):
            print(overview() if not rest else section_text(*_one_section(rest)))
            return 0
        if first in COMMANDS:
            return _companion(first, rest)
    except InputError as error:
        say(f"pyrogaps: {error}")
        return 2
    # Everything else is a run: `pyrogaps eval mnist-ffg`, `pyrogaps mnist-ffg --seed 1`, `pyrogaps --seed 1`.
    given = rest if first == "eval" else given
    if asked := [place for place, word in enumerate(given) if word in ("--help", "-h")]:
        return main(["--help", *given[asked[0] + 1 :][:1]])
    return evaluation.main(given)


def _companion(name: str, rest: list[str]) -> int:
    if rest[:1] in (["--help"], ["-h"]):
        print(section_text(name))
        return 0
    COMMANDS[name](rest)
    return 0


def _list_recipes(rest: list[str]) -> None:
    """A line for each shipped recipe."""
    _alone("recipes", rest)
    width = max(map(len, shipped()))
    for name in shipped():
        print(f"{name:{width}}  {title_of(name)}")


# What is no run: a function of the arguments after the name. `help.section_text` describes each.
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "compare": compare_runs,
    "recipes": _list_recipes,
    "report": write_page,
}


def _alone(name: str, rest: list[str]) -> None:
    if rest:
        raise InputError(f"{name}: unexpected argument '{rest[0]}'. Leave it out")


def _one_section(rest: list[str]) -> list[str]:
    if len(rest) > 1:
        raise InputError(f"--help: one section at a time, got '{' '.join(rest)}'. Try pyrogaps --help {rest[0]}")
    return rest
