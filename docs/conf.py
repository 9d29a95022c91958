"""The documentation site: Markdown pages, the notebooks as they ran, and the reference from docstrings."""

import sys
import warnings
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx
from sphinx.deprecation import RemovedInSphinx10Warning

sys.path.insert(0, str(Path(__file__).parent))

import docstrings
import sources

from pyrogaps.version import __version__

project, author, copyright = "pyrogaps", "the authors of pyrogaps", "the authors of pyrogaps"
release = __version__

extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
suppress_warnings = ["config.cache"]  # a function among the settings, typehints_formatter

html_theme, html_copy_source = "furo", False
html_math_renderer = "mathml"
html_title = f"pyrogaps {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]

# Of sphinx_autodoc_typehints, which calls what the next Sphinx has no more.
warnings.filterwarnings("ignore", category=RemovedInSphinx10Warning)

# Notebooks are shown as they are committed, executed.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # sphinx_autodoc_typehints writes them, into the descriptions
autodoc_inherit_docstrings = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype, napoleon_use_ivar = False, True
python_maximum_signature_line_length = 88
always_document_param_types = False
typehints_defaults = "comma"
typehints_document_rtype = False
typehints_formatter = docstrings.type_words
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def repository_links(app: Sphinx, name: str, text: list[str]) -> None:
    """Links of the pages that lie in `docs/`; those of copies are rewritten already."""
    source = PurePosixPath("docs", name).with_suffix(".md")
    if (sources.ROOT / source).exists() and not name.startswith(("tutorials/", "benchmarks/", "project/")):
        text[0] = sources.linked(text[0], source)


def setup(app: Sphinx) -> None:
    sources.copy()
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", docstrings.process, priority=100)
    app.connect("autodoc-process-signature", docstrings.signature)
    app.connect("source-read", repository_links)
