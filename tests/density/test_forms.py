"""Every form of data gives what the same numbers give as tensors, and simulated data come back in that form."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

import pyrogaps as pg
from pyrogaps.density import as_indexed

X = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-1.0, 1.5], [0.1, 0.2]])
SEEN = torch.tensor([[True, True], [True, False], [False, True], [True, True]])


def model(x: Tensor, seen: Tensor | None = None, scale: float = 1.0) -> None:
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
        likelihood = dist.Normal(z, 1.0)
        pyro.sample("x", (likelihood if seen is None else likelihood.mask(seen)).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor, seen: Tensor | None = None, scale: float = 1.0) -> None:
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(x / 2, self.log_scale.exp()).to_event(1))


class Items(Dataset[Any]):
    """The items `item(0), item(1), ...`, as many as there are rows in `X`."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item, self.num_read = item, 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        self.num_read += 1
        return self.item(index)


def padded(items: list[Any]) -> Tensor:
    return torch.stack([torch.cat([item, item]) for item in items])


ONE = {
    "a tensor": X,
    "an array": X.numpy(),
    "lists of numbers": X.tolist(),
    "a frame": pd.DataFrame(X.numpy(), columns=["a", "b"], index=list("wxyz")),
    "a tuple": (X,),
    "a list": [X],
    "with what is not per datapoint": (X, None, 1.0),
    "by name": {"x": X},
    "arrays by name": {"x": X.numpy()},
    "by name, with a default between": {"x": X, "scale": 1.0},
    "a list of items": [(x,) for x in X],
    "a list of items by name": [{"x": x.numpy()} for x in X],
    "a TensorDataset": TensorDataset(X),
    "a part of a TensorDataset": Subset(TensorDataset(torch.cat([X + 1, X])), range(4, 8)),
    "a Dataset": Items(lambda i: X[i]),
    "a Dataset of arrays": Items(lambda i: (X[i].numpy(),)),
    "a Dataset by name": Items(lambda i: {"x": X[i]}),
    "a part of a Dataset": Subset(Items(lambda i: X[3 - i]), [3, 2, 1, 0]),
    "a DataLoader": DataLoader(Items(lambda i: X[i]), batch_size=3, shuffle=True),
}


@pytest.mark.parametrize("form", ONE)
def test_the_same_numbers_in_another_form(form: str) -> None:
    data = ONE[form]
    problem, right = pg.Problem.of(model, Guide(), data), pg.Problem.of(model, Guide(), X)
    assert torch.equal(pg.elbo(problem).value, pg.elbo(right).value)
    simulated, x = problem.simulated(3).data, right.simulated(3).data
    expected = type(data)
    if isinstance(data, Dataset | DataLoader):
        expected = TensorDataset if "TensorDataset" in form else Dataset
    assert isinstance(simulated, expected)
    assert torch.equal(as_indexed(simulated, model).fetch(torch.arange(4))[0], x)
    if isinstance(simulated, pd.DataFrame):
        assert list(simulated.columns) == ["a", "b"] and list(simulated.index) == list("wxyz")
    if isinstance(simulated, dict):
        assert list(simulated) == list(data) and type(simulated["x"]) is type(data["x"])
    if isinstance(data, list | Dataset) and isinstance(data[0], dict):
        assert list(simulated[0]) == ["x"]
    again = pg.elbo(model, Guide(), simulated).value
    assert torch.equal(again, pg.elbo(model, Guide(), x).value)


TWO = {
    "by name, in another order": {"seen": SEEN, "x": X},
    "a TensorDataset": TensorDataset(X, SEEN),
    "a Dataset": Items(lambda i: (X[i], SEEN[i])),
    "a Dataset by name, in another order": Items(lambda i: {"seen": SEEN[i], "x": X[i]}),
    "a list of items": list(zip(X, SEEN, strict=True)),
}


@pytest.mark.parametrize("form", TWO)
def test_several_arguments(form: str) -> None:
    right = pg.elbo(model, Guide(), (X, SEEN)).value
    assert torch.equal(pg.elbo(model, Guide(), TWO[form]).value, right)
    assert not torch.equal(pg.elbo(model, Guide(), X).value, right)


