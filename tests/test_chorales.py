"""The chorales: one length for all parts, and what is said of files that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyrogaps import JointDensity
from pyrogaps.cli.building import build_data
from pyrogaps.cli.recipe import Evaluate, Recipe
from pyrogaps.cli.typed import Component
from pyrogaps.datasets import Chorales
from pyrogaps.errors import InputError
from pyrogaps.models.dmm import DeepMarkovModel

CONTENT: dict[str, Any] = {
    "train": [[[60, 64], [], [21]], [[108]]],
    "valid": [[[60], [62], [64], [65], [67]]],
    "test": [[[30, 31], [32]]],
}
FILE = "jsb-chorales-quarter.json"


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No data folder but the one a test names."""
    if "data_root" not in request.fixturenames:
        monkeypatch.delenv("PYROGAPS_DATA", raising=False)


def write(folder: Path, content: Any, name: str = FILE) -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_padded_to_one_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, CONTENT)
    monkeypatch.setenv("PYROGAPS_DATA", str(tmp_path))
    chorales = Chorales()
    parts = {name: getattr(chorales, name) for name in ("train", "validation", "test")}
    assert {name: tuple(x.shape) for name, (x, _) in parts.items()} == {
        "train": (2, 5, 88), "validation": (1, 5, 88), "test": (1, 5, 88),
    }  # fmt: skip
    assert {name: lengths.tolist() for name, (_, lengths) in parts.items()} == {
        "train": [3, 1], "validation": [5], "test": [2],
    }  # fmt: skip
    x, lengths = chorales.train
    assert x.dtype == torch.get_default_dtype() and lengths.dtype == torch.long
    assert x.nonzero().tolist() == [[0, 0, 39], [0, 0, 43], [0, 2, 0], [1, 0, 87]]


def test_a_path_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, CONTENT, "mine.json")
    for chorales in (Chorales(path=str(path)), Chorales(path="mine.json", data_root=str(tmp_path))):
        assert chorales.test[1].tolist() == [2]


def test_a_recipe_takes_them(tmp_path: Path) -> None:
    write(tmp_path, CONTENT)
    recipe = Recipe(
        data=Component("pyrogaps.datasets.Chorales"),
        model=Component("pyrogaps.models.dmm.DeepMarkovModel"),
        guide=Component("pyrogaps.guides.sequential.StructuredNormal"),
        evaluate=Evaluate(part="train", num_datapoints=1),
    )
    data, remarks = build_data(recipe, data_root=str(tmp_path))
    assert not remarks
    assert isinstance(data.evaluated, tuple)
    assert [tuple(tensor.shape) for tensor in data.evaluated] == [(1, 5, 88), (1,)]
    assert JointDensity(DeepMarkovModel(latent_dim=2), data.evaluated).dim == 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"valid": []}, r"the list 'valid' is missing or empty\. The file needs non-empty lists train, valid, test"),
        ({"test": None}, "the list 'test' is missing"),
        ({"train": [[[60]], []]}, r"train chorale 1 has no time steps\. Leave it out"),
        ({"train": [[[60], [20]]]}, r"train chorale 0, step 1: .*MIDI notes from 21 to 108, got \[20\]"),
        ({"test": [[[109]]]}, r"test chorale 0, step 0: .*got \[109\]"),
        ({"test": [[[60.5]]]}, r"got \[60\.5\]"),
        ({"test": [[[True]]]}, r"got \[True\]"),
        ({"test": [[60]]}, "expected a list of MIDI notes from 21 to 108, got 60"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write(tmp_path, {**CONTENT, **change})
    with pytest.raises(InputError, match=f"^Chorales: .*{said}") as caught:
        Chorales(data_root=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"train": [[[60', "cannot read .*complete and JSON"), ("[1, 2]", "the list 'train' is missing")],
)
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, text)
    with pytest.raises(InputError, match=said):
        Chorales(data_root=str(tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"there is no file {FILE}\. .*--data_root .*PYROGAPS_DATA"):
        Chorales()
    with pytest.raises(InputError, match=rf"there is no file {FILE} or {tmp_path / FILE}\. Pass its full path"):
        Chorales(data_root=str(tmp_path))


def test_the_real_file(data_root: Path) -> None:
    if not (data_root / FILE).is_file():
        pytest.skip(f"PYROGAPS_DATA holds no {FILE}")
    chorales = Chorales()
    parts = (chorales.train, chorales.validation, chorales.test)
    assert [tuple(x.shape) for x, _ in parts] == [(229, 160, 88), (76, 160, 88), (77, 160, 88)]
    assert [int(lengths.max()) for _, lengths in parts] == [129, 144, 160]
    assert all(float(x[n, length:].sum()) == 0 for x, lengths in parts for n, length in enumerate(lengths))
    assert float(chorales.train[0].sum(-1).max()) <= 8  # four voices, and a few more keys where they divide
