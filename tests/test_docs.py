"""The documentation: its code runs, its links lead somewhere, and what it quotes and lists is there."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pyrogaps as pg
from pyrogaps.eval import main
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.vae import VAE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COPIES = {"_build", "tutorials", "benchmarks", "project"}  # made by the build, see docs/sources.py
PAGES = sorted(p for p in DOCS.rglob("*.md") if not COPIES & {*p.relative_to(DOCS).parts})
SOURCES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tutorials/README.md"]
SOURCES += [ROOT / "benchmarks/README.md", *PAGES]
# Pages whose programs take more than a few seconds, also with small budgets.
SLOW = {"docs/howto/partial.md", "docs/howto/split.md"}
SMALL: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=4, num_selection=8),
    "evidence": pg.Ladder(tolerance=1.0, max_evaluations=100),
    "conditioning": pg.Conditioning(num_completions=4, max_completions=4),
    "num_particles": 30,
    "referee": False,
    "progress": False,
}
# Numbers of epochs and steps, and what takes their place.
BUDGETS = {
    r"range\(\d\d+\)": "range(2)",
    r"num_(epochs|steps)=\d+": r"num_\1=2",
    r"num_simulated=\d+": "num_simulated=4",
}
BUDGETS |= {
    r"digits\[:1500\], digits\[1500:\]": "digits[:40], digits[40:44]",
    r"max_rounds=\d+": "max_rounds=1",
    r"num_completions=\d+": "num_completions=4, max_completions=4",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; those in lists without their margin."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{margin}", "", text, flags=re.MULTILINE) for margin, text in found]


def small(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`function` with small budgets where a page does not set its own."""

    def call(*args: Any, **kwargs: Any) -> Any:
        taken = [*inspect.signature(function).parameters][: len(args)]
        return function(*args, **{**{k: v for k, v in options.items() if k not in taken}, **kwargs})

    return call


class Half(AmortizedNormal):
    """A guide that is shown the first half of x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * MASK)


MASK = torch.arange(16) < 8


def given() -> dict[str, Any]:
    """What pages speak of without saying how it was made: a trained model, a guide and data."""
    x = (torch.rand(24, 16) < 0.4).float()
    guide = Half(16, 2, [8])
    return {
        "__name__": "page",
        "pg": pg,
        "model": VAE(16, 2, [8]),
        "guide": guide,
        "x": x[:4],
        "x_train": x,
        "x_test": x[:4],
        "mask": MASK,
    }


def with_code() -> list[Any]:
    pages = [page for page in (ROOT / "README.md", *PAGES) if blocks(page, "python")]
    return [pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) in SLOW)) for page in pages]


@pytest.mark.usefixtures("brief_check")
@pytest.mark.parametrize("page", with_code())
def test_the_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All its blocks, in order, in one namespace, with small budgets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pg, "decompose", small(pg.decompose, SMALL))
    quick = {name: SMALL[name] for name in ("evidence", "refinement", "referee")}
    monkeypatch.setattr(pg, "log_evidence", small(pg.log_evidence, quick))
    monkeypatch.setattr(pg, "calibrate", small(pg.calibrate, {"num_simulated": 40, "num_draws": 100}))
    shared = {"evidence": pg.AIS(4, 4), "refinement": SMALL["refinement"], "settings": SMALL["conditioning"]}
    monkeypatch.setattr(pg, "shared_posterior", small(pg.shared_posterior, {**shared, "num_particles": 30}))
    retraining = pg.Retraining(pg.Training(num_epochs=1), num_restarts=0, max_rounds=1, num_datapoints=4)
    monkeypatch.setattr(pg, "Split", small(pg.Split, {"retraining": retraining}))
    monkeypatch.setattr(pg, "train", small(pg.train, {"num_epochs": 2, "progress": False}))
    names = given()
    for number, block in enumerate(blocks(page, "python"), 1):
        for pattern, budget in BUDGETS.items():
            block = re.sub(pattern, budget, block)
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)


def commands() -> Iterator[Any]:
    for page in SOURCES:
        for text in [*blocks(page, "bash"), *blocks(page, "sh")]:
            lines = text.replace("\\\n", " ").splitlines()
            yield from (pytest.param(line, id=f"{name_of(page)}: {line[:60]}") for line in lines if line.strip())


@pytest.mark.parametrize("line", [*commands()])
def test_a_command_is_one(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its options and the recipe are known, or it is one of those that .ci/run runs."""
    program = line.split(" # ")[0].strip().replace("[RECIPE] [options]", "")
    _, found, arguments = program.partition("pyrogaps.eval")
    if found:
        assert main([*split(arguments), "--print_config"]) == 0, capsys.readouterr().err
        options = program[: program.index("-m pyrogaps.eval")]
        if options.startswith("torchrun"):
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args([*options.split()[1:], "script.py"])
    else:
        assert any(known in program for known in ("-m pytest", "sphinx-build", "git clone")), program


def split(arguments: str) -> list[str]:
    import shlex

    return shlex.split(arguments)


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
        for name in re.findall(r"^\.\. auto\w+:: (\S+)", page.read_text("utf-8"), re.MULTILINE):
            names.add(name if name.startswith("pyrogaps.") else f"pyrogaps.{name}")
    return names


def test_every_public_name_stands_in_the_reference() -> None:
    assert {f"pyrogaps.{name}" for name in pg.__all__} - listed() == set()
    for name in listed():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


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
    import sys

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
