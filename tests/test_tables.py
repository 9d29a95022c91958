"""Tables of text in HTML, Markdown and LaTeX: everything escaped, warnings in every form."""

import math
import re
from xml.etree import ElementTree

import pytest

from pyrogaps.tables import Table, latex, number, with_error

NASTY = "<script>alert('&')</script> 50% a_b #1 $x ~ {y} \\z ^2 |w|"
TABLE = Table(
    "gaps & more",
    ["", "nats", "direction"],
    [
        [["log p(x)", "−17.46 ± 0.23", "lower bound of log p(x)"]],
        [
            ["inference gap", "0.89 ± 0.03", "L[q*_C] - L[q]"],
            ["├─ approximation gap", "0.31 ± 0.01", NASTY],
            ["│  └─ capacity gap", "−0.02", ""],
        ],
    ],
    [f"do not trust {NASTY}"],
    "A verdict.",
    [NASTY],
)


def text_of(html: str) -> str:
    return "".join(ElementTree.fromstring(html).itertext())


def test_html_is_well_formed_and_escaped() -> None:
    html = TABLE.html()
    root = ElementTree.fromstring(html)
    assert {element.tag for element in root.iter()} == {
        "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p", "strong", "details", "summary", "ul", "li",
    }  # fmt: skip
    assert text_of(html).count(NASTY) == 3
    assert [len(row) for row in root.iter("tr")] == [3] * 5
    assert text_of(html).count("Warning: do not trust") == 1


def test_html_takes_the_colours_of_the_page() -> None:
    html = TABLE.html()
    assert not re.search(r"color|background|<script|<style|onclick|url\(|http", html.replace(NASTY, ""))


def test_markdown_has_a_row_a_line_and_as_many_cells_everywhere() -> None:
    lines = TABLE.markdown().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2 + 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert rows[1] == "| --- | ---: | --- |"
    assert rows[4].startswith("| &emsp;approximation gap |") and rows[5].startswith("| &emsp;&emsp;capacity gap |")
    assert "<script>" not in TABLE.markdown() and "**Warning:** do not trust" in TABLE.markdown()


def test_latex_is_balanced_and_escaped() -> None:
    text = TABLE.latex(caption="Gaps of $q$", label="tab:gaps")
    assert [text.count(rf"\{word}") for word in ("toprule", "midrule", "bottomrule")] == [1, 2, 1]
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"\caption{Gaps of $q$}" in text and r"\label{tab:gaps}" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows if "multicolumn" not in row} == {2}
    assert r"$\log p(x)$ & $-$17.46 $\pm$ 0.23 & lower bound of $\log p(x)$ \\" in rows
    assert r"\quad \quad capacity gap & $-$0.02 &  \\" in rows
    assert r"50\% a\_b \#1 \$x \textasciitilde{} \{y\} \textbackslash{}z \textasciicircum{}2" in text
    assert r"\footnotesize Warning: do not trust" in text
    assert TABLE.latex().startswith(r"\begin{tabular}{lrl}")
    braces = re.sub(r"\\[{}]", "", text)
    assert braces.count("{") == braces.count("}")
    assert re.sub(r"\\\$", "", text).count("$") % 2 == 0


def test_quantities_are_mathematics() -> None:
    assert latex("L[q*_C] - L[q]") == r"$\mathcal{L}[q^*_C]$ - $\mathcal{L}[q]$"
    assert latex("log p(x) and IWAE-50[q]") == r"$\log p(x)$ and IWAE-50[q]"


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (0.894, 0.031, "0.89 ± 0.03"),
        (-17.456, 0.2, "−17.46 ± 0.20"),
        (0.12345, 0.004, "0.123 ± 0.004"),
        (0.12345, 0.0004, "0.1235 ± 0.0004"),
        (1.0, 1e-9, "1.00000 ± <0.00001"),
        (1.5, math.nan, "1.50"),
        (math.nan, math.nan, "-"),
        (-0.001, 0.02, "0.00 ± 0.02"),
        (-math.inf, math.nan, "−inf"),
        (1.0, 0.0, "1.00 ± 0.00"),
    ],
)
def test_means_have_the_decimals_of_their_errors(mean: float, error: float, text: str) -> None:
    assert with_error(mean, error) == text


def test_no_minus_before_nothing() -> None:
    assert number(-0.0004, 3) == "0.000" and number(-0.0005001, 3) == "−0.001" and number(-math.inf, 2) == "−inf"
