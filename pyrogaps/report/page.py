"""`GapLedger.report`: the interactive page of a ledger, in one HTML file."""

import base64
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bokeh
import jinja2
from bokeh.embed import json_item
from bokeh.resources import Resources

from pyrogaps.calibration import Calibration
from pyrogaps.density import Data
from pyrogaps.files import replacing, with_ending
from pyrogaps.gaps import GapLedger
from pyrogaps.gaps.table import heading_of
from pyrogaps.report.calibrated import calibration_of, ranks_figure
from pyrogaps.report.columns import flags_of, rows_of, table_of
from pyrogaps.report.figures import annealing_figure, numbered, refinement_figure, scatter_figure, tree_figure
from pyrogaps.report.pictures import pictures_of
from pyrogaps.report.sections import lines_on, provenance_of, summary_of, verdict_of

ASSETS = Path(__file__).parent / "assets"
OTHER_FORMS = ". For a picture, use pg.plot_gaps(ledger) and savefig of its figure; a browser prints the page to a PDF"
MAX_BYTES, MAX_PICTURES = 7_500_000, 3_000_000
TITLE = "Inference gaps"
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {scripts}; base-uri 'none'; "
    "form-action 'none'"
)


def write_report(
    ledger: GapLedger,
    path: str | os.PathLike[str],
    data: Data | None,
    calibration: Calibration | None,
    **words: str,
) -> Path:
    """Write the page of `ledger` to `path`, whole or not at all; `words` are `command` and `title` of `page_of`."""
    target = with_ending(path, (".html", ".htm"), remedy=OTHER_FORMS)
    page = page_of(ledger, data, calibration=calibration, **words).encode()
    with replacing(target, "report", ". Choose another path") as file:
        file.write(page)
    return target


def page_of(
    ledger: GapLedger,
    data: Data | None = None,
    *,
    calibration: Calibration | None = None,
    command: str = "",
    title: str = TITLE,
) -> str:
    """The page of a ledger as HTML; see `GapLedger.report`.

    Figures are by Bokeh: its script, which the page holds, has 1.3 MB, where that of plotly has 4.8 MB, and every run's
    folder holds a page. All text of the user's is escaped, by Jinja2 and by the page's script. A content security
    policy lists the page's own scripts by their hashes and forbids the browser to load anything or run anything else.
    """
    rows, number = rows_of(ledger), ledger.per_datapoint.sizes["datapoint"]
    made = {"tree": tree_figure(ledger), "scatter": scatter_figure(len(rows))}
    made |= {"refinement": refinement_figure(ledger), "annealing": annealing_figure(ledger)}
    made |= {"ranks": None if calibration is None else ranks_figure(calibration)}
    plots = {name: plot for name, plot in made.items() if plot is not None}
    blocks = {f"figure-{name}": numbered(json_item(plot, f"plot-{name}")) for name, plot in plots.items()}
    flags = flags_of(ledger)
    table = table_of(ledger, rows, flags)
    scripts = [*Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw, _asset("page.js")]
    texts = {"table-data": embedded(table), **{name: embedded(block) for name, block in blocks.items()}}
    left = MAX_BYTES - sum(len(text) for text in (*texts.values(), *scripts))
    pictures = pictures_of(ledger, data, rows, max(0, min(MAX_PICTURES, left)))
    texts["picture-data"] = embedded(pictures)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return _template().render(
        policy=POLICY.format(scripts=hashes),
        version=version("pyrogaps"),
        title=title,
        style=_asset("page.css"),
        heading=heading_of(ledger.provenance),
        verdict=verdict_of(ledger),
        figures={name: plot.height for name, plot in plots.items()},
        summary=summary_of(ledger),
        notes=lines_on(ledger),
        left_out="" if len(rows) == number else _left_out(len(rows), number),
        caption="Values of every datapoint, ± Monte Carlo standard error.",
        flags=[{**vars(flag), "count": int(flag.holds.sum())} for flag in flags],
        calibration=None if calibration is None else calibration_of(calibration),
        provenance=provenance_of(ledger),
        command=command,
        bokeh_version=bokeh.__version__,
        blocks=texts.items(),
        scripts=scripts,
    )


def embedded(value: Any) -> str:
    """JSON for a script element: nothing in it ends the element or opens another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _left_out(shown: int, number: int) -> str:
    return (
        f"The page has {shown:,} of {number:,} datapoints: those without finite bounds, and those with the largest "
        "inference gaps. Means are over all."
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("page.html"))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text("utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
