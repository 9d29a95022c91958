"""The pages of the documentation, and their blocks of code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COPIES = {"_build", "tutorials", "benchmarks", "project"}  # made by the build, see docs/sources.py
PAGES = sorted(p for p in DOCS.rglob("*.md") if not COPIES & {*p.relative_to(DOCS).parts})
SOURCES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tutorials/README.md"]
SOURCES += [ROOT / "benchmarks/README.md", *PAGES]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; those in lists without their margin."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{margin}", "", text, flags=re.MULTILINE) for margin, text in found]


def files(page: Path) -> dict[str, str]:
    """What a page shows as files: the blocks that are captioned with a name."""
    found = re.findall(
        r"^```{code-block} \w+\n:caption: (\S+)\n\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return dict(found)
