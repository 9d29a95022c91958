"""The public boundary: a user's mistake gets one line that names what is wrong, and no call leaves state behind.

A table of bad inputs, each with words that its line must hold; then whose fault an exception is, threads and state.
"""

import functools
import inspect
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.density import guide as guide_module
from pyrogaps.guard import ProgramError

X = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-1.0, 1.5], [0.5, 0.5]])
Y = torch.tensor([0.3, 0.7, 1.5])
FEW = {"num_particles": 8}
SMALL = {
    "num_particles": 16,
    "refinement": pg.Refinement(num_steps=4, num_selection=8),
    "evidence": pg.AIS(num_chains=2, num_temperatures=3),
    "progress": False,
}


def model(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))


def constant(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


class Net(nn.Module):
    """A guide with a network, or a model of the same kind."""

    def __init__(self, width: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = nn.Linear(width, 2, dtype=dtype)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.7).to_event(1))


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2, dtype=dtype)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Pair:
    def model(self, x: Tensor) -> None:
        model(x)

    def guide(self, x: Tensor) -> None:
        guide(x)


def two(x: Tensor, y: Tensor) -> None:
    model(x + 0 * y)


def sites(**distributions: Any) -> Callable[[Tensor], None]:
    """A guide that draws these sites in the plate."""

    def program(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            for name, fn in distributions.items():
                pyro.sample(name, fn(x))

    return program


def raising(error: BaseException, after: int = 0, program: Any = guide) -> Callable[[Tensor], None]:
    """A program that raises once it has been run `after` times."""
    calls: list[int] = []

    def program(x: Tensor) -> None:
        calls.append(len(x))
        if len(calls) > after:
            raise error
        program(x)

    return program


def fetching(fetch: Any, number: Any = 4) -> Callable[[], Any]:
    return lambda: pg.elbo(model, guide, pg.IndexedData(number, fetch), **FEW)


def elbo(m: Any = model, g: Any = guide, data: Any = X, **settings: Any) -> Callable[[], Any]:
    return lambda: pg.elbo(m, g, data, **FEW, **settings)


def ledger(m: Any = model, g: Any = guide, data: Any = X, **settings: Any) -> Callable[[], Any]:
    return lambda: pg.decompose(m, g, data, **{**SMALL, **settings})


def scaled(x: Tensor, scale: Any) -> Any:
    return dist.Normal(x / 2, scale).to_event(1)


def in_inference_mode(build: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return build()


class NoSupport(dist.TorchDistribution):  # type: ignore[misc]
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.loc + torch.randn(sample_shape + self.loc.shape)


class Broken(NoSupport):
    def log_prob(self, value: Tensor) -> Tensor:
        raise ArithmeticError("no density today")


Normal = functools.partial(dist.Normal, validate_args=False)
numbers = np.asarray(X)

BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # Arguments
    "no argument": (lambda: pg.elbo(), ("elbo", "model")),
    "no guide, no data": (lambda: pg.elbo(model), ("data: missing",)),
    "no data": (lambda: pg.elbo(model, guide), ("data: missing",)),
    "two tensors": (lambda: pg.decompose(two, guide, X, X), ("decompose", "positional", "(x, y)")),
    "two tensors, elbo": (lambda: pg.elbo(two, guide, X, X), ("elbo", "(x, y)")),
    "two tensors, refine": (lambda: pg.refine(two, guide, X, X), ("refine", "(x, y)")),
    "two tensors, train": (lambda: pg.train(two, guide, X, X, X), ("train", "(x, y)")),
    "a misspelt setting": (lambda: pg.elbo(model, guide, X, num_particle=3), ("num_particle'", "'num_particles'")),
    "a misspelt setting, decompose": (lambda: pg.decompose(model, guide, X, familes={}), ("'families'",)),
    "an unknown setting": (lambda: pg.elbo(model, guide, X, zebra=3), ("zebra",)),
    "data twice": (lambda: pg.elbo(model, guide, X, data=X), ("elbo", "data")),
    "a problem and data": (lambda: pg.elbo(pg.Problem.of(model, guide, X), guide, X), ("Problem", "separately")),
    "a problem without a guide": (lambda: pg.elbo(pg.Problem.of(model, None, X)), ("guide: missing",)),
    # Models and guides that are no programs
    "a class as the model": (elbo(m=Model), ("model: Model is a class", "Model(...)")),
    "a class as the guide": (elbo(g=Net), ("guide: Net is a class", "Net(...)")),
    "classes, decompose": (ledger(m=Model, g=Net), ("model: Model is a class",)),
    "an autoguide's class": (elbo(g=AutoNormal), ("guide: AutoNormal is a class",)),
    "a class, JointDensity": (lambda: pg.JointDensity(Model, X), ("model: Model is a class",)),
    "a class, GuideDensity": (lambda: pg.GuideDensity(Net, X, model), ("guide: Net is a class",)),
    "None as the model": (elbo(m=None), ("model: must be callable", "None")),
    "None as the guide": (elbo(g=None), ("guide: missing",)),
    "a tensor as the model": (elbo(m=X), ("model: must be callable", "a Tensor")),
    "a string as the guide": (elbo(g="guide"), ("guide: must be callable", "'guide'")),
    "a tensor as the guide": (elbo(g=X), ("guide: must be callable", "a Tensor")),
    "a distribution as the model": (elbo(m=dist.Normal(0.0, 1.0)), ("model failed", "TypeError")),
    "a pair as the model": (elbo(m=Pair()), ("model: must be callable", "a Pair")),
    "a pair as the guide": (elbo(g=Pair()), ("guide: must be callable", "a Pair")),
    "a module without forward": (elbo(m=nn.Module()), ("model: an object of Module", "cannot be called")),
    "modules in a list": (elbo(g=nn.ModuleList([Net()])), ("guide: an object of ModuleList", "cannot be called")),
    "layers alone as the guide": (elbo(g=nn.Sequential(nn.Linear(2, 2))), ("site 'z'", "missing from the guide")),
    "layers of another width": (elbo(g=nn.Sequential(nn.Linear(3, 2))), ("guide failed", "shapes")),
    "the model's and guide's places": (elbo(m=guide, g=model), ("no observed", "swapped")),
    "a program without sites": (elbo(m=lambda x: None), ("model", "no latent")),
    "a generator as the model": (elbo(m=lambda x: (yield)), ("model", "no latent")),
    "a guide without sites": (elbo(g=lambda x: None), ("site 'z'", "missing from the guide")),
    "a guide never run": (elbo(g=AutoNormal(model)), ("AutoNormal", "never been run")),
    "an auxiliary site": (
        elbo(g=lambda x: (guide(x), sites(w=lambda x: scaled(x, 0.7))(x))),
        ("site 'w'", "is_auxiliary", "augment(model)"),
    ),
    "a guide without parameters": (ledger(g=constant), ("no learned parameters", "ais(..., initial='prior')")),
    # Calls that do not fit
    "too few arguments": (elbo(m=two), ("model failed", "two() missing", "the data give")),
    "too few for the guide": (elbo(g=lambda x, y: guide(x)), ("guide failed", "missing", "the data give")),
    "too many arguments": (elbo(data=(X, X)), ("model failed", "positional", "the data give")),
    "too many for a module": (elbo(m=two, g=Net(), data=(X, X)), ("guide failed", "positional", "the data give")),
    "no arguments": (elbo(m=lambda: None), ("model failed", "the data give")),
    "another width, guide": (elbo(g=Net(3)), ("guide failed", "shapes", "(test_boundary.py, line")),
    "another width, model": (
        elbo(m=Model(), data=torch.randn(4, 3)),
        ("site 'x': its log_prob failed", "size of tensor"),
    ),
    "another dtype, guide": (elbo(g=Net(dtype=torch.float64)), ("guide failed", "dtype", "x.float()")),
    "another dtype, data": (elbo(g=Net(), data=X.double()), ("guide failed", "dtype", "x.float()")),
    "another dtype, model": (elbo(m=Model(torch.float64)), ("model failed", "dtype")),
    "another dtype, both": (ledger(m=Model(), g=Net(), data=X.double()), ("model failed", "dtype")),
    "whole numbers": (elbo(g=Net(), data=torch.ones(4, 2, dtype=torch.long)), ("guide failed", "dtype")),
    # Data
    "data of None": (elbo(data=None), ("data: missing",)),
    "a scalar": (elbo(data=torch.tensor(1.0)), ("data:", "x[None]", "plate=False")),
    "a scalar in a tuple": (elbo(m=two, data=(X, torch.tensor(1.0))), ("guide failed", "Pass only")),
    "a number": (elbo(data=3.0), ("data:", "float")),
    "a file's name": (elbo(data="digits.npz"), ("data:", "str")),
    "a list of numbers": (elbo(data=[1.0, 2.0]), ("site 'x'", "size")),
    "a tuple with a number": (elbo(data=(X, 3)), ("model failed", "Pass only")),
    "a tuple with None": (elbo(data=(X, None)), ("model failed", "Pass only")),
    "an empty tuple": (elbo(data=()), ("data: missing",)),
    "an empty list": (elbo(data=[]), ("data:", "no datapoints")),
    "a dictionary": (elbo(data={"y": X}), ("no key of the dictionary ('y')", "it takes x")),
    "a set": (elbo(data={1, 2}), ("data:", "set")),
    "a data set of torch": (elbo(data=torch.utils.data.TensorDataset(X, X)), ("model failed", "Pass only")),
    "a loader of torch": (elbo(data=torch.utils.data.DataLoader([1])), ("site 'x'", "size")),
    "no rows": (elbo(data=X[:0]), ("data:", "no datapoints")),
    "no rows, one datapoint": (elbo(data=X[:0], plate=False), ("model failed", "zero")),
    "no rows, decompose": (ledger(data=X[:0]), ("data:", "no datapoints")),
    "unequal lengths": (elbo(m=two, data=(X, X[:3])), ("data:", "[4, 3]")),
    "complex": (elbo(data=X + 0j), ("data:", "complex", "view_as_real")),
    "complex, one datapoint": (elbo(data=X + 0j, plate=False), ("data:", "complex")),
    "complex in a tuple": (elbo(m=two, data=(X, X + 0j)), ("element 1", "complex")),
    "half precision": (elbo(data=X.half()), ("data:", "float16", "x.float()")),
    "bfloat16": (elbo(data=X.bfloat16()), ("data:", "bfloat16", "x.float()")),
    "half precision, fetched": (fetching(lambda i: X.half()[i]), ("argument 0", "float16")),
    "sparse": (elbo(data=X.to_sparse()), ("data:", "sparse", "to_dense")),
    "sparse rows": (lambda: pg.elbo(model, guide, X.to_sparse_csr()), ("data:", "sparse", "to_dense")),
    "no values": (elbo(data=X.to("meta")), ("data:", "meta device")),
    "no values, decompose": (ledger(data=X.to("meta")), ("data:", "meta device")),
    "nested": (lambda: pg.elbo(model, guide, torch.nested.nested_tensor([X[0], X[1, :1]])), ("data:", "nested")),
    "quantized": (
        lambda: pg.elbo(model, guide, torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)),
        ("data:", "quantized"),
    ),
    "NaN": (elbo(data=X / torch.tensor([0.0, 1.0]) * 0), ("data:", "argument 0", "NaN")),
    "infinite": (elbo(data=X * torch.inf), ("data:", "NaN or infinite")),
    "arrays of words": (elbo(data=np.array(["a", "b"])), ("data:", "array", "numbers")),
    "arrays of objects": (elbo(data=np.array([None, 1])), ("data:", "array of dtype object")),
    "arrays in double precision": (elbo(g=Net(), data=numbers.astype(float)), ("guide failed", "dtype", "x.float()")),
    "complex arrays": (elbo(data=numbers + 0j), ("data:", "complex")),
    "a scalar array": (elbo(data=np.array(1.0)), ("data:", "x[None]")),
    # Fetched data
    "fetch of None": (fetching(lambda i: None), ("data: fetch", "None")),
    "fetch is no function": (fetching(X), ("IndexedData.fetch", "Tensor")),
    "half a datapoint": (fetching(lambda i: X[i], 2.5), ("IndexedData.num_datapoints", "2.5")),
    "a tensor of datapoints": (fetching(lambda i: X[i], X), ("IndexedData.num_datapoints",)),
    "no datapoints": (fetching(lambda i: X[i], 0), ("num_datapoints: must be a whole number of at least 1",)),
    "fewer than none": (fetching(lambda i: X[i], -1), ("num_datapoints: must be a whole number of at least 1",)),
    "too few rows": (fetching(lambda i: X[i][:1]), ("plate 'd'", "one row per index")),
    "too many rows": (fetching(lambda i: X), ("plate 'd'", "one row per index")),
    "fetch without arguments": (fetching(lambda: X), ("data: fetch failed", "positional")),
    "fetch of a missing key": (fetching(lambda i: {}["x"]), ("data: fetch failed", "KeyError", "test_boundary.py")),
    "fetch beyond the end": (fetching(lambda i: X[i], 9), ("data: fetch failed", "IndexError")),
    "fetch of NaN": (fetching(lambda i: X[i] * torch.nan), ("argument 0", "NaN")),
    "fetch at random": (fetching(lambda i: X[i] + torch.randn(len(i), 2)), ("random",)),
    "fetch of words": (fetching(lambda i: "x"), ("plate 'd'", "one row per index")),
    # Plates
    "no such plate": (elbo(plate="rows"), ("plate: the model has no plate named 'rows'", "d")),
    "a fixed size": (elbo(m=lambda x: model(X[:3])), ("plate 'd'", "size 3")),
    # Guides that do not fit the model
    "another site": (elbo(g=sites(w=lambda x: scaled(x, 0.7))), ("site 'w'", "not in the model")),
    "an observed site": (elbo(g=sites(x=lambda x: scaled(x, 0.7))), ("site 'x'", "observed in the model")),
    "another width of z": (elbo(g=sites(z=lambda x: Normal(x[:, :1], 0.7).to_event(1))), ("site 'z'", "shape")),
    "a discrete guide": (elbo(g=sites(z=lambda x: dist.Bernoulli(x.sigmoid()).to_event(1))), ("site 'z'", "discrete")),
    "another support": (elbo(g=sites(z=lambda x: dist.LogNormal(x, 1.0).to_event(1))), ("site 'z'", "support")),
    "a point": (elbo(g=sites(z=lambda x: dist.Delta(x, event_dim=1))), ("site 'z'", "Delta")),
    "a negative scale": (elbo(g=sites(z=lambda x: scaled(x, -torch.ones(2)))), ("datapoints 0, 1", "scales")),
    "a NaN scale": (elbo(g=sites(z=lambda x: scaled(x, torch.nan))), ("datapoints 0, 1", "scales")),
    "no plate in the guide": (
        elbo(g=lambda x: pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))),
        ("site 'z'", "outside the data plate"),
    ),
    "a site twice": (elbo(g=lambda x: (guide(x), guide(x))), ("guide failed", "z")),
    "no density": (elbo(g=sites(z=NoSupport)), ("site 'z'", "failed", "NotImplementedError")),
    "a broken density": (elbo(g=sites(z=Broken)), ("site 'z'", "ArithmeticError: no density today")),
    "dropout": (elbo(g=lambda x: guide(nn.functional.dropout(x, 0.5))), ("guide", "random", "dropout")),
    "batch statistics": (elbo(g=lambda x: guide(x - x.mean(0))), ("guide", "other rows")),
    "trimmed to the batch": (
        elbo(g=lambda x: guide(x[:, : 1 + int(x[:, 0].max() > 0)] + torch.zeros(len(x), 2)[:, : 1 + int(x[0, 0] > 0)])),
        ("guide",),
    ),
    "one joint Gaussian": (lambda: pg.elbo(model, trained(AutoMultivariateNormal), X), ("one joint distribution",)),
    "an autoguide of points": (lambda: pg.elbo(model, trained(AutoDelta), X), ("site 'z'", "Delta")),
    "an autoguide of other data": (lambda: pg.elbo(model, trained(AutoNormal), X[:3]), ("plate 'd'", "size 4")),
    "frozen in inference mode": (
        lambda: pg.elbo(model, in_inference_mode(Net), X),
        ("Net", "inference_mode"),
    ),
    # Families, conditions and what guides declare
    "families in a list": (ledger(families=["a"]), ("families: must be a mapping",)),
    "families of a string": (ledger(families="a"), ("families: must be a mapping",)),
    "a family of its own": (ledger(families=AutoNormal), ("families: must be a mapping",)),
    "a family that is a string": (ledger(families={"a": "AutoNormal"}), ("families.a: must be callable",)),
    "a family that is a guide's result": (ledger(families={"a": lambda m: None}), ("family", "nn.Module", "NoneType")),
    "a family by number": (ledger(families={1: AutoNormal}), ("families:", "1")),
    "the name of its own": (ledger(families={"own": AutoNormal}), ("families: 'own'",)),
    "a family without arguments": (ledger(families={"a": lambda: None}), ("family", "positional")),
    "a family that raises": (ledger(families={"a": lambda m: 1 / 0}), ("family", "ZeroDivisionError", "line")),
    "a guide of a family that raises": (ledger(families={"a": lambda m: Net(3)}), ("family", "shapes")),
    "a family that is shared": (ledger(families={"a": lambda m: Net()}), ("family", "shared by datapoints")),
    "an evidence by name": (ledger(evidence="ais"), ("evidence: must be an Evidence",)),
    "a class of evidence": (ledger(evidence=pg.AIS), ("evidence:",)),
}


