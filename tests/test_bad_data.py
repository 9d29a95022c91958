"""Data that a model cannot be called with, and those that look like it and can: one line each, named by what they are.

With `test_boundary.py`, `test_bad_programs.py` and the many of `test_settings.py`: the inputs that were tried.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import pyrogaps as pg

X = torch.tensor([0.3, -1.2, 0.8, 2.0])
ONES = torch.ones(4)


def model(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor, *_: Any) -> None:
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def named(x: Tensor, y: Tensor) -> None:
    model(x + 0 * y)


def named_guide(x: Tensor, y: Tensor) -> None:
    guide(x)


def of_a_dictionary(batch: dict[str, Tensor]) -> None:
    model(batch["x"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> None:
        guide(x * self.scale)


class Items(Dataset[Any]):
    """Items of `get(index)`."""

    def __init__(self, get: Callable[[int], Any], number: Any = 4) -> None:
        self.get, self.number = get, number

    def __len__(self) -> int:
        return self.number() if callable(self.number) else self.number  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Any:
        return self.get(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(X)


def gone(*_: Any) -> Any:
    raise OSError("disk gone")


def elbo(data: Any, m: Any = model, g: Any = guide, **settings: Any) -> Callable[[], Any]:
    return lambda: pg.elbo(m, g, data, num_particles=4, **settings)


def both(data: Any, g: Any = named_guide) -> Callable[[], Any]:
    return elbo(data, named, g)


def items(get: Callable[[int], Any], number: Any = 4) -> Callable[[], Any]:
    return elbo(Items(get, number))


def train(data: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: pg.train(model, Net(), data, num_epochs=1, progress=False, **settings)


# The sentence on a dictionary that is one argument, and not what the model takes.
UNREAD = ("no key of the dictionary", "is a parameter of the model (it takes x)", "x['y']")
FETCHED = "data.fetch(torch.arange(len(data)))"
RANDOM = ("the same datapoints changed between two calls", "Draw them once")
dates = pd.to_datetime(["2020-01-01", "2020-01-02"])

BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # Dictionaries
    "another key": (elbo({"y": X}), UNREAD),
    "a key in capitals": (elbo({"X": X}), ("'X'", "it takes x", "x['X']")),
    "other keys": (elbo({"y": X, "b": ONES}), ("'y', 'b'", *UNREAD)),
    "another key, one datapoint": (elbo({"y": X}, plate=False), UNREAD),
    "another key, any arguments": (elbo({"y": X}, lambda *args: model(args[0])), ("it takes *args", "args[0]['y']")),
    "another key, elsewhere": (lambda: pg.JointDensity(model, {"y": X}), UNREAD),
    "another key, items": (items(lambda i: {"y": X[i]}), UNREAD),
    "another key, a list of items": (elbo([{"y": value} for value in X]), UNREAD),
    "another key, training": (train({"y": X}), (*UNREAD, "TypeError")),
    "another key inside": (elbo({"y": X}, of_a_dictionary, lambda batch: guide(batch["x"])), ("it takes batch", "'x'")),
    "a misspelt key": (both({"x": X, "Y": ONES}), ("no parameter 'Y'", "it takes x, y")),
    "two misspelt keys": (both({"a": X, "b": ONES}), ("no parameter 'a'", "it takes x, y")),
    "a missing key": (both({"x": X}), ("no 'y'", "Add it")),
    "a key too many": (elbo({"x": X, "y": ONES}), ("no parameter 'y'", "it takes x")),
    "keys of numbers": (elbo({0: X}), ("keys", "names")),
    "no keys": (elbo({}), ("data: the dictionary is empty",)),
    "unequal lengths by name": (both({"x": X, "y": ONES[:3]}), ("lengths", "[4, 3]")),
    "text by name": (both({"x": X, "y": "abc"}), ("model failed", "'str'")),
    "a list of text by name": (both({"x": X, "y": ["a"] * 4}), ("model failed", "'list'")),
    "None by name": (elbo({"x": None}), ("model failed", "NoneType")),
    "NaN by name": (both({"x": X, "y": ONES * math.nan}), ("argument 1", "NaN")),
    "half precision by name": (both({"x": X, "y": ONES.half()}), ("'y'", "float16", "x.float()")),
    "complex by name": (both({"x": X, "y": ONES + 0j}), ("'y'", "complex")),
    "a scalar by name": (elbo({"x": torch.tensor(1.0)}), ("x[None]", "plate=False")),
    "arguments in another order": (both({"x": X, "y": ONES}, lambda y, x: guide(x)), ("guide", "(y, x)", "(x, y)")),
    "fewer in the guide": (both({"x": X, "y": ONES}, lambda x: guide(x)), ("guide", "(x)", "(x, y)")),
    "keywords": (elbo({"x": X}, lambda **given: model(given["x"])), ("**kwargs", "def model(x)")),
    "keywords alone": (elbo({"x": X}, lambda *, x: model(x)), ("'x' by keyword alone", "def model(x)")),
    # Frames
    "a column of words": (elbo(pd.DataFrame({"a": [1.0, 2.0], "b": ["u", "v"]})), ("column 'b'", "numbers")),
    "words": (elbo(pd.Series(["u", "v"])), ("its values cannot become numbers",)),
    "numbers in quotes": (elbo(pd.Series(["1.0", "2.0"])), ("its values cannot become numbers",)),
    "words among numbers": (elbo(pd.Series([1.0, "v"])), ("its values cannot become numbers",)),
    "categories of words": (elbo(pd.Series(["a", "b"], dtype="category")), ("its values cannot become numbers",)),
    "dates": (elbo(pd.DataFrame({"when": dates})), ("column 'when'", "datetime64")),
    "times between dates": (elbo(pd.Series(dates - dates[0])), ("its values", "timedelta64")),
    "complex numbers in a series": (elbo(pd.Series([1j, 2.0])), ("its values", "complex128")),
    "NaN in a frame": (elbo(pd.DataFrame({"a": [1.0, math.nan]})), ("NaN",)),
    "None in a frame": (elbo(pd.DataFrame({"a": [1.0, None]}, dtype=object)), ("NaN",)),
    "a missing whole number": (elbo(pd.Series([1, None], dtype="Int64")), ("NaN",)),
    "an empty frame": (elbo(pd.DataFrame({"a": []})), ("no datapoints",)),
    "a frame of a column": (
        elbo(pd.DataFrame({"a": [1.0, 2.0]})),
        ("site 'x'", "observed value has shape", "batch shape", "to_event"),
    ),
    "a frame of words in a tuple": (both((X, pd.Series(["a"] * 4))), ("its values cannot become numbers",)),
    "words in an index": (elbo(pd.Index(["a", "b"])), ("array", "numbers")),
    # Arrays
    "dates in an array": (elbo(np.array(dates)), ("datetime64", "numbers")),
    "objects": (elbo(np.array([True, None])), ("dtype object", "numbers")),
    "records": (elbo(np.zeros(3, dtype=[("a", float), ("b", float)])), ("array", "numbers")),
    "masked elements": (elbo(np.ma.masked_array([1.0, 2.0], mask=[0, 1])), ("masked elements", "x.filled(0.0)")),
    "masked elements by name": (both({"x": X, "y": np.ma.masked_array(ONES, mask=X > 1)}), ("masked elements",)),
    "long doubles": (elbo(np.zeros(3, np.longdouble)), ("float128", "x.astype(float)")),
    "half precision in an array": (elbo(np.zeros(3, np.float16)), ("float16", "x.float()")),
    # Lists and other collections
    "ragged lists": (elbo([[1.0, 2.0], [3.0]]), ("lists differ in length", "mask")),
    "too many digits": (elbo([10**30, 2]), ("more than 64 bits",)),
    "None in a list": (elbo([1.0, None]), ("NoneType",)),
    "text in a list": (elbo(["a", "b"]), ("items hold a str",)),
    "NaN in a list": (elbo([1.0, math.nan]), ("NaN",)),
    "items of other keys": (elbo([{"x": X[0]}, {"y": X[1]}]), ("items differ in form",)),
    "items of other lengths": (elbo([(X[0],), (X[1], X[2])]), ("items differ in form",)),
    "items of other shapes": (elbo([X[0], X[:1]]), ("items differ in shape",)),
    "items of another dtype": (elbo([X[0], X[1].double(), X[2]]), ("items differ in dtype", "x.float()")),
    "a generator": (elbo(value for value in X), ("generator", "list(data)")),
    "pairs that are made one by one": (elbo(zip(X, X, strict=True)), ("zip", "list(data)")),
    "values that are made one by one": (elbo(map(float, X)), ("map", "list(data)")),
    "bytes": (elbo(b"abc"), ("got bytes",)),
    "a function": (elbo(lambda: X), ("got function",)),
    "a module": (elbo(nn.Linear(1, 1)), ("got Linear",)),
    "a distribution": (elbo(dist.Normal(0.0, 1.0)), ("got Normal",)),
    "a tuple in a tuple": (elbo((X, (X, X))), ("model failed", "Pass only")),
    "a set in a tuple": (both((X, {1})), ("a tuple with a set",)),
    "a dictionary in a tuple": (both((X, {"a": X})), ("model failed", "'dict'")),
    "flags": (elbo(X > 0), ("site 'x'", "bool", "x.float()")),
    # Data sets and loaders of torch
    "a class of data sets": (elbo(TensorDataset), ("data: TensorDataset is a class", "TensorDataset(...)")),
    "a class of loaders": (train(DataLoader), ("data: DataLoader is a class",)),
    "random items": (items(lambda i: X[i] + torch.randn(())), RANDOM),
    "random items of NumPy": (items(lambda i: float(X[i]) + np.random.rand()), RANDOM),  # noqa: NPY002
    "random items of Python": (items(lambda i: float(X[i]) + random.random()), RANDOM),
    "random batches": (elbo(DataLoader(Items(lambda i: X[i]), collate_fn=lambda b: torch.rand(len(b)))), RANDOM),
    "random rows": (
        elbo(pg.IndexedData(4, lambda i: X[i] + torch.randn(len(i)))),
        (*RANDOM, FETCHED),
    ),
    "items that raise": (items(gone), ("data: reading the items of Items failed", "disk gone", "line")),
    "an item that raises": (items(lambda i: X[i] if i < 3 else gone()), ("reading the items", "disk gone")),
    "a length that raises": (items(lambda i: X[i], gone), ("disk gone",)),
    "a length too large": (items(lambda i: X[i], 9), ("reading the items", "IndexError")),
    "no items": (items(lambda i: X[i], 0), ("no datapoints",)),
    "items of None": (items(lambda i: None), ("items hold a NoneType",)),
    "items of text": (items(lambda i: "a"), ("items hold a str",)),
    "items of pictures": (items(lambda i: object()), ("items hold a object", "ToTensor")),
    "text in items": (items(lambda i: {"x": X[i], "name": "a"}), ("items hold a str",)),
    "a label in items": (items(lambda i: (X[i], 3)), ("model failed", "Pass only")),
    "a label by name": (items(lambda i: {"x": X[i], "label": 3}), ("no parameter 'label'",)),
    "ragged items": (items(lambda i: torch.ones(i + 1)), ("items differ in shape", "mask")),
    "items of two forms": (items(lambda i: (X[i],) if i % 2 else X[i]), ("items differ in form",)),
    "items of two dtypes": (items(lambda i: X[i].double() if i % 2 else X[i]), ("items differ in dtype",)),
    "whole numbers and fractions": (items(lambda i: 1 if i % 2 else 0.5), ("items differ in dtype",)),
    "NaN in an item": (items(lambda i: X[i] * (math.nan if i == 2 else 1)), ("NaN",)),
    "items in half precision": (items(lambda i: X[i].half()), ("float16",)),
    "complex items": (items(lambda i: X[i] + 0j), ("complex",)),
    "sparse items": (items(lambda i: X.to_sparse()), ("sparse",)),
    "a stream": (elbo(Stream()), ("Stream", "list(data)")),
    "a loader of a stream": (elbo(DataLoader(Stream())), ("Stream", "list(data)")),
    "a loader's iterator": (elbo(iter(DataLoader(TensorDataset(X)))), ("list(data)",)),
    "a loader of nothing": (elbo(DataLoader(TensorDataset(X[:0]))), ("no datapoints",)),
    "a loader of labels": (elbo(DataLoader(TensorDataset(X, X))), ("model failed", "Pass only")),
    "batches that raise": (elbo(DataLoader(TensorDataset(X), collate_fn=gone)), ("collate_fn", "disk gone")),
    "batches of None": (elbo(DataLoader(TensorDataset(X), collate_fn=lambda b: None)), ("collate_fn", "None")),
    "batches of a row": (
        elbo(DataLoader(Items(lambda i: X[i]), collate_fn=lambda b: torch.stack(b)[:1])),
        ("collate_fn of Items made 1 rows of", "one row for each"),
    ),
    "two data sets in one": (elbo(ConcatDataset([TensorDataset(X), TensorDataset(X, X)])), ("items differ in form",)),
    "a part beyond the end": (elbo(Subset(TensorDataset(X), [0, 9])), ("a Subset has indices beyond the 4 items",)),
    "an empty part": (elbo(Subset(TensorDataset(X), [])), ("no datapoints",)),
    # Training
    "NaN in training": (train(X * math.nan), ("data: argument 0", "NaN")),
    "NaN in validation": (train(X, validation=X * math.nan), ("validation: argument 0", "NaN")),
    "infinite in training": (train(X / 0), ("data: argument 0", "infinite")),
    "no data in training": (train(None), ("data: missing",)),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_data_get_one_line(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(pg.InputError) as refusal:
        call()
    line = str(refusal.value)
    assert "\n" not in line and len(line) < 700
    assert not [word for word in words if word not in line], line


def test_remedies_for_random_items() -> None:
    data = Items(lambda i: X[i] + torch.randn(()))
    drawn = [data[i] for i in range(len(data))]
    assert torch.isfinite(pg.elbo(model, guide, drawn).value).all()
    fetched = pg.IndexedData(4, lambda rows: X[rows] + torch.randn(len(rows)))
    assert torch.isfinite(pg.elbo(model, guide, fetched.fetch(torch.arange(len(fetched)))).value).all()


def test_remedies_for_a_dictionary() -> None:
    right = pg.elbo(model, guide, X).value
    assert torch.equal(pg.elbo(model, guide, {"x": X}).value, right)
    read = pg.elbo(lambda x: model(x["y"]), lambda x: guide(x["y"]), {"y": X}).value
    assert torch.equal(read, right)


ACCEPTED: dict[str, Any] = {
    "backwards": X.flip(0).numpy()[::-1],
    "another byte order": X.numpy().astype(">f4"),
    "no element masked": np.ma.masked_array(X.numpy(), mask=[0, 0, 0, 0]),
    "numbers of objects": pd.Series(X.tolist(), dtype=object),
    "categories of numbers": pd.Series(X.tolist(), dtype="category"),
    "an index": pd.Index(X.numpy()),
    "nullable": pd.Series(X.tolist(), dtype="Float64"),
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_what_looks_like_it_and_is_not(form: str) -> None:
    right = pg.elbo(model, guide, X).value
    torch.testing.assert_close(pg.elbo(model, guide, ACCEPTED[form]).value, right)


def test_a_model_that_takes_nan_is_trained() -> None:
    """Missing values are the model's own business there; only a training that fails is explained by them."""

    def imputing(x: Tensor) -> None:
        model(torch.nan_to_num(x))

    def imputed(x: Tensor) -> None:
        guide(torch.nan_to_num(x) * pyro.param("scale", torch.tensor(0.5)))

    data = torch.where(X > 1, torch.nan, X)
    assert pg.train(imputing, imputed, data, num_epochs=2, progress=False).num_epochs == 2
