"""Every setting of everything public, from its annotation: what does not fit is refused in one line that names it,
before a model is run, and numbers of NumPy and torch are numbers.
"""

import inspect
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.mapa import Mapa, RecoveredPrior, aggregated_transport, recovered_prior, recovered_transport
from pyrogaps.settings import Count, Device, File, checked, checked_arguments, conform
from pyrogaps.training import Cosine, Exponential, Staircase

# What holds results or programs, and takes no settings.
HOLDERS = {
    "AmortizedGuide", "Calibration", "Comparison", "Evidence", "GapLedger", "InputError", "LocalFamily",
    "MapaPosterior", "Measured", "Measurement", "Problem", "TERMS",
}  # fmt: skip
FURTHER = (
    pg.Problem.of,
    Mapa,
    RecoveredPrior,
    Cosine,
    Exponential,
    Staircase,
    aggregated_transport,
    recovered_prior,
    recovered_transport,
)
PUBLIC = {name: getattr(pg, name) for name in pg.__all__ if name not in HOLDERS}
PUBLIC |= {target.__qualname__: target for target in FURTHER}
# The names by which messages know the classes that are sections of recipes.
SECTIONS = {
    "AIS": "evidence", "Bridge": "evidence", "Ladder": "evidence", "Refinement": "refinement",
    "Conditioning": "conditioning", "Certificate": "certificate", "Retraining": "retraining", "Split": "split",
    "Training": "training", "Mapa": "mapa", "Shared": "shared",
    "Cosine": "schedule", "Exponential": "schedule", "Staircase": "schedule", "JointDensity": "", "GuideDensity": "",
}  # fmt: skip
# No settings: data, programs of several kinds, results to draw or export, and what a class keeps for itself.
OPAQUE = {
    "adata", "arrays", "data", "train_data", "validation", "guide", "guide_or_family", "guides", "latents", "ledger",
    "ledgers", "likelihood", "log_likelihood", "model", "posterior", "settings", "return", "z",
}  # fmt: skip


class Untouched(nn.Module):
    """A model that may not be run."""

    def forward(self, *args: Any) -> None:
        raise AssertionError("the model was run")


X = torch.rand(7, 2)
PAIR = Untouched(), Untouched()
NOTHING = [xr.Dataset()] * 3
FILLERS: dict[str, Any] = {
    "model": Untouched(), "guide": Untouched(), "data": X, "guides": {"q": Untouched()}, "tree": xr.DataTree(),
    "ledger": xr.DataTree.from_dict({"per_datapoint": xr.Dataset({"elbo": 0.0})}),
    "source": xr.Dataset({"density": 0.0}), "calibration": xr.DataTree(), "monitor": pg.GapMonitor(*PAIR, X),
    "comparison": pg.Comparison((), *NOTHING, {}),
    "train_data": X, "fetch": lambda indices: (X[indices],),
    "num_datapoints": 7, "latents": X[:, :1], "variance": 1.0, "alpha": 0.9, "num_epochs": 3, "decay": 0.5,
    "log_likelihood": torch.zeros(3, 4), "z": torch.arange(4.0),
    "likelihood": "gaussian", "id": "mine", "label": "mine", "parent": None, "estimator": "mine", "direction": "exact",
    "value": lambda columns: None, "encoder": Untouched(), "decoder": Untouched(),
}  # fmt: skip

VALUES: dict[str, Any] = {
    "None": None,
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "fraction": 1.5,
    "half": 0.5,
    "rational": Fraction(1, 3),
    "zero": 0,
    "one": 1,
    "negative": -1,
    "negative fraction": -0.25,
    "huge": 2**70,
    "endless": 10**400,
    "text": "many",
    "number as text": "3",
    "empty text": "",
    "blank text": "  ",
    "bytes": b"3",
    "true": True,
    "complex": 1j,
    "class": pg.AIS,
    "its class": None,
    "list": [object()],
    "object": object(),
    "vector": torch.ones(2),
    "NumPy's NaN": np.float64(math.nan),
    "torch's NaN": torch.tensor(math.nan),
    "torch's fraction": torch.tensor(1.5),
    "NumPy's true": np.bool_(True),
}


def numeric(label: str) -> Any:
    value = VALUES[label]
    return value.item() if isinstance(value, np.generic | Tensor) and value.ndim == 0 else value