def trained(kind: Any) -> Any:
    autoguide = kind(model)
    autoguide(X)
    return autoguide


def declaring(**parts: Any) -> Net:
    return type("Declared", (Net,), {**parts})()  # type: ignore[no-any-return]


BAD |= {
    "conditions that raise": (ledger(g=declaring(conditions=lambda self, x: {}["m"])), ("conditions", "failed")),
    "conditions of numbers": (ledger(g=declaring(conditions=[1.0, 0.0])), ("conditions:", "boolean")),
    "conditions of another shape": (ledger(g=declaring(conditions=torch.ones(3).bool())), ("conditions:", "shape")),
    "too many conditions": (
        ledger(g=declaring(conditions=(torch.ones(2).bool(), torch.ones(2).bool()))),
        ("conditions:", "2 masks"),
    ),
    "a lookahead of -1": (ledger(g=declaring(lookahead=-1)), ("lookahead", "-1")),
    "a lookahead of words": (ledger(g=declaring(lookahead="all")), ("lookahead", "all")),
    "augment that raises": (elbo(g=declaring(augment=lambda self, m: m.zebra)), ("augment", "failed", "zebra")),
    "augment of nothing": (elbo(g=declaring(augment=lambda self, m: None)), ("augment", "NoneType")),
    "a local family that raises": (ledger(g=declaring(local_family=lambda self, m: 1 / 0)), ("family", "ZeroDivision")),
    # What programs raise
    "a model that raises": (elbo(m=raising(ValueError("no luck"))), ("model failed", "ValueError: no luck", "line")),
    "a guide that raises": (elbo(g=raising(KeyError("key"))), ("guide failed", "KeyError: 'key'", "line")),
    "an assertion": (elbo(g=raising(AssertionError())), ("guide failed", "AssertionError (test_boundary.py")),
    "many lines": (elbo(g=raising(ValueError("one\ntwo"))), ("guide failed: ValueError: one two",)),
    "a model in training": (
        lambda: pg.train(raising(ValueError("no luck")), Net(), X, num_epochs=1, progress=False),
        ("model failed", "no luck"),
    ),
    "another dtype in training": (
        lambda: pg.train(Model(), Net(), X.double(), num_epochs=1, progress=False),
        ("failed", "dtype", "x.float()"),
    ),
    "a kernel that raises": (lambda: pg.mapa_posterior(X, lambda x, y: x @ y, num_neighbours=2), ("failed", "line")),
    "simulation's data": (
        lambda: pg.Problem.of(model, None, X).simulated(0, lambda values: values["y"]),
        ("to_data", "KeyError"),
    ),
    # Other calls
    "a class, refine": (lambda: pg.refine(model, 3, X), ("guide", "3")),
    "a class, train": (lambda: pg.train(Model, Net(), X, num_epochs=1, progress=False), ("model: Model is a class",)),
    "None, train": (lambda: pg.train(Model(), None, X, num_epochs=1, progress=False), ("guide: must be callable",)),
    "a class, ais": (lambda: pg.ais(Model, None, X), ("model: Model is a class",)),
    "a class, log_evidence": (lambda: pg.log_evidence(model, Net, X), ("guide: Net is a class",)),
    "a class, calibrate": (lambda: pg.calibrate(Model, Net(), X), ("model: Model is a class",)),
    "a class, posterior_grid": (lambda: pg.posterior_grid(Model, {"q": guide}, X), ("model: Model is a class",)),
    "a class, to_datatree": (lambda: pg.to_datatree(Model, guide, X), ("model: Model is a class",)),
    "a class, bdmc": (lambda: pg.bdmc(Model, X), ("model: Model is a class",)),
    "a class, SimulatedData": (lambda: pg.SimulatedData(Model, X), ("model: Model is a class",)),
    "a class, shared_posterior": (
        lambda: pg.shared_posterior(Model, declaring(conditions=torch.ones(2).bool()), X),
        ("model: Model is a class",),
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore")
def test_a_bad_input_gets_one_line(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(pg.InputError) as refusal:
        call()
    line = str(refusal.value)
    assert "\n" not in line
    assert not [word for word in words if word not in line], line


def test_the_table_is_long() -> None:
    assert len(BAD) >= 120


# What is accepted


def test_arrays_and_lists_are_taken_as_tensors() -> None:
    right = pg.elbo(model, guide, X, **FEW).value
    for data in (numbers, [X], [numbers], (numbers,)):
        torch.testing.assert_close(pg.elbo(model, guide, data, **FEW).value, right, rtol=0, atol=0)
    fetched = pg.IndexedData(4, lambda indices: [X[indices]])
    torch.testing.assert_close(pg.elbo(model, guide, fetched, **FEW).value, right, rtol=0, atol=0)
    whole = pg.elbo(model, guide, (numbers,), plate=False, **FEW).value
    torch.testing.assert_close(whole, pg.elbo(model, guide, (X,), plate=False, **FEW).value, rtol=0, atol=0)


def test_data_with_a_history_are_taken_without_it() -> None:
    right = pg.elbo(model, guide, X, **FEW).value
    learned = X.clone().requires_grad_()
    for data in (learned, learned * 1.0, in_inference_mode(X.clone)):
        value = pg.elbo(model, guide, data, **FEW).value
        assert not value.requires_grad
        torch.testing.assert_close(value, right, rtol=0, atol=0)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another default dtype": lambda: default_dtype(torch.float64),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_caller_s_context_changes_no_number(context: str) -> None:
    """Autocast had changed values by 0.4 nats in silence."""
    torch.manual_seed(0)
    programs = Model(), Net()
    right, right_ledger = pg.elbo(*programs, X, **FEW), pg.decompose(*programs, X, **SMALL)
    with CONTEXTS[context]():
        found, found_ledger = pg.elbo(*programs, X, **FEW), pg.decompose(*programs, X, **SMALL)
        assert torch.is_autocast_enabled("cpu") == (context == "autocast")
        assert torch.is_inference_mode_enabled() == (context == "inference mode")
        assert torch.is_grad_enabled() == (context not in ("inference mode", "no gradients"))
    torch.testing.assert_close(found.value, right.value, rtol=0, atol=0)
    assert found.value.requires_grad == right.value.requires_grad
    for name, values in right_ledger.per_datapoint.items():
        np.testing.assert_array_equal(found_ledger.per_datapoint[name].values, values.values)


@pytest.mark.parametrize("context", ["autocast", "inference mode", "no gradients"])
def test_training_is_the_same_in_any_context(context: str) -> None:
    trained_weights = []
    for around in (nullcontext, CONTEXTS[context]):
        torch.manual_seed(0)
        programs = Model(), Net()
        with around():
            pg.train(*programs, X, num_epochs=2, progress=False)
        trained_weights.append([value.detach() for program in programs for value in program.parameters()])
    for left, right in zip(*trained_weights, strict=True):
        assert torch.equal(left, right)


def test_densities_follow_the_caller_s_gradients() -> None:
    problem, z = pg.Problem.of(Model(), Net(), X), torch.zeros(2, 4, 2)
    for density in (problem.joint, problem.guide_density().log_prob):
        assert density(z).requires_grad
        with torch.no_grad():
            assert not density(z).requires_grad


# Whose fault it is


def line_of(program: Callable[..., Any], text: str) -> int:
    """The number of the line with `text` in the source of `program`."""
    lines, first = inspect.getsourcelines(program)
    return first + next(number for number, line in enumerate(lines) if text in line)


def test_the_innermost_line_of_the_user_s_own_code_is_named() -> None:
    def helper(x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.zeros(3, 3))  # torch raises, here

    def failing(x: Tensor) -> None:
        guide(helper(x))

    place = f"(test_boundary.py, line {line_of(helper, 'torch raises, here')})"
    for call in (elbo(g=failing), ledger(g=failing), elbo(m=failing), lambda: pg.refine(model, failing, X)):
        with pytest.raises(ProgramError) as refusal:
            call()
        assert str(refusal.value).endswith(place)
        assert isinstance(refusal.value.__cause__, RuntimeError)


def test_an_exception_after_the_first_runs_is_named_too() -> None:
    calls: list[int] = []

    def tiring(x: Tensor) -> None:
        calls.append(len(x))
        if len(calls) > enough:
            raise OSError("the disk is gone")
        model(x)

    enough = 10**6
    problem = pg.Problem.of(tiring, guide, X, mode="eager")
    enough = len(calls) + 3
    with pytest.raises(ProgramError) as refusal:
        pg.decompose(problem, **SMALL)
    place = f"(test_boundary.py, line {line_of(tiring, 'the disk is gone')})"
    assert str(refusal.value) == f"model failed: OSError: the disk is gone {place}"
    assert isinstance(refusal.value.__cause__, OSError)


def test_a_library_s_own_exceptions_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> Any:
        return {}["a bug of the library"]

    code = compile(inspect.getsource(bug).replace("    def", "def", 1).replace("        ", "    "), GUIDE_FILE, "exec")
    namespace: dict[str, Any] = {"Any": Any}
    exec(code, namespace)
    monkeypatch.setattr(guide_module, "read_terms", namespace["bug"])
    with pytest.raises(KeyError, match="a bug of the library"):
        pg.elbo(model, guide, X, **FEW)


GUIDE_FILE = str(Path(guide_module.__file__))


EXHAUSTED = [MemoryError("all of it"), torch.OutOfMemoryError("CUDA out of memory")]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), *EXHAUSTED])
def test_interruptions_and_exhausted_memory_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)):
        pg.elbo(model, raising(error), X, **FEW)
    with pytest.raises(type(error)):
        pg.decompose(raising(error, 12, model), guide, X, **SMALL)


