"""The documentation: its links lead somewhere, and what it quotes and lists is there."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.pages import DOCS, ROOT, SOURCES, blocks, name_of


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    install = "python3 -m venv .venv && .venv/bin/pip install -e"
    assert f"{install} . && .venv/bin/python -m pyrogaps.eval\n" in text
    assert f"{install} '.[test]' && .venv/bin/python -m pytest\n" in text


def listed() -> set[str]:
    """Full names in the reference."""
    names = set()
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)", page.read_text("utf-8"), re.MULTILINE):
            names.add(name if name.startswith("pyrogaps.") else f"pyrogaps.{name}")
    return names


def test_every_public_name_stands_in_the_reference() -> None:
    assert {f"pyrogaps.{name}" for name in pg.__all__} - listed() == set()
    for name in listed():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_terms_are_listed() -> None:
    page = (DOCS / "reference/ledger.md").read_text("utf-8")
    assert {*re.findall(r"``(\w+_gap)``", page)} == {term.id for term in pg.TERMS}


def test_every_field_of_the_provenance_is_described() -> None:
    page = (DOCS / "reference/ledger.md").read_text("utf-8").partition("## Provenance")[2]
    fields = {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    model, x = LinearGaussian.random(4, 2), torch.randn(3, 4)
    options: dict[str, Any] = {"refinement": pg.Refinement(num_steps=2), "num_particles": 20, "progress": False}
    ledger = pg.decompose(model, AmortizedNormal(4, 2, (8,)), x, evidence=pg.AIS(2, 2), **options)
    known = {*ledger.provenance, *ledger.sel([0]).provenance}
    assert known - fields == set()
    assert fields - known == {"split", "shared", "infinite"}  # where there are any


def test_a_plot_returns_what_it_draws_in() -> None:
    """So that `.figure` leads from all of them to the figure."""
    functions = [getattr(pg, name) for name in pg.__all__ if name.startswith("plot_")]
    assert len(functions) == 8
    for function in functions:
        parameters = inspect.signature(function).parameters
        (place,) = {"ax", "figure"} & {*parameters}
        assert parameters[place].default is None
        returned = {"ax": Axes, "figure": FigureBase}[place]
        assert inspect.get_annotations(inspect.unwrap(function), eval_str=True)["return"] is returned
    assert Figure().figure.savefig and Figure().add_subplot().figure.savefig


def test_the_entry_for_citing_is_that_of_the_citation_file() -> None:
    file = (ROOT / "CITATION.cff").read_text("utf-8")
    (version,) = re.findall(r"^version: (\S+)$", file, re.MULTILINE)
    (title,) = re.findall(r'^title: "(.+)"$', file, re.MULTILINE)
    entry = blocks(DOCS / "citing.md", "bibtex")[0]
    assert f"version = {{{version}}}" in entry and version == pg.__version__
    assert f"title   = {{{title}}}" in entry.replace("{Pyro}", "Pyro")


def test_every_guide_and_model_of_a_recipe_stands_in_the_reference() -> None:
    named = set()
    for recipe in (ROOT / "pyrogaps/recipes").glob("*.yaml"):
        named |= {*re.findall(r"pyrogaps\.(?:guides|models|datasets)\.[\w.]+\w", recipe.read_text("utf-8"))}
    assert len(named) > 15
    assert named - listed() == set()


LINK = re.compile(r"\]\(([^()\s]+)\)")


def texts() -> Iterator[tuple[Path, str]]:
    yield from ((page, page.read_text("utf-8")) for page in SOURCES)
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        yield notebook, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(page: Path) -> set[str]:
    """Those that GitHub and the site give to headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def test_links_lead_somewhere() -> None:
    wrong = []
    for page, text in texts():
        for target in LINK.findall(re.sub(r"```.*?```|\$[^$]+\$", "", text, flags=re.DOTALL)):
            path, _, anchor = target.partition("#")
            if re.match(r"\w+:", target):
                continue
            place = (page.parent / path).resolve() if path else page
            if not place.exists():
                wrong.append(f"{name_of(page)}: {target}")
            elif anchor and place.suffix == ".md" and anchor not in anchors(place):
                wrong.append(f"{name_of(page)}: {target} (no such heading)")
    assert not wrong, "\n".join(wrong)


def templates() -> list[str]:
    """Texts of the library with a NUL in place of what is filled in."""
    found = []
    for file in (ROOT / "pyrogaps").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_are_those_of_the_code() -> None:
    """Each between its ellipses, in this order, in one text of the code or in several that are put together."""
    known = templates()
    whole, quoted = "\n".join(known), blocks(DOCS / "messages.md", "text")
    assert len(quoted) > 40
    for message in quoted:
        parts = [part for part in re.split("…", message.strip()) if part.strip(" .,:;()'")]
        assert max(map(len, parts)) > 12, message
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in known) or _assembled(parts, whole), message


def _assembled(parts: list[str], whole: str) -> bool:
    """Whether the long pieces of a message occur, where a text is put together from several."""
    return max(map(len, parts)) > 40 and all(part.strip() in whole for part in parts if len(part) > 12)


def pictures() -> Any:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_conditioning_gap_is_exact() -> None:
    """Against numerical integration of the product of two Normals, and the values that the page quotes."""
    shared = pictures().shared_guide
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    for means, quoted in (([-0.5, 0.5], "0.31"), ([-2.0, 2.0], "3.31")):
        mean, variance, gap = shared([0.5, 0.5], means, [1.0, 4.0])
        scales = (1.0, 0.5)
        logs = [torch.distributions.Normal(m, s).log_prob(z) for m, s in zip(means, scales, strict=True)]
        log_product = (logs[0] + logs[1]) / 2
        mass = torch.trapezoid(log_product.exp(), z)
        assert gap == pytest.approx(-float(mass.log()), abs=1e-8)
        assert mean == pytest.approx(float(torch.trapezoid(z * log_product.exp(), z) / mass), abs=1e-8)
        assert variance == pytest.approx(0.4)
        assert f"{gap:.2f}" == quoted
        assert f"{quoted} nats" in (DOCS / "explain/conditioning.md").read_text("utf-8")


def test_every_public_name_has_an_example_of_at_most_eight_lines() -> None:
    """That they run is for `pytest --doctest-modules` to see."""
    for name in {*pg.__all__} - {"TERMS"}:
        text = inspect.getdoc(getattr(pg, name)) or ""
        examples = doctest.DocTestParser().get_examples(text)
        assert examples, f"{name}: no example"
        assert sum(f"{e.source}{e.want}".count("\n") for e in examples) <= 8, f"{name}: a long example"


def test_every_recipe_is_described() -> None:
    text = (DOCS / "howto/command.md").read_text("utf-8")
    recipes = [file.stem for file in (ROOT / "pyrogaps/recipes").glob("*.yaml")]
    assert len(recipes) > 20
    assert [name for name in recipes if f"`{re.sub('-(large|no-anneal)$', '', name)}`" not in text] == []