def leaves(kind: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The alternatives of an annotation, each with its limits."""
    if get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from leaves(part)
    elif get_origin(kind) is Annotated:
        base, *limits = get_args(kind)
        yield from ((leaf, (*inner, *limits)) for leaf, inner in leaves(base))
    else:
        yield kind, ()


def within(value: Any, limits: tuple[Any, ...]) -> bool:
    for words in map(str, limits):
        if words in LIMITS:
            right = LIMITS[words](value)
        else:
            bounds = re.findall(r"(of at least|above|at most|below) ([\d.]+)", words)
            assert len(bounds) == words.count(" and ") + 1
            right = abs(value) != math.inf and all(BOUNDS[name](value, float(bound)) for name, bound in bounds)
        if not right:
            return False
    return True


BOUNDS: dict[str, Callable[[float, float], bool]] = {
    "of at least": lambda value, bound: value >= bound,
    "above": lambda value, bound: value > bound,
    "at most": lambda value, bound: value <= bound,
    "below": lambda value, bound: value < bound,
}
LIMITS: dict[str, Callable[[Any], bool]] = {
    "of 64 bits": lambda value: -(2**63) <= value < 2**64,
    "a number of bytes such as 4GiB or 500MB": lambda value: value == "3" or (type(value) is int and value > 0),
    "a non-empty string": lambda value: value.strip() != "",
    "a device such as cpu, cuda or cuda:1": lambda value: False,
}


def fits(kind: Any, label: str) -> bool:
    """Whether a value is right for an annotation, or out of the reach of this table."""
    value = numeric(label)
    for leaf, limits in leaves(kind):
        origin, number = get_origin(leaf), isinstance(value, int | float | Fraction) and not isinstance(value, bool)
        if leaf is int:
            right = number and isinstance(value, int) and within(value, limits)
        elif leaf is float:
            right = number and label != "endless" and within(value, limits)
        elif leaf is bool:
            right = isinstance(value, bool)
        elif leaf is str:
            right = isinstance(value, str) and within(value, limits)
        elif leaf is types.NoneType:
            right = value is None
        elif origin is Callable or origin is type:
            right = callable(value) if origin is Callable else False
        elif origin is Literal:
            right = isinstance(value, str | bool) and value in get_args(leaf)
        elif origin in (Sequence, tuple, Mapping, dict, os.PathLike):
            right = label == "vector" and origin in (Sequence, tuple)
        else:
            right = False
        if right:
            return True
    return False


def kinds_of(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    return {name: kind for name, kind in get_type_hints(function, include_extras=True).items() if name != "return"}


def is_opaque(kind: Any) -> bool:
    def unknown(leaf: Any) -> bool:
        protocol = getattr(leaf, "_is_protocol", False) and not getattr(leaf, "_is_runtime_protocol", False)
        return leaf is Any or leaf is Tensor or (get_origin(leaf) is tuple and Tensor in get_args(leaf)) or protocol

    return any(unknown(leaf) for leaf, _ in leaves(kind))


def settings() -> Iterator[tuple[str, str, Any]]:
    for public, target in PUBLIC.items():
        for name, kind in kinds_of(target).items():
            if not is_opaque(kind):
                yield public, name, kind


def call(public: str, name: str, value: Any) -> None:
    """Call what is public with one setting, and what else it needs."""
    target = PUBLIC[public]
    parameters = inspect.signature(target).parameters.values()
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = {p.name: FILLERS.get(p.name) for p in parameters if p.default is p.empty and p.kind not in several}
    if public in ("MAPA_ELBO", "MAPA_IWAE_ELBO"):
        needed["posterior"] = pg.mapa_posterior(X, "gaussian", bandwidth=1.0)
    target(**{**needed, name: value})


def bad_values(kind: Any) -> dict[str, Any]:
    classes = [leaf for leaf, _ in leaves(kind) if inspect.isclass(leaf) and leaf.__module__.startswith("pyrogaps")]
    values = {**VALUES, "its class": classes[0] if classes else int}
    callables = any(get_origin(leaf) is Callable for leaf, _ in leaves(kind))
    return {label: v for label, v in values.items() if not (fits(kind, label) or (callables and callable(v)))}


CASES = [(public, name) for public, name, _ in settings()]


@pytest.mark.parametrize(("public", "name"), CASES)
def test_what_does_not_fit_is_refused_in_one_line(public: str, name: str) -> None:
    prefix = SECTIONS.get(public, public if inspect.isclass(PUBLIC[public]) else "")
    values = bad_values(kinds_of(PUBLIC[public])[name])
    assert len(values) > 8
    for label, value in values.items():
        with pytest.raises(pg.InputError) as caught:
            call(public, name, value)
        message = str(caught.value)
        key = f"{prefix}.{name}" if prefix else name
        assert message.startswith((f"{key}: must be ", f"{key}[0]: must be ")), (label, message)
        assert "\n" not in message
        assert len(message) < 250


def test_there_are_many_of_them() -> None:
    number = sum(len(bad_values(kind)) for _, _, kind in settings())
    print(f"{number} values, {len(CASES)} settings of {len({public for public, _ in CASES})} functions and classes")
    assert number > 2000
    assert len(CASES) > 150


def test_everything_public_is_checked() -> None:
    """A new function or class must be decorated, and none of its arguments left out by an annotation unknown here."""
    for public, target in PUBLIC.items():
        function = target.__init__ if inspect.isclass(target) else target
        assert hasattr(function, "__wrapped__"), public
        opaque = {name for name, kind in kinds_of(target).items() if is_opaque(kind)}
        assert opaque <= OPAQUE, (public, opaque - OPAQUE)


@pytest.mark.parametrize(("public", "name"), CASES)
def test_numbers_of_numpy_and_torch_are_numbers(public: str, name: str) -> None:
    target = PUBLIC[public]
    function = target.__init__ if inspect.isclass(target) else target
    for leaf, limits in leaves(kinds_of(target)[name]):
        if leaf in (int, float):
            number = next(leaf(n) for n in (1, 2, 4, 10, 100, 0.75) if within(leaf(n), limits) and leaf(n) == n)
            for value in (
                np.asarray(number),
                np.asarray(number)[()],
                torch.tensor(number),
                torch.tensor(number).numpy(),
            ):
                read = checked_arguments(function, {name: value})[name]
                assert type(read) is leaf
                assert read == number
        if leaf is bool:
            assert checked_arguments(function, {name: np.bool_(False)}) == {name: False}


def test_numbers_arrive_as_those_of_python() -> None:
    settings = pg.Refinement(num_steps=np.int64(7), learning_rate=torch.tensor(0.5), tolerance=1)  # type: ignore[arg-type]
    assert settings == pg.Refinement(num_steps=7, learning_rate=0.5, tolerance=1.0)
    assert "num_steps=7," in repr(settings)
    ladder = pg.Ladder(temperatures=np.array([4, 8]))  # type: ignore[arg-type]
    assert ladder.temperatures == (4, 8)
    assert {type(number) for number in ladder.temperatures} == {int}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pg.Refinement(num_steps=-1), "refinement.num_steps: must be a whole number of at least 1, got -1"),
        (
            lambda: pg.elbo(Untouched(), Untouched(), X, plate=3),
            "plate: must be a non-empty string, False or None, got 3",
        ),
        (lambda: pg.elbo(*PAIR, X, seed=2**64), "seed: must be a whole number of 64 bits, got 1844"),
        (lambda: pg.decompose(*PAIR, X, evidence=pg.AIS), "evidence: .*got the class AIS; write AIS"),
        (
            lambda: pg.decompose(Untouched(), Untouched(), X, refinement=pg.Refinement),
            "the class Refinement; write Ref",
        ),
        (lambda: pg.decompose(*PAIR, X, max_memory="4XB"), "max_memory: .*such as 4GiB.*'4XB'"),
        (lambda: pg.decompose(*PAIR, X, cache=""), "cache: must be a non-empty string, a path or None"),
        (lambda: pg.Split(X, 3), "split.retraining: must be a Retraining, got 3"),
        (lambda: pg.decompose(*PAIR, X, terms=[3]), r"terms\[0\]: must be a Term, got 3"),
        (lambda: pg.decompose(*PAIR, X, families={"a": 3}), "families.a: must be callable, got 3"),
        (
            lambda: pg.posterior_grid(Untouched(), {}, X, datapoints=[1, 2.5]),
            r"datapoints\[1\]: must be a whole number",
        ),
        (lambda: pg.decompose(3, Untouched(), X), "model: must be callable or a Problem, got 3"),
    ],
)
def test_messages(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(pg.InputError, match=message):
        call()


@pytest.mark.parametrize("name", [name for name, kind in kinds_of(pg.train).items() if not is_opaque(kind)])
def test_settings_passed_on_are_checked_before_data_are_simulated(name: str) -> None:
    if name in ("model", "guide", "data", "freeze_model"):
        return
    for value in bad_values(kinds_of(pg.train)[name]).values():
        with pytest.raises(pg.InputError, match=f"^{name}: must be "):
            pg.reference_guide(Untouched(), Untouched(), X, **{name: value})


# What the caller's functions return


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, conditions: Any = None) -> None:
        super().__init__()
        self.net, self.conditions = nn.Linear(2, 2), conditions

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))


@pytest.mark.parametrize("returned", [-1, math.nan, math.inf, None, "1", True, Cosine(3), torch.ones(2)])
def test_schedules_return_numbers(returned: Any) -> None:
    with pytest.raises(pg.InputError, match=r"training.schedule\(0\): must be a number of at least 0, got"):
        pg.train(model, Guide(), X, num_epochs=1, schedule=lambda epoch: returned, progress=False)


def test_schedules_may_return_numbers_of_torch() -> None:
    settings = pg.Training(learning_rate=0.5, schedule=lambda epoch: torch.tensor(0.5))  # type: ignore[arg-type, return-value]
    assert settings.rate(0) == 0.25


def test_fetch_returns_arguments() -> None:
    with pytest.raises(pg.InputError, match="returned None; it must return the model's arguments"):
        pg.elbo(model, Guide(), pg.IndexedData(7, lambda indices: None))  # type: ignore[arg-type, return-value]
    with pytest.raises(pg.InputError, match="data: fetch, or to_data, returned None"):
        pg.bdmc(model, X, to_data=lambda values: None)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (lambda x: None, "conditions: the function returned None. Return a boolean mask"),
        (lambda x: torch.ones(2), "conditions: the mask of argument 0 must be boolean"),
        (lambda x: "all", "conditions: the mask of argument 0 must be boolean"),
        (lambda x: object(), "conditions: the mask of argument 0 must be boolean"),
        ([1, 0], "conditions: the mask of argument 0 must be boolean"),
    ],
)
def test_conditions_are_masks(conditions: Any, message: str) -> None:
    with pytest.raises(pg.InputError, match=message):
        pg.shared_posterior(model, Guide(conditions), X)


# The layer itself


def test_signatures_stay_as_they_were_written() -> None:
    parameters = inspect.signature(pg.elbo).parameters
    assert list(parameters) == ["model", "guide", "data", "num_particles", "plate", "batch_size", "seed", "progress"]
    assert str(parameters["num_particles"]) == "num_particles: int = 1000"
    assert "at least 1" in str(kinds_of(pg.elbo)["num_particles"])
    assert (parameters["num_particles"].default, pg.elbo.__name__) == (1000, "elbo")
    assert "num_chains" in str(inspect.signature(pg.AIS))
    assert (pg.elbo.__doc__ or "").startswith("The evidence lower bound")


def test_misspelt_names() -> None:
    with pytest.raises(
        pg.InputError, match=r"elbo: got an unexpected keyword argument 'num_particle'.*'num_particles'"
    ):
        pg.elbo(model, Guide(), X, num_particle=3)  # type: ignore[call-arg]
    with pytest.raises(pg.InputError, match="positional argument"):
        pg.elbo(model, Guide(), X, 3)  # type: ignore[misc]


def test_paths_and_text() -> None:
    assert conform("cache", File | None, Path("here")) == Path("here")
    assert conform("cache", File | None, "here") == "here"
    assert conform("device", Device, torch.device("cpu")) == torch.device("cpu")
    assert conform("device", Device, "cuda:1") == "cuda:1"


def test_only_what_is_given_is_checked() -> None:
    @checked()
    def function(number: Count = 0, *more: Any, **named: Any) -> Any:
        return number, more, named

    assert function() == (0, (), {})
    assert function(2, 3, a=4) == (2, (3,), {"a": 4})
    with pytest.raises(pg.InputError, match="number: must be a whole number of at least 1, got 0"):
        function(0)