def test_refusals_of_a_user_s_own_pass_through() -> None:
    with pytest.raises(pg.InputError, match=r"^mine$"):
        pg.elbo(model, raising(pg.InputError("mine")), X, **FEW)


def test_a_callback_may_stop_a_run_by_an_exception_of_its_own() -> None:
    class Pruned(Exception):
        pass

    def schedule(epoch: int) -> float:
        raise Pruned

    with pytest.raises(Pruned):
        pg.train(Model(), Net(), X, num_epochs=2, schedule=schedule, progress=False)


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    options = {"num_epochs": 1, "progress": False}
    files = {name: tmp_path / name for name in ("words", "empty", "tensors", "zip", "folder", "foreign")}
    files["words"].write_text("not a checkpoint")
    files["empty"].write_bytes(b"")
    torch.save({"weights": torch.zeros(2)}, files["tensors"])
    np.savez(files["zip"].with_suffix(".npz"), x=numbers)
    files["zip"].with_suffix(".npz").rename(files["zip"])
    files["folder"].mkdir()
    other = Net()
    other.more = nn.Linear(2, 2)
    pg.train(Model(), other, X, checkpoint=files["foreign"], **options)
    for name, file in files.items():
        net = Net()
        before = net.net.weight.detach().clone()
        with pytest.raises(pg.InputError, match=f"checkpoint .*{name}: "):
            pg.train(Model(), net, X, checkpoint=file, **options)
        assert torch.equal(net.net.weight, before), name


