"""The command `python -m pyrogaps.eval [RECIPE] [options]`: its exit codes and what it says to bad input."""

import re
import sys

from pyrogaps import processes
from pyrogaps.cli.console import one_line_warnings, say
from pyrogaps.cli.options import help_text, parse
from pyrogaps.cli.recipe import resolve, written_out
from pyrogaps.cli.stages import run
from pyrogaps.errors import InputError
from pyrogaps.guard import described, is_out_of_memory


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for input that cannot be used, 130 when interrupted, 1 when other
    processes that shared the work are gone.
    """
    try:
        with processes.joined(), one_line_warnings():
            return _main(sys.argv[1:] if arguments is None else arguments)
    except processes.LostRankError as error:
        print(f"pyrogaps: {error}; run the same command again to continue", file=sys.stderr, flush=True)
        return 1


def _main(arguments: list[str]) -> int:
    options = None
    try:
        parsed = parse(arguments)
        if parsed is None:
            print(help_text())
            return 0
        document, options = parsed
        if options.print_config:
            print(written_out(document), end="")
            return 0
        processes.together(lambda: run(resolve(document), options))
    except InputError as error:
        say(f"pyrogaps: {' '.join(str(error).split())}")
        return 2
    except SystemExit as error:  # of a script, say, that reads its own command line when it is imported
        say(f"pyrogaps: code that the recipe names ended the program: {described(error)}. Keep it from calling exit")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        amount = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        say(
            f"pyrogaps: memory: there is too little{f' for {amount[1]} more' if amount else ''}. Lower batch_size, "
            "num_particles, refinement.num_particles, evidence.num_chains or evidence.num_temperatures"
        )
        return 2
    except KeyboardInterrupt:
        where = f"; run the same command again to continue from {options.out}" if options else ""
        say(f"\npyrogaps: interrupted{where}")
        return 130
    return 0
