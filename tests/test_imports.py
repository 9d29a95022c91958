"""The library's floors: what each file may import, and what the package shows."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyrogaps

PACKAGE = Path(__file__).parents[1] / "pyrogaps"
ZOO = ("models", "guides")

# The public names, in full. InputError is the one exception that users catch.
PUBLIC = {
    "AIS",
    "AmortizedGuide",
    "IWAE_ELBO",
    "MAPA_ELBO",
    "MAPA_IWAE_ELBO",
    "TERMS",
    "BernoulliKernel",
    "Bridge",
    "Calibration",
    "Certificate",
    "Comparison",
    "Conditioning",
    "ContinuousBernoulliKernel",
    "Evidence",
    "GapLedger",
    "GapMonitor",
    "GaussianKernel",
    "GuideDensity",
    "IndexedData",
    "InputError",
    "JointDensity",
    "Ladder",
    "LocalFamily",
    "MapaPosterior",
    "Measured",
    "Measurement",
    "Refinement",
    "Retraining",
    "Problem",
    "Shared",
    "SimulatedData",
    "Split",
    "Term",
    "Training",
    "ais",
    "bdmc",
    "calibrate",
    "compare",
    "decompose",
    "elbo",
    "from_anndata",
    "from_arrays",
    "from_scvi",
    "from_torch",
    "iwae",
    "log_evidence",
    "loo",
    "mapa_posterior",
    "plot_calibration",
    "plot_comparison",
    "plot_datapoints",
    "plot_gaps",
    "plot_ledger",
    "plot_monitor",
    "plot_posteriors",
    "plot_traces",
    "posterior_grid",
    "reference_guide",
    "refine",
    "shared_posterior",
    "to_datatree",
    "to_obs",
    "train",
}

# A floor is a file or a package of the library. Ground floor first: each may import some of those above it here.
GROUND = {
    "errors",
    "signatures",
    "settings",
    "guard",
    "progress",
    "files",
    "tables",
    "trees",
    "version",
    "streams",
    "processes",
    "memory",
    "family",
}
SEAM = GROUND | {"density", "capture", "problem", "run", "log_weights", "two_sided", "scales"}
ESTIMATORS = SEAM | {"gaussians", "annealing", "state_modes", "modes", "bounds", "refine", "evidence"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "signatures": {"errors"},
    "settings": {"errors", "signatures"},
    "guard": {"errors", "signatures"},
    "progress": set(),
    "files": {"errors"},
    "tables": set(),
    "version": set(),
    "trees": {"errors", "settings", "files", "guard"},
    "streams": {"errors"},
    "processes": {"errors"},
    "memory": {"settings"},
    "family": {"errors", "guard"},
    "likelihoods": set(),
    "chunk_cache": {"files", "guard", "streams"},
    "log_weights": {"errors"},
    "two_sided": {"log_weights"},
    "density": GROUND,
    "capture": GROUND | {"density"},
    "problem": GROUND | {"density", "capture"},
    "run": GROUND | {"density", "chunk_cache"},
    "scales": set(),
    "hmc": {"scales"},
    "gaussians": SEAM | {"hmc"},
    "annealing": SEAM | {"hmc", "gaussians"},
    "state_modes": SEAM | {"gaussians"},
    "modes": SEAM | {"gaussians", "annealing", "state_modes"},
    "bounds": SEAM,
    "refine": SEAM | {"gaussians", "modes", "bounds"},
    "evidence": SEAM | {"hmc", "gaussians", "annealing", "state_modes", "modes", "bounds", "refine"},
    "objectives": GROUND | {"density"},
    "shared": ESTIMATORS | {"capture"},
    "grid": GROUND | {"problem", "density", "bounds", "refine"},
    "export": GROUND | {"problem", "run", "density", "bounds"},
    "training": GROUND | {"density", "capture"},
    "conditioning": ESTIMATORS | {"training"},
    "mapa": ESTIMATORS | {"training"},
    "calibration": SEAM | {"bounds", "refine"},
    "gaps": ESTIMATORS | {"chunk_cache", "training", "conditioning", "mapa", "shared", "calibration"},
    "writers": {"errors", "processes"},
    "monitor": ESTIMATORS | {"gaps", "shared", "writers"},
    "adapters": GROUND | {"likelihoods", "density", "problem", "gaps", "monitor"},
    "datasets": {"errors", "settings"},
    "plots": {"errors", "settings", "gaps", "calibration", "monitor"},
    "report": {"errors", "settings", "files", "tables", "density", "gaps", "calibration", "plots"},
}
# A method that draws imports what it draws with when it is called.
WHEN_CALLED = {("gaps/ledger.py", "report")}
# The command is the top floor. Nothing below it imports it, and it finds models and guides by dotted path alone.
MAY_IMPORT["cli"] = {*MAY_IMPORT}
MAY_IMPORT["eval"] = MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT["__init__"] = {*MAY_IMPORT} - {"cli", "eval", "__main__"}


def floor_of(file: Path) -> str:
    """The floor that a library file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def library_files() -> list[Path]:
    """The library's own files: the zoo, linked into the package, is not the library."""
    return sorted(file for file in PACKAGE.rglob("*.py") if floor_of(file) not in ZOO)