# Supports that differ between datapoints, depend on others, or that torch does not know


def test_bounds_of_each_datapoint() -> None:
    """A uniform latent on (0, b_n), a Normal likelihood: log p(x) is a difference of two distribution functions."""
    bounds = torch.tensor([1.0, 2.0, 3.0])

    def bounded(y: Tensor, b: Tensor) -> None:
        with pyro.plate("d", len(y)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(len(y)), b))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def prior(y: Tensor, b: Tensor) -> None:
        with pyro.plate("d", len(y)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(y)), b))

    standard = dist.Normal(0.0, 1.0)
    exact = ((standard.cdf((bounds - Y) / 0.5) - standard.cdf(-Y / 0.5)) / bounds).log().double()
    found = pg.iwae(bounded, prior, (Y, bounds), num_particles=4000)
    assert bool(((found.value - exact).abs() < 4 * found.mcse).all())
    assert bool((found.mcse < 0.03).all())
    autoguide = AutoNormal(bounded, init_scale=0.7)
    autoguide(Y, bounds)
    found = pg.elbo(bounded, autoguide, (Y, bounds), num_particles=4000)
    losses = torch.tensor([-Trace_ELBO().loss(bounded, autoguide, Y, bounds) for _ in range(4000)])
    error = (found.mcse.square().sum() + losses.var() / len(losses)).sqrt()
    assert abs(float(found.value.sum() - losses.mean())) < 4 * float(error)


