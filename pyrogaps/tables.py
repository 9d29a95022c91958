"""`Table`: a table of text, as text, HTML, Markdown and LaTeX; `Frame`: a pandas frame that prints in full."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

BRANCHES = "│├└─ "  # what trees of labels are drawn with
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "−": r"$-$", "·": r"$\cdot$", "…": r"\dots{}", "×": r"$\times$", "|": r"\textbar{}",
}  # fmt: skip
# Quantities in running text, the longest first.
SYMBOLS = {
    "L[q_phi-hat]": r"$\mathcal{L}[q_{\hat\phi}]$",
    "L[q*_C]": r"$\mathcal{L}[q^*_C]$",
    "L[q_phi]": r"$\mathcal{L}[q_\phi]$",
    "L[q*]": r"$\mathcal{L}[q^*]$",
    "L[q]": r"$\mathcal{L}[q]$",
    "log p(x|theta)": r"$\log p(x \mid \theta)$",
    "log p(x, z)": r"$\log p(x, z)$",
    "log p(x)": r"$\log p(x)$",
    "q*_C": "$q^*_C$",
    "k-hat": r"$\hat{k}$",
}
SYMBOL = re.compile("|".join(map(re.escape, SYMBOLS)))
CELL, EDGE = "padding:0.2em 0.8em", "border-top:1px solid"
MAX_DECIMALS = 5
WHOLE = ("display.max_columns", None, "display.max_colwidth", None, "display.expand_frame_repr", False)


@dataclass(frozen=True, repr=False)
class Table:
    """A table of text; the first column has the names of the rows.

    Attributes:
        title: what the numbers are, with their units.
        headings: of all columns, that of the names included; none, where every group has its own.
        groups: rows of cells, in groups that a line divides.
        warnings: reasons not to trust the numbers; every form shows them.
        lead: a line of conclusion below the table; empty for none.
        notes: what the numbers rest on; HTML folds them. LaTeX leaves them out.
        lines: what is shown open below the conclusion. LaTeX leaves them out.
        legend: what the columns are, in a line that every form shows; empty for none.
    """

    title: str
    headings: Sequence[str]
    groups: Sequence[Sequence[Sequence[str]]]
    warnings: Sequence[str] = ()
    lead: str = ""
    notes: Sequence[str] = ()
    lines: Sequence[str] = ()
    legend: str = ""

    def __str__(self) -> str:
        if self.headings:
            text = [place for place in range(self._width) if not self._has_numbers(place)]
            head, *rows = aligned([self.headings, *self._rows()], text)
            left = iter(rows)
            printed = [[next(left) for _ in group] for group in self.groups]
            printed[0] = [head, *printed[0]]
        else:  # every group by itself, beside the names of all
            width, text = max(len(name) for name, *_ in self._rows()), [*range(self._width)]
            printed = [aligned([[f"{name:{width}}", *cells] for name, *cells in group], text) for group in self.groups]
        above = [line for group in printed for line in ("", *group)]
        below = [self.legend] * bool(self.legend) + [f"Warning: {text}" for text in self.warnings]
        below += [f"Verdict: {self.lead}"] * bool(self.lead) + [*self.lines, *self.notes]
        return "\n".join([self.title, *above, *([""] if below else []), *below])

    __repr__ = __str__

    def html(self) -> str:
        """As an HTML fragment: everything escaped, no script, colours those of the page around it."""
        aligned = ["left", *("right" if self._is_numeric(place) else "left" for place in range(1, self._width))]
        styles = [f"{CELL};text-align:{side};font-variant-numeric:tabular-nums" for side in aligned]
        head = "".join(
            f'<th scope="col" style="{style}">{escape(text)}</th>'
            for text, style in zip(self.headings, styles, strict=bool(self.headings))
        )
        head = f"<thead><tr>{head}</tr></thead>" if head else ""
        body = []
        for group in self.groups:
            for place, (name, *cells) in enumerate(group):
                edge = f' style="{EDGE}"' if place == 0 else ""
                row = f'<th scope="row" style="{styles[0]};font-weight:normal;white-space:pre">{escape(name)}</th>'
                row += "".join(
                    f'<td style="{style}">{escape(cell)}</td>' for cell, style in zip(cells, styles[1:], strict=True)
                )
                body.append(f"<tr{edge}>{row}</tr>")
        caption = f'<caption style="text-align:left;caption-side:top">{escape(self.title)}</caption>'
        table = f'<table style="border-collapse:collapse">{caption}{head}<tbody>{"".join(body)}</tbody></table>'
        legend = f"<p>{escape(self.legend)}</p>" if self.legend else ""
        below = html_lines(self.warnings, self.lead, self.notes, self.lines)
        return f'<div class="pyrogaps">{table}{legend}{below}</div>'

    _repr_html_ = html

    def markdown(self) -> str:
        """As Markdown, with pipes."""
        sides = ["---", *("---:" if self._is_numeric(place) else "---" for place in range(1, self._width))]
        rows = [[*map(_markdown, self.headings or [""] * self._width)], sides]
        for name, *cells in self._rows():
            depth, bare = _depth(name)
            rows.append(["&emsp;" * depth + _markdown(bare), *map(_markdown, cells)])
        below = [_markdown(self.legend)] * bool(self.legend)
        below += [f"**Warning:** {_markdown(line)}" for line in self.warnings]
        below += [_markdown(line) for line in (self.lead, *self.lines, *self.notes) if line]
        lines = [_markdown(self.title), "", *("| " + " | ".join(row) + " |" for row in rows)]
        for line in below:
            lines += ["", line]
        return "\n".join(lines) + "\n"

    def latex(self, caption: str | None = None, label: str | None = None) -> str:
        """As a `tabular` of the package booktabs; with a caption or a label, in a `table` around it."""
        numbers = "".join("r" if self._is_numeric(place) else "l" for place in range(1, self._width))
        lines = [rf"\begin{{tabular}}{{l{numbers}}}", r"\toprule"]
        lines += [_row(map(latex, self.headings))] * bool(self.headings)
        for place, group in enumerate(self.groups):
            lines += [r"\midrule"] * bool(self.headings or place)
            for name, *cells in group:
                depth, bare = _depth(name)
                lines.append(_row([r"\quad " * depth + latex(bare), *map(latex, cells)]))
        lines.append(r"\bottomrule")
        for line in [self.legend] * bool(self.legend) + [f"Warning: {warning}" for warning in self.warnings]:
            text = rf"\footnotesize {latex(line)}"
            lines.append(rf"\multicolumn{{{self._width}}}{{p{{0.9\linewidth}}}}{{{text}}} \\")
        lines.append(r"\end{tabular}")
        if caption is not None or label is not None:
            above = [rf"\caption{{{caption}}}"] * (caption is not None) + [rf"\label{{{label}}}"] * (label is not None)
            lines = [r"\begin{table}", r"\centering", *above, *lines, r"\end{table}"]
        return "\n".join(lines) + "\n"

    def _rows(self) -> Iterator[Sequence[str]]:
        for group in self.groups:
            yield from group

    @property
    def _width(self) -> int:
        """The number of columns."""
        return len(self.headings or next(self._rows()))

    def _is_numeric(self, place: int) -> bool:
        """Whether a column has numbers, and nothing else."""
        return self._has_numbers(place) and all(not cell or _is_number(cell) for cell in self._column(place))

    def _has_numbers(self, place: int) -> bool:
        return any(_is_number(cell) for cell in self._column(place))

    def _column(self, place: int) -> list[str]:
        return [row[place] for row in self._rows()]


class Frame(pd.DataFrame):
    """A pandas frame that prints all columns and texts in full, however wide a row becomes."""

    @property
    def _constructor(self) -> Any:
        return Frame

    def __repr__(self) -> str:
        with pd.option_context(*WHOLE):
            return super().__repr__()

    def _repr_html_(self) -> str | None:
        with pd.option_context(*WHOLE):
            return super()._repr_html_()  # type: ignore[misc,no-any-return]


def aligned(rows: Sequence[Sequence[str]], left: Iterable[int] = ()) -> list[str]:
    """Rows of cells as lines of text, columns aligned: the first, the last and those `left` to the left, the others to
    the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_left = {0, len(widths) - 1, *left}
    return [
        "  ".join(
            f"{cell:{width}}" if place in to_left else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def html_lines(warnings: Sequence[str], lead: str, notes: Sequence[str], lines: Sequence[str] = ()) -> str:
    """Paragraphs of HTML: warnings, a conclusion, further lines, and notes that unfold."""
    parts = [f'<p role="alert"><strong>Warning:</strong> {escape(line)}</p>' for line in warnings]
    parts += [f"<p><strong>{escape(lead)}</strong></p>"] * bool(lead)
    parts += [f"<p>{escape(line)}</p>" for line in lines]
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f"<details><summary>Notes ({len(notes)})</summary><ul>{items}</ul></details>")
    return "".join(parts)


def sentence(text: str) -> str:
    """A line as a sentence: a capital where it begins with a word, and a full stop."""
    first = text.split(" ", 1)[0]
    text = text[:1].upper() + text[1:] if first.removesuffix(":").isalpha() and first != "log" else text
    return text if text.endswith((".", "!", "?")) else f"{text}."


def latex(text: str) -> str:
    """Text with the quantities of this library as mathematics, and all else escaped."""
    parts, place = [], 0
    for match in SYMBOL.finditer(text):
        parts += [_escaped(text[place : match.start()]), SYMBOLS[match[0]]]
        place = match.end()
    return "".join([*parts, _escaped(text[place:])])


def with_error(mean: float, error: float) -> str:
    """`1.34 ± 0.05`: two decimals, or as many as one digit of the error needs; the mean alone without an error."""
    decimals = 2
    if math.isfinite(error) and 0 < error < 0.01:
        decimals = min(MAX_DECIMALS, math.ceil(-math.log10(error)))
    text = number(mean, decimals)
    if not math.isfinite(error) or math.isnan(mean):
        return text
    smallest = 10.0**-MAX_DECIMALS
    return f"{text} ± <{smallest:.{MAX_DECIMALS}f}" if 0 < error < smallest / 2 else f"{text} ± {error:.{decimals}f}"


def number(value: float, decimals: int) -> str:
    """A number with a proper minus sign; "-" for NaN."""
    text = "-" if math.isnan(value) else f"{value:.{decimals}f}".replace("-", "−")
    return text[1:] if text.startswith("−") and not text.strip("−0.") else text


def _is_number(cell: str) -> bool:
    return cell.strip()[:1] in {*"-−0123456789["}


def _depth(name: str) -> tuple[int, str]:
    """How deep in a drawn tree the name of a row stands, and the name alone."""
    bare = name.lstrip(BRANCHES)
    return (len(name) - len(bare)) // 3, bare


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _markdown(text: str) -> str:
    """Text that Markdown prints as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
