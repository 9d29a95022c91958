"""A run owns what it wrote itself; every other file in its folder is left alone, or refused by name."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from pyrogaps.chunk_cache import remove_chunks
from pyrogaps.cli.run_folder import LEDGER, PARTS, RECIPE, RESULTS, TRAINING, UNFINISHED, WEIGHTS, RunFolder
from pyrogaps.errors import InputError
from pyrogaps.eval import main
from pyrogaps.files import replacing
from tests import commands
from tests.commands import MODULE, ledger

TEXT = "seed: 0\n"
LEFTOVER = ".checkpoint.pt.pyrogaps-0123456789abcdef.tmp"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, the current one: a commented recipe beside the module that it names."""
    (tmp_path / "mine.py").write_text(MODULE)
    quick = {**commands.RECIPE, "families": {}, "training": None, "refinement": {"num_steps": 2}, "num_particles": 4}
    quick["data"] = {"class_path": "mine.Data", "init_args": {"num_test": 4}}
    (tmp_path / "recipe.yaml").write_text("# mine\n" + yaml.safe_dump(quick))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if "__pycache__" not in name}


def finished(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(TEXT, overwrite=False)
    for name in (WEIGHTS, LEDGER, "summary.csv", "gaps.png"):
        folder.write(name, lambda file: file.write(b"result"))
    folder.finish()
    return folder


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_the_recipes_own_folder(work: Path, overwrite: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(work)
    assert main(["recipe.yaml", "--quiet", "--out", ".", *overwrite]) == 2
    assert "recipe.yaml is not this run's file (run.json does not list it). Choose another --out" in (
        capsys.readouterr().err
    )
    assert contents(work) == before


@pytest.mark.usefixtures("brief_check")
def test_a_run_among_a_users_files(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results join them, --overwrite replaces the results, and a copy of the folder is the same run."""
    (work / "recipe.yaml").rename("linear.yaml")
    (work / ".notes.tmp").write_text("mine")
    (work / "notes").mkdir()
    (work / "notes" / "000000000-000000032.npz").write_text("mine")
    before = contents(work)
    assert main(["linear.yaml", "--quiet", "--out", "."]) == 0
    assert sorted(contents(work).keys() - before.keys()) == commands.RESULTS
    first = ledger(".")
    for arguments in ([], ["--seed", "1", "--overwrite"]):
        assert main(["linear.yaml", "--quiet", "--out", ".", *arguments]) == 0
        assert {name: contents(work)[name] for name in before} == before
        assert ledger(".")["elbo"].equals(first["elbo"]) != bool(arguments)

    # The same run elsewhere. Its recipe is the user's as soon as they edit it.
    shutil.copytree(work, work / "copy", ignore=shutil.ignore_patterns("copy"))
    capsys.readouterr()
    assert main(["copy/recipe.yaml", "--quiet", "--out", "copy"]) == 0
    assert "finished run" in capsys.readouterr().err
    edited = "# mine\n" + Path("copy/recipe.yaml").read_text().replace("seed: 1", "seed: 2")
    Path("copy/recipe.yaml").write_text(edited)
    for arguments in ([], ["--overwrite"]):
        assert main(["copy/recipe.yaml", "--quiet", "--out", "copy", *arguments]) == 2
        assert "copy/recipe.yaml is damaged, or was changed after the run wrote it" in capsys.readouterr().err
        assert Path("copy/recipe.yaml").read_text() == edited


@pytest.mark.usefixtures("brief_check")
def test_the_remedy_for_a_damaged_ledger(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe.yaml", "--quiet", "--out", "run"]) == 0
    table, path = capsys.readouterr().out, work / "run" / LEDGER
    content = path.read_bytes()
    path.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    assert main(["recipe.yaml", "--quiet", "--out", "run"]) == 2
    assert "run/ledger.nc is damaged, or was changed after the run wrote it. Choose" in capsys.readouterr().err
    path.rename("away.nc")
    assert main(["recipe.yaml", "--quiet", "--out", "run"]) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", [*RESULTS, *UNFINISHED])
def test_a_file_in_the_way_is_refused_by_name(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"{name} is not this run's file .*. Choose another --out"):
        RunFolder(tmp_path).claim(TEXT, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [RECIPE, LEDGER, PARTS])
def test_links_that_lead_nowhere_are_in_the_way_too(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("unmounted")
    with pytest.raises(InputError, match=f"{name} is not this run's file"):
        RunFolder(tmp_path).claim(TEXT, overwrite=True)
    assert os.readlink(tmp_path / name) == "unmounted"


@pytest.mark.parametrize("content", ["{}", "[]", "mine", '{"files": {"ledger.nc": null}}'])
def test_a_users_own_run_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    (tmp_path / LEDGER).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"run\.json: is damaged, or not written by pyrogaps"):
            RunFolder(tmp_path).claim(TEXT, overwrite=overwrite)
    assert contents(tmp_path) == {"run.json": content.encode(), LEDGER: b"mine"}


def test_what_users_put_into_a_finished_folder_stays(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    mine = {"parts/000000000-000000064.npz": b"mine", TRAINING: b"mine", "more.csv": b"mine"}
    (tmp_path / PARTS).mkdir()
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    folder.claim(TEXT, overwrite=False)
    folder.finish()
    with pytest.raises(InputError, match=r"training\.pt is not this run's file"):
        folder.claim(TEXT, overwrite=True)
    assert {name: contents(tmp_path)[name] for name in mine} == mine
    assert folder.is_intact(LEDGER)


def test_a_file_that_comes_after_the_claim_is_not_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(TEXT, overwrite=False)
    (tmp_path / "summary.csv").write_text("mine")
    with pytest.raises(InputError, match=r"summary\.csv is not this run's file"):
        folder.write("summary.csv", lambda file: file.write(b"result"))
    assert (tmp_path / "summary.csv").read_text() == "mine"


def test_a_folder_where_nothing_was_computed_yet_may_change_its_recipe(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim("seed: 0\n", overwrite=False)
    folder.claim("seed: 1\n", overwrite=False)
    assert (folder / RECIPE).read_text() == "seed: 1\n"
    (folder / TRAINING).touch()
    with pytest.raises(InputError, match=r"different recipe \(seed\)"):
        folder.claim("seed: 2\n", overwrite=False)
    folder.claim("seed: 2\n", overwrite=True)
    assert sorted(os.listdir(folder.path)) == [RECIPE, "run.json"]


def test_a_recipe_that_is_gone(tmp_path: Path) -> None:
    """The manifest knows whether it was this one."""
    folder = finished(tmp_path)
    (folder / RECIPE).unlink()
    with pytest.raises(InputError, match=r"but no recipe\.yaml. Choose another folder with --out, or replace it with"):
        folder.claim("seed: 1\n", overwrite=False)
    folder.claim(TEXT, overwrite=False)
    assert (folder / RECIPE).read_text() == TEXT
    (folder / RECIPE).unlink()
    folder.claim("seed: 1\n", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [RECIPE, "run.json"]


def test_only_temporary_files_of_a_run_are_removed(tmp_path: Path) -> None:
    mine = [".notes.tmp", ".checkpoint.pt.123.tmp", ".mine.pt.pyrogaps-0123456789abcdef.tmp", "x.pyrogaps-0.tmp"]
    for name in (LEFTOVER, *mine):
        (tmp_path / name).write_text("half")
    RunFolder(tmp_path).claim(TEXT, overwrite=False)
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, RECIPE, "run.json"])


def test_parts_are_removed_and_what_lies_among_them_is_not(tmp_path: Path) -> None:
    names = ["000000000-000000064.npz", ".000000064-000000128.npz.pyrogaps-0123456789abcdef.tmp"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "mine.npz").write_text("mine")
    remove_chunks(tmp_path)
    assert os.listdir(tmp_path) == ["mine.npz"]
    (tmp_path / "mine.npz").unlink()
    remove_chunks(tmp_path)
    assert not tmp_path.exists()


def test_parts_moved_to_another_disk(tmp_path: Path) -> None:
    """A link in place of what the run wrote: its own files behind it are removed, and nothing else."""
    folder = RunFolder(tmp_path / "run")
    folder.claim(TEXT, overwrite=False)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "000000000-000000064.npz").touch()
    (tmp_path / "disk" / "mine").touch()
    (folder / PARTS).symlink_to(tmp_path / "disk")
    folder.finish()
    assert os.listdir(tmp_path / "disk") == ["mine"]


def test_a_temporary_file_is_new_and_syncs_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File first, then its name: each has reached the disk before what follows relies on it."""
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), rename(old, new)))
    names = set()
    for _ in range(2):
        done.clear()
        with replacing(tmp_path / "w", "file"):
            (name,) = os.listdir(tmp_path) if not names else {*os.listdir(tmp_path)} - {"w"}
            names.add(name)
        assert done == [name, "rename", tmp_path.name] and "pyrogaps" in name
    assert len(names) == 2
    # Where a file of that name lies already, or a link, nothing is written through it.
    monkeypatch.setattr("pyrogaps.files.secrets.token_hex", lambda _: "0123456789abcdef")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".w.pyrogaps-0123456789abcdef.tmp").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(InputError, match=r"file .*w: cannot be written: File exists"),
        replacing(tmp_path / "w", "file"),
    ):
        raise AssertionError("must not be opened")
    assert sorted(os.listdir(tmp_path)) == [".w.pyrogaps-0123456789abcdef.tmp", "mine", "w"]
    assert (tmp_path / "mine").read_text() == "mine"
