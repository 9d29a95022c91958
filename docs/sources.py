"""What the site shows that lies elsewhere in the repository, and links that lead to the same places in both.

Pages, notebooks and READMEs link to each other by the repository's paths, so that they can be read there. The site has
copies of what lies outside `docs/`, made before each build, and links of every page are rewritten to these.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Files outside `docs/`, and the folder that their copies lie in.
COPIED = {
    "tutorials/README.md": "tutorials",
    "tutorials/*.ipynb": "tutorials",
    "benchmarks/README.md": "benchmarks",
    "benchmarks/results/*": "benchmarks/results",
    "CHANGELOG.md": "project",
    "CONTRIBUTING.md": "project",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")


def copies() -> dict[PurePosixPath, PurePosixPath]:
    """Paths in the repository, and those of their copies relative to `docs/`."""
    found = {}
    for pattern, folder in COPIED.items():
        for file in sorted(ROOT.glob(pattern)):
            found[PurePosixPath(file.relative_to(ROOT).as_posix())] = PurePosixPath(folder) / file.name
    return found


def copy() -> None:
    """Bring the copies up to date. Those that have not changed are left, so that a second build is quick."""
    found = copies()
    for source, target in found.items():
        content, place = (ROOT / source).read_bytes(), DOCS / target
        if source.suffix == ".md":
            content = linked(content.decode(), source, found).encode()
        elif source.suffix == ".ipynb":
            content = _notebook(content.decode(), source, found).encode()
        if not place.exists() or place.read_bytes() != content:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)


def linked(text: str, source: PurePosixPath, found: dict[PurePosixPath, PurePosixPath] | None = None) -> str:
    """`text` of the file `source` with its links as the site has them; a link to what it does not have is its words."""
    found = copies() if found is None else found
    own = found.get(source) or source.relative_to("docs")

    def in_site(match: re.Match[str]) -> str:
        image, words, path, anchor = match.groups()
        target = PurePosixPath(os.path.normpath(source.parent / path))
        if target in found:
            place = found[target]
        elif target.parts[0] == "docs" and (ROOT / target).exists():
            place = target.relative_to("docs")
        else:
            gone = path.endswith((".md", ".ipynb")) or (ROOT / target).exists()
            return words if gone and not image else match.group()
        return f"{image}[{words}]({os.path.relpath(place, own.parent)}{anchor or ''})"

    return LINK.sub(in_site, text)


def _notebook(text: str, source: PurePosixPath, found: dict[PurePosixPath, PurePosixPath]) -> str:
    """The links of the text cells alone: indexing and calling looks like a link in code."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = linked("".join(cell["source"]), source, found)
    return json.dumps(notebook, ensure_ascii=False)
