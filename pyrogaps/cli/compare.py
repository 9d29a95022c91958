"""`pyrogaps compare RUN RUN ...`: saved ledgers side by side."""

from collections.abc import Callable

from pyrogaps.cli.arguments import read_arguments
from pyrogaps.cli.pictures import check_picture, write_picture
from pyrogaps.errors import InputError
from pyrogaps.gaps import Comparison, compare

FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": str,
    "markdown": Comparison.to_markdown,
    "latex": Comparison.to_latex,
}
OPTIONS = ("reference", "format", "picture")


def compare_runs(arguments: list[str]) -> None:
    """Print the comparison of the runs or ledger files named, and draw it where asked to."""
    paths, options = read_arguments("compare", arguments, OPTIONS)
    form = options.get("format", "text")
    if form not in FORMATS:
        raise InputError(f"--format: must be one of {', '.join(FORMATS)}, got '{form}'")
    if len(paths) < 2:
        raise InputError("compare: name two or more runs, by their folders or ledger files, such as runs/a runs/b")
    picture = check_picture(options.get("picture"))
    comparison = compare(*paths, reference=options.get("reference"))
    print(FORMATS[form](comparison))
    if picture is not None:
        from pyrogaps.plots import plot_comparison

        write_picture(picture, lambda figure: plot_comparison(comparison, figure), _size(comparison))


def _size(comparison: Comparison) -> tuple[float, float]:
    rows = int(comparison.differences.sizes["quantity"])
    return 7.5, (len(comparison.names) - 1) * (1.3 + 0.34 * rows)