def test_a_model_that_takes_one_dictionary() -> None:
    def takes_one(batch: dict[str, Tensor]) -> None:
        model(batch["x"], batch["seen"])

    class TakesOne(Guide):
        def forward(self, batch: dict[str, Tensor]) -> None:  # type: ignore[override]
            super().forward(batch["x"], batch["seen"])

    right = pg.elbo(model, Guide(), (X, SEEN)).value
    by_item = Items(lambda i: {"x": X[i], "seen": SEEN[i]})
    for data in ({"x": X, "seen": SEEN}, by_item, {"seen": SEEN.numpy(), "x": X.numpy()}):
        problem = pg.Problem.of(takes_one, TakesOne(), data)
        assert torch.equal(pg.elbo(problem).value, right)
        drawn = problem.simulated(0)
        item = drawn.data if isinstance(drawn.data, dict) else drawn.data[0]
        assert set(item) == {"x", "seen"}
        assert torch.isfinite(pg.elbo(drawn.problem).value).all()


def test_a_list_of_scalars_is_one_tensor() -> None:
    def flips(data: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(10.0, 10.0))
        with pyro.plate("flips", len(data)):
            pyro.sample("x", dist.Bernoulli(p), obs=data)

    right = dist.Beta(10.0, 10.0)
    for data in ([1.0] * 6 + [0.0] * 4, [torch.tensor(1.0)] * 6 + [torch.tensor(0.0)] * 4):
        joint = pg.JointDensity(flips, data, False)
        p = torch.tensor(0.3)
        log_joint = right.log_prob(p) + 6 * p.log() + 4 * (1 - p).log() + (p * (1 - p)).log()  # with the Jacobian
        torch.testing.assert_close(joint(torch.logit(p).reshape(1, 1, 1))[0, 0], log_joint)


def test_a_loader_s_own_batches() -> None:
    loader = DataLoader(Items(lambda i: X[i, :1]), collate_fn=padded)
    (rows,) = as_indexed(loader, model).fetch(torch.tensor([2, 0, 2]))
    assert torch.equal(rows, X[:, :1].expand(-1, 2)[[2, 0, 2]])


def test_items_are_read_once_for_all_particles() -> None:
    data = Items(lambda i: X[i])
    joint = pg.JointDensity(model, data)
    before = data.num_read
    joint(torch.zeros(50, 4, 2))
    assert data.num_read - before <= 4


def test_training_on_forms() -> None:
    data = {"by name": {"x": X}, "a Dataset": Items(lambda i: {"x": X[i]}), "a frame": ONE["a frame"], "a tensor": X}
    scales = []
    for form in data.values():
        guide = Guide()
        pg.train(model, guide, form, num_epochs=3, batch_size=3, progress=False, validation=form)
        scales.append(guide.log_scale.item())
    assert scales == [scales[-1]] * 4
    assert scales[0] != pytest.approx(-0.3, abs=1e-5)


def test_a_ledger_and_a_certificate_of_a_dataset() -> None:
    small: dict[str, Any] = {
        "refinement": pg.Refinement(num_steps=20),
        "evidence": pg.AIS(num_chains=4, num_temperatures=5),
        "certificate": pg.Certificate(2, 2, 2),
        "split": pg.Split(ONE["a Dataset by name"], pg.Retraining(pg.Training(num_epochs=1), max_rounds=1)),
        "num_particles": 50,
        "progress": False,
    }
    ledger = pg.decompose(model, Guide(), ONE["a Dataset by name"], **small)
    right = pg.decompose(model, Guide(), X, **{**small, "split": pg.Split(X, small["split"].retraining)})
    for name, values in right.per_datapoint.items():
        np.testing.assert_array_equal(ledger.per_datapoint[name], values, err_msg=str(name))
    assert ledger.certificate is not None and right.certificate is not None
    np.testing.assert_array_equal(ledger.certificate["upper"], right.certificate["upper"])