def test_a_pareto_latent() -> None:
    """Its support begins at a parameter; log p(x) by quadrature."""

    def heavy(y: Tensor) -> None:
        with pyro.plate("d", len(y)):
            z = pyro.sample("z", dist.Pareto(torch.full((len(y),), 0.5), torch.tensor(3.0)))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def heavier(y: Tensor) -> None:
        with pyro.plate("d", len(y)):
            pyro.sample("z", dist.Pareto(torch.full((len(y),), 0.5), torch.tensor(2.0)))

    grid = torch.linspace(0.5, 60.5, 600_001, dtype=torch.float64)[:-1] + 5e-5
    density = dist.Pareto(torch.tensor(0.5).double(), torch.tensor(3.0).double()).log_prob(grid)[:, None]
    exact = torch.logsumexp(density + dist.Normal(grid[:, None], 0.5).log_prob(Y.double()), 0) + np.log(1e-4)
    found = pg.iwae(heavy, heavier, Y, num_particles=8000)
    assert bool(((found.value - exact).abs() < 4 * found.mcse).all())
    assert bool((found.mcse < 0.03).all())


def test_a_bound_that_is_another_latent() -> None:
    """Model and guide are one program: every weight is the likelihood, whatever the draws."""

    def prior(y: Tensor) -> Tensor:
        a = pyro.sample("a", dist.LogNormal(torch.zeros(len(y)), 0.5))
        return pyro.sample("z", dist.Uniform(torch.zeros(len(y)), a))  # type: ignore[no-any-return]

    def nested(y: Tensor) -> None:
        with pyro.plate("d", len(y)):
            pyro.sample("y", dist.Normal(prior(y), 0.5), obs=y)

    def same(y: Tensor) -> None:
        with pyro.plate("d", len(y)):
            prior(y)

    problem = pg.Problem.of(nested, same, Y)
    z, log_q = problem.guide_density().sample(50)
    torch.testing.assert_close(problem.joint.terms(z)[0], log_q, rtol=1e-4, atol=1e-4)
    autoguide = AutoNormal(nested)
    autoguide(Y)  # which takes its setup run's bound for good: a curved map to the model's space
    bound = pg.elbo(nested, autoguide, Y)
    with pyro.validation_enabled(False):
        losses = torch.tensor([pyro.infer.Trace_ELBO().loss(nested, autoguide, Y) for _ in range(400)])
    error = math.hypot(float(bound.mcse.norm()), float(losses.std()) / 20)
    assert abs(float(bound.value.sum()) + float(losses.mean())) < 4 * error


