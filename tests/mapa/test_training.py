"""`pyrogaps.train` with a bound that takes indices: the same steps as SVI's, checkpoints, batches, refusals."""

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.mapa.examples import DIM, LATENT, Encoder, Model, data

X = data(40)
POSTERIOR = pg.mapa_posterior(X, pg.GaussianKernel(0.6))
quick: dict[str, Any] = {"progress": False, "batch_size": 10, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def weights(*modules: torch.nn.Module) -> list[Tensor]:
    return [value.detach().clone() for module in modules for value in module.parameters()]


def test_it_climbs_the_bound_on_every_datapoint_once_an_epoch() -> None:
    model, encoder = Model(), Encoder()
    loss = pg.MAPA_ELBO(POSTERIOR, num_samples=4)
    started = float(loss.bounds(model, encoder, torch.arange(len(X))).detach().mean())
    loss.reset_counts()
    result = pg.train(model, encoder, X, objective=loss, num_epochs=30, **quick)
    # Setting up scores one batch more.
    assert loss.num_scored == 30 * len(X) + quick["batch_size"]
    reached = float(loss.bounds(model, encoder, torch.arange(len(X))).detach().mean())
    assert reached > started + 0.5
    assert result.train_elbo == pytest.approx(reached, abs=0.5)
    assert "validation_elbo" not in result.history


@pytest.mark.parametrize("kind", [pg.MAPA_ELBO, pg.MAPA_IWAE_ELBO])
def test_a_resumed_run_is_the_unbroken_one(kind: Any, tmp_path: Path) -> None:
    def run(num_epochs: int, path: Path | None) -> list[Tensor]:
        pyro.clear_param_store()
        torch.manual_seed(4)
        model = LinearGaussian(data(LATENT, seed=4).T, 0.3, 0.8)
        encoder = Encoder() if kind is pg.MAPA_ELBO else AmortizedNormal(DIM, LATENT, (4,)).double()
        loss = kind(POSTERIOR, num_samples=3)
        pg.train(model, encoder, X, objective=loss, num_epochs=num_epochs, checkpoint=path, **quick)
        return weights(model, encoder)

    whole = run(4, None)
    run(2, tmp_path / "run.pt")
    for left, right in zip(run(4, tmp_path / "run.pt"), whole, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_a_checkpoint_knows_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    pg.train(Model(), Encoder(), X, objective=pg.MAPA_ELBO(POSTERIOR), num_epochs=1, checkpoint=path, **quick)
    other = pg.MAPA_ELBO(POSTERIOR.with_bandwidth(0.9))
    with pytest.raises(pg.InputError, match="was made with different settings: objective MAPA_ELBO"):
        pg.train(Model(), Encoder(), X, objective=other, num_epochs=2, checkpoint=path, **quick)


@pytest.mark.parametrize(("batch_size", "sizes"), [(10, [10] * 4), (15, [15, 15, 10]), (100, [40])])
def test_every_datapoint_is_in_one_minibatch_of_a_pass(batch_size: int, sizes: list[int]) -> None:
    torch.manual_seed(0)
    first, second = (pg.MAPA_ELBO(POSTERIOR).minibatches(batch_size) for _ in range(2))
    for batches in (first, second):
        assert [len(batch) for batch in batches] == sizes
        assert torch.cat(batches).sort().values.tolist() == list(range(len(X)))
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_divergence_is_one_line_and_undone() -> None:
    model, encoder = Model(), Encoder()
    before = weights(model, encoder)
    loss = pg.MAPA_ELBO(POSTERIOR)
    with pytest.raises(FloatingPointError, match=r"training: epoch 1: .*Lower learning_rate"):
        pg.train(model, encoder, X, objective=loss, num_epochs=3, **{**quick, "learning_rate": 1e200})
    for left, right in zip(weights(model, encoder), before, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_other_data_are_refused() -> None:
    loss = pg.MAPA_ELBO(POSTERIOR)
    with pytest.raises(pg.InputError, match="objective MAPA_ELBO was built with 40 datapoints, but data has 30"):
        pg.train(Model(), Encoder(), X[:30], objective=loss, **quick)
    with pytest.raises(pg.InputError, match="objective MAPA_ELBO does not support validation data"):
        pg.train(Model(), Encoder(), X, objective=loss, validation=X[:5], **quick)
    with pytest.raises(pg.InputError, match="the data of objective MAPA_ELBO are on cpu, the modules on meta"):
        pg.train(Model(), Encoder(), X, objective=loss, device="meta", **quick)
