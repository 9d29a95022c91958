"""What a release says of itself in several places is the same in all of them."""

import re
import tomllib
from pathlib import Path

import yaml

import pyrogaps

ROOT = Path(__file__).parents[1]


def test_version_and_date_are_those_of_the_newest_release() -> None:
    newest = re.search(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert newest is not None
    assert (cited["version"], str(cited["date-released"])) == newest.groups()
    assert pyrogaps.__version__ == cited["version"]


def test_every_python_that_is_declared_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = (name.rpartition(" :: ")[2] for name in project["classifiers"] if name.startswith("Programming Language"))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))
    declared = [name for name in names if "." in name]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == declared
    assert project["requires-python"] == f">={declared[0]}"