def shifted(loc: Tensor) -> Any:
    return dist.TransformedDistribution(dist.LogNormal(loc, 0.5), [T.AffineTransform(1.0, 2.0)])


def test_a_shifted_positive_latent() -> None:
    y = torch.tensor([3.0, 4.5])

    def above_one(y: Tensor) -> None:
        with pyro.plate("d", len(y)):
            a = pyro.sample("a", shifted(torch.zeros(())))
            pyro.sample("y", dist.Normal(a, 0.5), obs=y)

    def above_one_too(y: Tensor) -> None:
        with pyro.plate("d", len(y)):
            pyro.sample("a", shifted(torch.zeros(len(y))))

    exact = torch.tensor([-1.008, -2.014], dtype=torch.float64)
    found = pg.iwae(above_one, above_one_too, y, num_particles=20_000)
    assert bool(((found.value - exact).abs() < 4 * found.mcse + 0.0005).all())
    assert bool((found.mcse < 0.02).all())


def test_a_flow_without_an_inverse_scores_its_own_draws() -> None:
    torch.manual_seed(0)
    flow = T.planar(2)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow, self.log_scale = flow, nn.Parameter(torch.tensor(-0.3))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("d", len(x)):
                base = dist.Normal(x / 2, self.log_scale.exp()).to_event(1)
                pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))

    exact = dist.Normal(0.0, 2.0**0.5).log_prob(X).sum(-1).double()
    found = pg.iwae(model, Flow(), X, num_particles=4000)
    assert bool(((found.value - exact).abs() < 4 * found.mcse).all())
    assert bool((found.mcse < 0.05).all())
    before = pg.elbo(model, Flow(), X, num_particles=2000)
    refined = pg.refine(model, Flow(), X, settings=pg.Refinement(num_steps=200))
    after = pg.elbo(model, refined, X, num_particles=2000)
    assert bool((after.value > before.value).all())
    with pytest.raises(pg.InputError, match=r"site 'z': .*Planar has no inverse.*spline_coupling"):
        pg.GuideDensity(Flow(), X, model).log_prob(torch.zeros(1, 4, 2))