def zoo_files() -> list[Path]:
    """Models and guides, by their place in the package."""
    return sorted(file for name in ZOO for file in (PACKAGE / name).glob("**/*.py"))


def imported_modules(source: str) -> Iterator[str]:
    """Full names of what is imported anywhere in `source`; a name imported from a package counts as its module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def imported_floors(file: Path) -> set[str]:
    """The floors of the library that `file` imports, its own left out."""
    modules = [module.split(".") for module in imported_modules(file.read_text("utf-8"))]
    floors = {(parts[1:] or ["__init__"])[0] for parts in modules if parts[0] == "pyrogaps"}
    return floors - {floor_of(file)}


def wrong_imports(file: Path) -> Iterator[str]:
    """What is wrong with the imports of `file`, a line for each, in the library or in the zoo."""
    name, floor = file.relative_to(PACKAGE), floor_of(file)
    for module in imported_modules(file.read_text("utf-8")):
        parts = module.split(".")
        if parts[0] in ("", *ZOO):
            yield f"{name}: import {module} by its pyrogaps name"
        elif floor not in ZOO and parts[:2] in [["pyrogaps", part] for part in ZOO]:
            yield f"{name}: imports {module}, and the library knows no model or guide"
    if floor not in ZOO:
        if floor not in MAY_IMPORT:
            yield f"{name}: say in MAY_IMPORT what the new floor '{floor}' may import"
        above = {other for path, other in WHEN_CALLED if str(name) == path}
        for other in sorted(imported_floors(file) - MAY_IMPORT.get(floor, set()) - set(ZOO) - above):
            yield f"{name}: imports '{other}', which '{floor}' may not"


def test_imports_run_one_way() -> None:
    """Every file of the library imports only floors below its own and nothing of the zoo, all by pyrogaps names."""
    library, zoo = library_files(), zoo_files()
    assert len(library) > 100
    assert len(zoo) > 10
    wrong = [line for file in (*library, *zoo) for line in wrong_imports(file)]
    assert not wrong, "\n".join(wrong)


def test_every_module_is_imported() -> None:
    """Each by its own name, also what the package itself does not import."""
    wrong = []
    for file in (*library_files(), *zoo_files()):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        try:
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
        except Exception as error:
            wrong.append(f"{file.relative_to(PACKAGE)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_what_only_draws_is_imported_when_it_is_called() -> None:
    """No module imports such a floor itself, and `import pyrogaps` loads neither Bokeh nor what adapters read."""
    for path, floor in WHEN_CALLED:
        body = ast.parse((PACKAGE / path).read_text("utf-8")).body
        top = ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert f"pyrogaps.{floor}" not in ".".join(imported_modules(ast.unparse(top)))
        assert floor in imported_floors(PACKAGE / path)
    late = ("bokeh", "scvi", "anndata")
    loaded = f"import sys, pyrogaps, pyrogaps.eval; print([name for name in sys.modules if name.startswith({late})])"
    found = subprocess.check_output([sys.executable, "-c", loaded], text=True, cwd=PACKAGE.parent)
    assert found.strip() == "[]"


# What takes longer to load than the library itself, and is needed by tables, files, pictures and the command alone.
HEAVY = {
    "IPython", "PIL", "arviz_base", "arviz_plots", "arviz_stats", "bokeh", "h5netcdf", "h5py", "jinja2", "jsonargparse",
    "matplotlib", "pandas", "scipy.interpolate", "scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.sparse",
    "scipy.stats", "sklearn", "torchvision", "xarray", "yaml",
}  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """The modules of `HEAVY` that `code` loads in a process of its own, beyond what Pyro does."""
    code = f"import sys, pyro; before = set(sys.modules); {code}; print(*sorted(set(sys.modules) - before))"
    return HEAVY & set(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=PACKAGE.parent).split())


def test_importing_the_library_loads_nothing_heavy() -> None:
    """Nor do its parts that need Pyro alone; the ledger needs pandas and xarray, and nothing that draws or writes."""
    assert not loaded_by("import pyrogaps as pg; pg.elbo, pg.refine, pg.log_evidence, pg.Problem, pg.train, dir(pg)")
    assert loaded_by("import pyrogaps as pg; pg.decompose, pg.GapLedger, pg.compare, pg.Split") == {"pandas", "xarray"}
    assert "matplotlib" in loaded_by("import pyrogaps as pg; pg.plot_gaps")


def test_names_are_loaded_when_used() -> None:
    """Each public name and package is there in a fresh process; `refine` stays the function, not its package."""
    code = """if True:
        import pyrogaps as pg
        assert set(pg.__all__) <= set(dir(pg)) and {"plots", "gaps"} <= set(dir(pg))
        assert pg.plots.plot_gaps is pg.plot_gaps and not hasattr(pg, "plot_gap")
        import pyrogaps.refine, pyrogaps.monitor
        from pyrogaps import *
        assert refine is pg.refine and callable(refine) and GapMonitor is pyrogaps.monitor.GapMonitor
        assert all(globals()[name] is getattr(pg, name) for name in pg.__all__)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_names_that_are_loaded_later_are_typed() -> None:
    """What type checkers see is what `__getattr__` finds."""
    body = ast.parse((PACKAGE / "__init__.py").read_text("utf-8")).body
    (typed,) = [node for node in body if isinstance(node, ast.If)]
    seen = {(module.split(".")[1], module.split(".")[-1]) for module in imported_modules(ast.unparse(typed))}
    assert seen == {(package, name) for package, names in pyrogaps._LATER.items() for name in names}


def test_zoo_is_linked_relatively() -> None:
    for name in ZOO:
        assert (PACKAGE / name).is_symlink()
        assert (PACKAGE / name).readlink() == Path("..") / name


def test_table_has_no_cycle() -> None:
    floors = list(MAY_IMPORT)
    for number, floor in enumerate(floors):
        assert MAY_IMPORT[floor] <= set(floors[:number])


def test_imports_are_found_in_every_form() -> None:
    source = "import pyrogaps.a\nfrom pyrogaps import b\nfrom pyrogaps.c import d\ndef f():\n    from . import e\n"
    assert set(imported_modules(source)) == {"pyrogaps.a", "pyrogaps.b", "pyrogaps.c.d", "..e"}


def test_public_names() -> None:
    assert set(pyrogaps.__all__) == PUBLIC
    assert len(pyrogaps.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(pyrogaps, name).__doc__
