"""`pyrogaps report RUN`: the interactive page of a saved ledger."""

import shlex
from pathlib import Path

from pyrogaps.cli.arguments import read_arguments
from pyrogaps.cli.run_folder import LEDGER
from pyrogaps.errors import InputError
from pyrogaps.files import with_ending
from pyrogaps.gaps import GapLedger


def write_page(arguments: list[str]) -> None:
    """Write the page of the run or ledger file named, and print where."""
    paths, options = read_arguments("report", arguments, ("out", "title"))
    if len(paths) != 1:
        raise InputError("report: name one run, by its folder or ledger file, such as runs/digits")
    path = Path(paths[0])
    source = path / LEDGER if path.is_dir() else path
    name = source.resolve().parent.name if source.name == LEDGER else source.stem
    target = with_ending(options.get("out", f"{name}.html"), (".html", ".htm"), "--out")
    title = options.get("title", f"Inference gaps of {name}")
    command = shlex.join(["pyrogaps", "report", *arguments])
    print(GapLedger.load(source).report(target, title=title, command=command))
