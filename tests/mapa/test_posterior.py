"""The posterior: normalised, dense and sparse alike, its cache, and the exact reference that it is compared with."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyrogaps as pg
from pyrogaps.mapa import empiricalized_posterior
from tests.mapa.examples import Encoder, Model, data, log_likelihoods

X = data(12)
BINARY = (X > 0).double()
LIKELIHOODS: dict[str, tuple[Any, Tensor]] = {
    "gaussian": (pg.GaussianKernel(0.4), X),
    "bernoulli": (pg.BernoulliKernel(0.7), BINARY),
    "continuous": (pg.ContinuousBernoulliKernel(1.0, alpha=0.9), X.sigmoid()),
    "own": (lambda x, y: -(x[:, None] - y).abs().sum(-1), X),
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_posterior_is_the_normalised_kernel(kind: str, dtype: torch.dtype) -> None:
    kernel, x = LIKELIHOODS[kind]
    x = x.to(dtype)
    posterior = pg.mapa_posterior(x, kernel)
    expected = kernel(x, x).double().log_softmax(1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(posterior.to_dense(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(posterior.log_q.exp().sum(1), torch.ones(12, dtype=torch.float64))
    assert posterior.num_neighbours == posterior.num_datapoints == 12
    assert not posterior.log_q.requires_grad
    assert bool((posterior.log_q.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_sparse_posterior_is_the_dense_one_renormalised(kind: str) -> None:
    kernel, x = LIKELIHOODS[kind]
    dense = pg.mapa_posterior(x, kernel)
    for number in (1, 5, 11):
        sparse = pg.mapa_posterior(x, kernel, num_neighbours=number)
        # Ties at the edge may fall either way, so that log q is compared, not the datapoints.
        expected = dense.log_q[:, :number].log_softmax(1)
        torch.testing.assert_close(sparse.log_q, expected, rtol=0, atol=1e-10)
        assert sparse.indices.shape == (12, number)
    assert torch.equal(pg.mapa_posterior(x, kernel, num_neighbours=12).log_q, dense.log_q)


def test_names_of_likelihoods_are_kernels() -> None:
    for name, bandwidth, kernel, x in (
        ("gaussian", 0.4, pg.GaussianKernel(0.4), X),
        ("bernoulli", 0.7, pg.BernoulliKernel(0.7), BINARY),
        ("continuous_bernoulli", 2.0, pg.ContinuousBernoulliKernel(2.0), X.sigmoid()),
    ):
        assert torch.equal(pg.mapa_posterior(x, name, bandwidth=bandwidth).log_q, pg.mapa_posterior(x, kernel).log_q)


def test_images_tuples_and_indexed_data_are_compared_by_their_first_argument() -> None:
    images, labels = X.reshape(12, 3, 1), torch.arange(12)
    expected = pg.mapa_posterior(X, pg.GaussianKernel(0.4)).log_q
    indexed = pg.IndexedData(12, lambda indices: (images[indices], labels[indices]))
    for given in (images, (images, labels), indexed):
        torch.testing.assert_close(pg.mapa_posterior(given, pg.GaussianKernel(0.4)).log_q, expected)


def test_bandwidth_changes_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = pg.mapa_posterior(X, "gaussian", bandwidth=0.4, num_neighbours=6)
    expected = pg.mapa_posterior(X, "gaussian", bandwidth=1.7, num_neighbours=6)
    monkeypatch.setattr("pyrogaps.mapa.posterior.search", None)
    assert torch.equal(posterior.with_bandwidth(1.7).log_q, expected.log_q)
    assert torch.equal(posterior.with_bandwidth(0.4).log_q, posterior.log_q)


def test_limits_of_the_bandwidth() -> None:
    posterior = pg.mapa_posterior(X, "gaussian", bandwidth=1.0)
    narrow = posterior.with_bandwidth(1e-300)
    assert torch.equal(narrow.to_dense().exp(), torch.eye(12, dtype=torch.float64))
    flat = posterior.with_bandwidth(1e300)
    torch.testing.assert_close(flat.log_q, torch.full_like(flat.log_q, -math.log(12)))


@pytest.mark.parametrize("number", [3, 12])
def test_constant_data_are_explained_by_all_alike_themselves_first(number: int) -> None:
    for kernel in (pg.GaussianKernel(0.1), pg.BernoulliKernel(0.9), pg.ContinuousBernoulliKernel()):
        posterior = pg.mapa_posterior(torch.ones(12, 4), kernel, num_neighbours=number)
        assert torch.equal(posterior.indices[:, 0].long(), torch.arange(12))
        torch.testing.assert_close(posterior.log_q, torch.full_like(posterior.log_q, -math.log(number)))


@pytest.mark.parametrize("number", [4, 6])
def test_duplicates_share(number: int) -> None:
    x = torch.tensor([[0.1, 0.7], [0.1, 0.7], [2.0, 3.0], [0.1, 0.7], [9.0, 9.0], [2.0, 3.0]])
    posterior = pg.mapa_posterior(x, "gaussian", bandwidth=0.05, num_neighbours=number)
    assert torch.equal(posterior.indices[:, 0].long(), torch.arange(6))
    expected = torch.tensor([1 / 3, 1 / 3, 1 / 2, 1 / 3, 1, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(posterior.log_q[:, 0].exp(), expected)


def test_one_datapoint_explains_itself() -> None:
    posterior = pg.mapa_posterior(torch.ones(1, 4), "gaussian", bandwidth=1.0)
    assert posterior.log_q.tolist() == [[0.0]]


def test_cache_gives_the_same_and_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "distances.npz"
    first = pg.mapa_posterior(X, "gaussian", bandwidth=0.4, num_neighbours=6, cache=path)
    assert [file.name for file in path.parent.iterdir()] == ["distances.npz"]
    more = pg.mapa_posterior(X, "gaussian", bandwidth=0.4, num_neighbours=8, cache=path)
    assert more.num_neighbours == 8
    monkeypatch.setattr("pyrogaps.mapa.neighbours.search", None)
    again = pg.mapa_posterior(X, "gaussian", bandwidth=0.4, num_neighbours=6, cache=path)
    assert torch.equal(again.log_q, first.log_q) and torch.equal(again.indices, first.indices)
    other = pg.mapa_posterior(X, "gaussian", bandwidth=4.0, num_neighbours=6, cache=path)
    assert torch.equal(other.log_q, first.with_bandwidth(4.0).log_q)


def test_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "distances.npz"
    pg.mapa_posterior(X, "gaussian", bandwidth=0.4, cache=path)
    with pytest.raises(pg.InputError, match=r"belongs to other data\. Delete it or name another file"):
        pg.mapa_posterior(X + 1e-9, "gaussian", bandwidth=0.4, cache=path)
    with pytest.raises(pg.InputError, match="another kind"):
        pg.mapa_posterior(BINARY, "bernoulli", bandwidth=0.7, cache=path)
    with pytest.raises(pg.InputError, match="distances of a custom kernel"):
        pg.mapa_posterior(X, LIKELIHOODS["own"][0], cache=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(pg.InputError, match=r"distances\.npz: cannot be read"):
        pg.mapa_posterior(X, "gaussian", bandwidth=0.4, cache=path)
    with pytest.raises(pg.InputError, match="cannot be written"):
        pg.mapa_posterior(X, "gaussian", bandwidth=0.4, cache=path / "inside.npz")


@pytest.mark.parametrize("number", [4, 12])
def test_true_posterior_of_the_empiricalized_model(number: int) -> None:
    model, encoder = Model(), Encoder()
    table = log_likelihoods(model, encoder, X).detach()
    expected = table.sort(1, descending=True).values[:, :number].log_softmax(1)
    posterior = empiricalized_posterior(model, encoder, X, num_neighbours=number)
    torch.testing.assert_close(posterior.log_q, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(table.gather(1, posterior.indices.long()).log_softmax(1), expected, rtol=0, atol=1e-10)
    assert not posterior.log_q.requires_grad
    latents = encoder.net(X).detach()
    for given in (latents, {"z": latents}):
        again = empiricalized_posterior(model, given, X, num_neighbours=number)
        torch.testing.assert_close(again.log_q, posterior.log_q, rtol=0, atol=1e-10)
    with pytest.raises(pg.InputError, match="was not built with a kernel"):
        posterior.with_bandwidth(1.0)
