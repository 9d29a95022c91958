"""Mathematics as MathML, which browsers draw themselves: the pages need no script and no network."""

import re
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

ElementTree.register_namespace("", "http://www.w3.org/1998/Math/MathML")
BAR = "\u203e"
# Commands that docutils lacks. Brackets stretch in MathML by themselves.
OTHERS = {
    r"\\[bB]ig+[lr]?(?![a-z])": "",
    r"\\dots\b": r"\\ldots",
    r"\\texttt\b": r"\\mathtt",
    r"\\tfrac(\d)(\d)": r"\\frac{\1}{\2}",
}


def setup(app: Sphinx) -> dict[str, bool]:
    """A renderer of that name for `html_math_renderer`."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(translator: Any, node: Any) -> None:
    translator.body.append(_converted(node, as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: Any) -> None:
    translator.body.append(f'<div class="math">{_converted(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def _converted(node: Any, as_block: bool) -> str:
    formula = node.astext()
    for other, known in OTHERS.items():
        formula = re.sub(other, known, formula)
    try:
        return under_braces(str(tex2mathml(formula, as_block=as_block)))
    except MathError as error:
        raise SphinxError(f"{node.source}: no MathML for the formula {formula}: {error}") from error


def under_braces(markup: str) -> str:
    r"""Put the text of `\underbrace{...}_{text}` below the brace, where docutils has it beside, as a subscript.

    Also draw bars over letters so that they can be seen.
    """
    math = ElementTree.fromstring(markup.replace("&ApplyFunction;", "\u2061").replace("\u02c9", BAR))
    for node in math.iter():
        first = node[0] if len(node) == 2 else None
        if node.tag.endswith("msub") and first is not None and first.tag.endswith("munder"):
            node.tag = first.tag
            first[1].set("stretchy", "true")
        elif node.tag.endswith("mover") and node[1].text == BAR:
            node.attrib.pop("accent")  # as an accent it would touch the letter
    return ElementTree.tostring(math, encoding="unicode")