def test_other_functions_take_them() -> None:
    data = {"x": X}
    assert isinstance(pg.bdmc(model, data, settings=pg.AIS(2, 3, num_leapfrog=1), initial="prior").data, dict)
    (x,) = pg.SimulatedData(model, Items(lambda i: {"x": X[i]})).fetch(torch.tensor([0, 0, 2]))
    assert x.shape == (3, 2)
    refined = pg.refine(model, Guide(), data, settings=pg.Refinement(num_steps=5))
    assert torch.isfinite(pg.elbo(model, refined, data).value).all()
    drawn = pg.to_datatree(model, Guide(), data, num_draws=5)
    assert drawn["posterior"]["z"].shape[-2:] == (4, 2)
    grid = pg.posterior_grid(model, {}, data, num_points=20, progress=False)
    np.testing.assert_array_equal(grid["x"], X)


def test_to_data_in_the_caller_s_form() -> None:
    def whole_numbers(batch: dict[str, Tensor]) -> None:
        model(batch["tenths"] / 10)

    data = {"tenths": 10 * X, "unused": X}
    joint = pg.Problem.of(whole_numbers, None, data)
    with pytest.raises(pg.InputError, match="to_data="):
        joint.simulated(0)
    drawn = joint.simulated(0, lambda values: {"tenths": 10 * values["x"], "unused": X[: len(values["x"])]}).data
    assert set(drawn) == {"tenths", "unused"} and drawn["tenths"].abs().max() > 3


# What the model holds itself.

N = 9
HELD = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
SHIFT = torch.linspace(-2, 2, N)


def arguments(x: Tensor, shift: Tensor) -> None:
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(shift[:, None], torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def held() -> None:
    with pyro.plate("d", N, subsample_size=4) as rows:
        z = pyro.sample("z", dist.Normal(SHIFT[rows, None], torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=HELD[rows])


def half_held(x: Tensor) -> None:
    """Pyro's idiom for minibatches, with a part of the model's data selected by the plate."""
    with pyro.plate("d", N, subsample_size=len(x)) as rows:
        z = pyro.sample("z", dist.Normal(SHIFT[rows, None], torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class HeldGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-0.3))

    def forward(self, *args: Tensor) -> None:
        with pyro.plate("d", N, subsample_size=len(args[0]) if args else 4) as rows:
            loc = (HELD[rows] + SHIFT[rows, None]) / 2
            pyro.sample("z", dist.Normal(loc, self.log_scale.exp()).to_event(1))


EXACT = dist.Normal(SHIFT[:, None], 2**0.5).log_prob(HELD).sum(-1).double()


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize(
    ("program", "data"), [(held, None), (held, ()), (half_held, HELD)], ids=["None", "()", "by the plate"]
)
def test_rows_that_the_plate_selects(program: Callable[..., None], data: Any, batch_size: int) -> None:
    """A recorded density takes the plate's rows as an input: those of its first chunk were used for all others."""
    right = pg.log_evidence(arguments, HeldGuideOfArguments(), (HELD, SHIFT), batch_size=batch_size)
    found = pg.log_evidence(program, HeldGuide(), data, batch_size=batch_size)
    torch.testing.assert_close(found.value, right.value, rtol=0, atol=1e-5)
    assert ((found.value - EXACT).abs() < 4.5 * found.mcse.clamp(min=1e-3)).all()


class HeldGuideOfArguments(HeldGuide):
    def forward(self, x: Tensor, shift: Tensor) -> None:  # type: ignore[override]
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal((x + shift[:, None]) / 2, self.log_scale.exp()).to_event(1))


def test_a_ledger_of_held_data() -> None:
    small: dict[str, Any] = {"refinement": pg.Refinement(num_steps=100), "num_particles": 200, "progress": False}
    ledger = pg.decompose(held, HeldGuide(), batch_size=4, **small).per_datapoint
    refined = ledger["elbo_refined"].sel(family="own")
    np.testing.assert_allclose(refined, EXACT, atol=0.01)  # the posterior is in the family


def test_held_data_without_a_data_plate_are_one_datapoint() -> None:
    def whole() -> None:
        model(X)

    right = pg.elbo(model, Guide(), X).value.sum()
    guide = Guide()
    value = pg.elbo(whole, lambda: guide(X), plate=False).value
    torch.testing.assert_close(value, right[None], rtol=1e-5, atol=0)
    with pytest.raises(pg.InputError, match=r"holds its data itself.*obs=x\[rows\].*plate=False"):
        pg.elbo(whole, lambda: guide(X))

    class Closure(Guide):
        def forward(self) -> None:  # type: ignore[override]
            super().forward(X)

    result = pg.train(whole, Closure(), num_epochs=2, progress=False)
    assert result.num_epochs == 2


# Refusals.


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from X


def by_keyword(x: Tensor, *, seen: Tensor) -> None:
    model(x, seen)


def keywords(**data: Tensor) -> None:
    model(**data)  # type: ignore[arg-type]


def required(x: Tensor, seen: Tensor) -> None:
    model(x, seen)


def swapped(seen: Tensor, x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))