@pytest.mark.parametrize("transforms", [[], [T.AffineTransform(0.3, 2.0)]])
def test_a_guide_that_is_frozen_as_a_whole_has_the_same_family(transforms: list[Any]) -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer, self.log_scale = nn.Linear(1, 1), nn.Parameter(torch.tensor(-0.5))

        def forward(self, y: Tensor) -> None:
            with pyro.plate("d", len(y)):
                base = dist.Normal(self.layer(y[:, None])[:, 0], self.log_scale.exp())
                pyro.sample("z", dist.TransformedDistribution(base, transforms) if transforms else base)

    def normal(y: Tensor) -> None:
        with pyro.plate("d", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    free, frozen = Learned(), Learned().requires_grad_(False)
    settings = pg.Refinement(num_steps=20)
    refined = [pg.refine(normal, learned, Y, settings=settings) for learned in (free, frozen)]
    left, right = (pg.elbo(normal, guide, Y).value for guide in refined)
    assert torch.equal(left, right)
    assert bool((left > pg.elbo(normal, free, Y).value - 0.05).all())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


# Remedies


def test_a_guide_without_parameters_is_measured_by_what_does_not_refine() -> None:
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(X).sum(-1).double()
    bound, weighted = (measure(model, constant, X, num_particles=4000) for measure in (pg.elbo, pg.iwae))
    assert bool((bound.value < exact).all())
    assert bool(((weighted.value - exact).abs() < 4 * weighted.mcse).all())
    annealed = pg.ais(model, constant, X, initial="prior", settings=pg.AIS(num_chains=16, num_temperatures=20))
    assert bool(((annealed.value - exact).abs() < 1).all())


def test_the_remedy_for_directions_is_a_program_that_runs() -> None:
    """A latent on the circle, reparametrised as the message says."""

    def directed(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            v = pyro.sample("v", dist.ProjectedNormal(torch.tensor([1.0, 0.0])))
            pyro.sample("x", dist.Normal(v, 0.5).to_event(1), obs=x)

    with pytest.raises(pg.InputError, match=r"site 'v': .*ProjectedNormalReparam"):
        pg.elbo(directed, sites(v=lambda x: dist.ProjectedNormal(x)), X)
    reparametrised = pyro.poutine.reparam(directed, {"v": ProjectedNormalReparam()})
    drawn = sites(v_normal=lambda x: Normal(x, 1.0).to_event(1))
    value = pg.iwae(reparametrised, drawn, X, num_particles=4000)
    angle = torch.linspace(0, 2 * np.pi, 4001)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    density = dist.ProjectedNormal(torch.tensor([1.0, 0.0])).log_prob(circle)[:, None]
    likelihood = dist.Normal(circle[:, None], 0.5).log_prob(X).sum(-1)
    exact = torch.logsumexp((density + likelihood).double(), 0) + np.log(2 * np.pi / 4000)
    assert bool(((value.value - exact).abs() < 4 * value.mcse).all())


def test_an_auxiliary_draw_that_a_delta_scales() -> None:
    """The exact posterior, written as a Delta at a scaled and shifted auxiliary draw, and as a transformed Normal."""

    def scaling(x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            u = pyro.sample("u", Normal(torch.zeros(len(x), 2), 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(x / 2 + u * 0.5**0.5, torch.full((len(x),), np.log(2.0)), event_dim=1))

    exact = dist.Normal(0.0, 2.0**0.5).log_prob(X).sum(-1).double()
    torch.testing.assert_close(pg.elbo(model, scaling, X, **FEW).value, exact, rtol=1e-5, atol=1e-5)

    def transformed(x: Tensor) -> Any:
        base = Normal(torch.zeros(x.shape), 1.0)
        return dist.TransformedDistribution(base, [T.AffineTransform(x / 2, 0.5**0.5)]).to_event(1)

    direct = sites(z=transformed)
    torch.testing.assert_close(pg.elbo(model, direct, X, **FEW).value, exact, rtol=1e-5, atol=1e-5)


# Threads


def test_two_threads_get_what_one_gets() -> None:
    torch.manual_seed(0)
    pairs = [(Model(), Net()) for _ in range(2)]
    serial = [pg.decompose(*pair, X, **SMALL).per_datapoint for pair in pairs]
    found: dict[int, Any] = {}
    start = threading.Barrier(2)

    def work(number: int) -> None:
        start.wait()
        found[number] = pg.decompose(*pairs[number], X, **SMALL).per_datapoint

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(serial):
        for name in expected:
            np.testing.assert_array_equal(found[number][name].values, expected[name].values)


def test_plates_of_other_threads_are_pyro_s_own() -> None:
    sizes: list[int] = []

    def elsewhere() -> None:
        with pyro.plate("d", 7, subsample_size=3) as rows:
            sizes.append(len(rows))

    def watched(x: Tensor) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        guide(x)

    pg.elbo(model, watched, X, **FEW)
    assert set(sizes) == {3}


# State


def state() -> dict[str, Any]:
    store = pyro.get_param_store()
    return {
        "handlers": [*_PYRO_STACK],
        "parameters": {name: value.detach().clone() for name, value in store.items()},
        "validation": torch.distributions.Distribution._validate_args,
        "plates": (SubsampleMessenger.__dict__["_subsample"], SubsampleMessenger._process_message),
        "filters": [*warnings.filters],
        "environment": {**os.environ},
        "threads": {thread.name for thread in threading.enumerate()},
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
    }


def sequential(x: Tensor) -> None:
    """Fails inside a sequential plate, whose generator Python closes late."""
    for _ in pyro.plate("steps", 3):
        raise ValueError("no luck")


CALLS: dict[str, Callable[[], Any]] = {
    "a ledger with its bar": ledger(m=Model(), g=Net(), progress=True),
    "compiled": lambda: imports_compiler(),
    "a failing model": elbo(m=raising(ValueError("no luck"), 5, model)),
    "a failing guide": ledger(g=raising(ValueError("no luck"), 5)),
    "a failing sequential plate": elbo(g=sequential),
    "a failing fetch": fetching(lambda i: {}["x"]),
    "a filter": elbo(g=lambda x: (warnings.simplefilter("always"), guide(x))),
    "a refusal": elbo(g=Net),
}


def imports_compiler() -> None:
    """A guide that asks for the folder of torch's compiler, as compiling does: it sets a variable."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    pg.elbo(model, lambda x: (cache_dir(), guide(x)), X, **FEW)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_no_call_leaves_state_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    pyro.param("mine", torch.tensor(3.0))
    before, refusal = state(), None
    try:
        CALLS[name]()
    except pg.InputError as error:
        refusal = error  # which keeps every frame alive
    assert state() == before
    assert (refusal is not None) == ("failing" in name or name == "a refusal"), refusal
