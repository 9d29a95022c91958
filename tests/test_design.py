"""What the design promises of the code: settings travel in Problem and Run, functions are short of parameters, nothing
is set on an object of ours from outside, and imports have no circles, inside packages neither.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyrogaps
from tests.test_imports import PACKAGE, library_files

# The public callables, and methods of public classes, take settings themselves.
MAX_SIGNATURES = {"seed": 15, "plate": 15, "batch_size": 5}
MAX_PARAMETERS = 7

# Attributes of other objects that are set, by file, and why.
SET_ATTRIBUTES = {
    # Objects of torch, Pyro, matplotlib, xarray and Python.
    # Of a copy of a caller's function.
    "density/parts.py": {"made.__defaults__", "made.__kwdefaults__", "cell.cell_contents"},
    "density/copies.py": {"other.__class__"},  # of a copy of a caller's guide
    "likelihoods/counts.py": {"new._validate_args"},  # torch's form of expand
    "likelihoods/discretised_logistic.py": {"new.loc", "new.scale", "new._validate_args"},  # torch's form of expand
    "cli/building.py": {"family.__name__"},
    "capture/draws.py": {"ctx.gradients", "ctx.kept"},
    "capture/graphs.py": {"output.args", "node.op", "node.target", "node.args"},
    "capture/products.py": {"product.meta", "call.meta"},
    "cli/console.py": {"warnings.showwarning"},
    "density/contraction.py": {"view._pyro_dims"},  # where Pyro's contraction reads the names of dimensions
    "density/plates.py": {"SubsampleMessenger._subsample", "SubsampleMessenger._process_message"},
    "datasets/chorales.py": {"setattr(self)"},  # in __post_init__, by the names of the parts
    "density/runs.py": {"module.training"},
    "export/tree.py": {"tree.attrs"},
    "settings.py": {"target.__init__", "call.__signature__"},  # of what a decorator gives back
    "processes.py": {"share.known"},  # on an exception on its way up: all processes have it
    "training/parameters.py": {"value.grad"},
    "training/placing.py": {"module.training"},
    "training/steps.py": {"value.grad"},
    "training/trainer.py": {"module.training"},
}


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function of a file, and whether it is public: named in `pyrogaps`, or a method of a class that is."""
    public = set(pyrogaps.__all__)
    for node in ast.walk(tree):
        methods = node.body if isinstance(node, ast.ClassDef) and node.name in public else []
        for method in methods:
            if isinstance(method, ast.FunctionDef):
                method.is_public = True  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, node.name in public or getattr(node, "is_public", False)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in library_files():
        yield str(file.relative_to(PACKAGE)), ast.parse(file.read_text("utf-8"))


def test_settings_do_not_travel_beside_the_objects_that_carry_them() -> None:
    signatures: Counter[str] = Counter()
    where: dict[str, list[str]] = {name: [] for name in MAX_SIGNATURES}
    for file, tree in trees():
        for function, public in functions(tree):
            for name in MAX_SIGNATURES.keys() & set(parameters(function)):
                # A density is of a plate: that is what it is read from.
                if not public and not (name == "plate" and file.startswith("density/")):
                    signatures[name] += 1
                    where[name].append(f"{file}: {function.name}")
    for name, most in MAX_SIGNATURES.items():
        assert signatures[name] <= most, f"{name} is a parameter of {signatures[name]}: {', '.join(where[name])}"


def test_functions_have_few_parameters() -> None:
    many = [
        f"{file}: {function.name} has {len(parameters(function))}"
        for file, tree in trees()
        for function, public in functions(tree)
        if not public and len(parameters(function)) > MAX_PARAMETERS
    ]
    assert not many, many


def set_attributes(tree: ast.Module) -> Iterator[str]:
    """What is set on something other than `self` or `cls`, `setattr` and `__dict__` included."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
        for target in targets:
            for element in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                if isinstance(element, ast.Attribute):
                    owner = element.value
                    if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                        yield ast.unparse(element)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            yield f"setattr({ast.unparse(node.args[0])})"
        if isinstance(node, ast.Attribute) and node.attr == "__dict__" and not isinstance(node.ctx, ast.Load):
            yield ast.unparse(node)


def test_nothing_is_set_on_an_object_from_outside() -> None:
    found = {file: {*set_attributes(tree)} for file, tree in trees()}
    unnamed = {file: names - SET_ATTRIBUTES.get(file, set()) for file, names in found.items()}
    assert {file: names for file, names in unnamed.items() if names} == {}
    gone = {file: names - found.get(file, set()) for file, names in SET_ATTRIBUTES.items()}
    assert {file: names for file, names in gone.items() if names} == {}, "no exceptions for what is not done any more"


def test_imports_have_no_circles() -> None:
    """At module level, file by file."""
    modules = {module_of(file): imports_of(file) for file in library_files()}
    graph = {name: {target for target in targets if target in modules} for name, targets in modules.items()}
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in finished:
            for target in sorted(graph[name]):
                visit(target, (*above, name))
            finished.add(name)

    for name in sorted(graph):
        visit(name, ())


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """Modules that a file imports when it is imported itself; not its own package, whose `__init__` imports it."""
    names: set[str] = set()
    own_package = module_of(file).rpartition(".")[0]
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyrogaps"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names - {own_package, "pyrogaps"} if file.name != "__init__.py" else names - {module_of(file)}
