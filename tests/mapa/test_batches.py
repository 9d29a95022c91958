"""Batches of neighbours: a partition in random order that shares what is decoded."""

import pytest
import torch

import pyrogaps as pg
from pyrogaps.mapa import neighbourhood_batches


def posterior(number: int = 300, num_neighbours: int | None = None) -> pg.MapaPosterior:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(number, 2, generator=generator)
    return pg.mapa_posterior(x, "gaussian", bandwidth=0.01, num_neighbours=num_neighbours)


@pytest.mark.parametrize("size", [1, 20, 64, 300, 1000])
@pytest.mark.parametrize("num_neighbours", [1, 5, None])
def test_every_datapoint_is_in_one_batch(size: int, num_neighbours: int | None) -> None:
    for neighbourhood_size in (1, 7, 1000):
        found = posterior(num_neighbours=num_neighbours)
        batches = list(neighbourhood_batches(found, size, neighbourhood_size=neighbourhood_size))
        assert torch.equal(torch.cat(batches).sort().values, torch.arange(300))
        assert [len(batch) for batch in batches[:-1]] == [min(size, 300)] * (len(batches) - 1)


def test_neighbours_share_what_is_decoded() -> None:
    found, width = posterior(), 8
    explained_by = found.indices[:, :width].long()

    def passes(batches: list[torch.Tensor]) -> float:
        return sum(len(explained_by[batch].unique()) for batch in batches) / 300

    def cut(size: int) -> float:
        generator = torch.Generator().manual_seed(1)
        return passes(list(neighbourhood_batches(found, 30, generator, neighbourhood_size=size, width=width)))

    assert cut(30) < 2.3
    assert cut(30) < cut(10) < cut(3) < cut(1)
    assert cut(1) > 4.5


def test_order_and_cut_follow_the_generator() -> None:
    found = posterior()
    one, same, other = (
        list(neighbourhood_batches(found, 50, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)
    )
    assert all(torch.equal(left, right) for left, right in zip(one, same, strict=True))
    assert not all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 5, "width": 0}, {"batch_size": 5, "neighbourhood_size": 0}]
)
def test_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(pg.InputError, match="must be at least 1, got 0"):
        list(neighbourhood_batches(posterior(), **options))