REFUSED: dict[str, tuple[Callable[..., Any], Any, tuple[str, ...]]] = {
    "an IterableDataset": (model, Endless(), ("Endless", "list(data)")),
    "a loader of one": (model, DataLoader(Endless()), ("Endless", "list(data)")),
    "a generator": (model, (x for x in X), ("generator", "list(data)")),
    "a packed sequence": (model, pack_sequence([X[0], X[1]]), ("PackedSequence", "lengths")),
    "images that are no tensors": (model, Items(lambda i: object()), ("hold a object", "transform")),
    "words": (model, Items(lambda i: (X[i], "cat")), ("hold a str", "leave it out")),
    "items of other shapes": (model, Items(lambda i: X[i, : 1 + i % 2]), ("differ in shape", "(1,)", "(2,)", "Pad")),
    "items of other forms": (model, [(X[0],), {"x": X[1]}], ("differ in form",)),
    "an item that fails": (model, Items(lambda i: 1 / 0), ("reading the items of Items", "ZeroDivisionError")),
    "columns of words": (model, pd.DataFrame({"a": [1.0], "b": ["x"]}), ("column 'b'", "Pass the columns")),
    "lists of other lengths": (model, [[1.0, 2.0], [3.0]], ("differ in length", "Pad")),
    "an unknown name": (model, {"x": X, "y": X}, ("no parameter 'y'", "takes x, seen, scale", "Leave it out")),
    "a missing name": (required, {"x": X}, ("has no 'seen'", "Add it")),
    "a keyword alone": (by_keyword, {"x": X, "seen": SEEN}, ("'seen' by keyword alone", "def model(x, seen)")),
    "any keyword": (keywords, {"x": X}, ("**kwargs", "def model(x)")),
    "no items": (model, [], ("there are no datapoints",)),
    "a label for every item": (
        lambda x: model(x),
        Items(lambda i: (X[i], i)),
        ("arguments that the data give", "Pass only what the programs take"),
    ),
    "random items": (model, Items(lambda i: X[i] + torch.randn(2)), ("random", "Draw them once")),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refusals(form: str) -> None:
    program, data, words = REFUSED[form]
    with pytest.raises(pg.InputError) as caught:
        pg.JointDensity(program, data)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_what_the_refusals_advise() -> None:
    right = pg.elbo(model, Guide(), X).value
    assert torch.equal(pg.elbo(model, Guide(), torch.stack(list(Endless()))).value, right)
    assert torch.equal(pg.elbo(model, Guide(), [(x,) for x in X]).value, right)


def test_a_guide_with_another_order_of_parameters() -> None:
    with pytest.raises(pg.InputError, match=r"guide: its parameters \(seen, x\) are not the model's, \(x, seen\)"):
        pg.elbo(model, swapped, {"x": X, "seen": SEEN})
    with pytest.raises(pg.InputError, match=r"guide: its parameters \(seen, x\)"):
        pg.train(model, swapped, {"x": X, "seen": SEEN}, progress=False)


def test_simulated_data_of_a_model_that_holds_its_data() -> None:
    with pytest.raises(pg.InputError, match="Make the data an argument"):
        pg.Problem.of(held).simulated(0)


def test_random_split_is_taken_whole() -> None:
    part, _ = random_split(TensorDataset(X), [3, 1], generator=torch.Generator().manual_seed(0))
    (rows,) = as_indexed(part, model).fetch(torch.arange(3))
    assert torch.equal(rows, X[list(part.indices)])
