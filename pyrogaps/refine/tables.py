r"""The best distribution of discrete elements y in the family of a guide, given the bound of every joint state.

With $A_k$ the bound that remains once joint state k is drawn, the ELBO is

$$\mathcal L[q] = \sum_k q_k (A_k - \log q_k), \quad q_k = \prod_e q_e(y_e \mid y_{pa(e)})$$

Where every element may depend on all before it, the best q is softmax(A), and the bound is log-sum-exp of A: the gap
between the two sides is KL(q || softmax(A)). Otherwise one factor at a time is set to its best given the others,

$$q_e(y_e \mid y_{pa(e)}) \propto \exp \mathbb E_q\big[A - \sum_{f \ne e} \log q_f \mid y_e, y_{pa(e)}\big]$$

which never lowers the bound, from several starts, because it can end in a local optimum. All of it is in logarithms: a
state whose probability starts near 0 can come back.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_SWEEPS, NUM_PEAKS = 200, 4
SETTLED = 1e-7  # nats
PEAKED = 0.05  # probability that a peaked start leaves to other states of an element


@dataclass(frozen=True)
class Factors:
    """The family of q(y): joint states `(K, E)`, and which elements' states each factor depends on, `(E, E)`."""

    states: Tensor
    parents: Tensor

    @property
    def free(self) -> bool:
        """Whether the family holds every distribution over the joint states."""
        linked = self.parents | self.parents.T | torch.eye(len(self.parents), dtype=torch.bool)
        return bool(linked.all())

    def best(self, bounds: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """log q `(B, K)` of the best of the family for the bounds A `(B, K)`, and its ELBO `(B,)` in nats.

        `own` `(B, K, E)` are the guide's factors: one of the starts, and what says which states there are, by those
        that have a probability.
        """
        bounds = bounds.double()
        exists = (own > -math.inf).all(-1)
        bounds = torch.where(exists, bounds, -math.inf)
        if self.free:
            total = bounds.logsumexp(-1)
            impossible = (total == -math.inf)[:, None]
            return torch.where(impossible, own.double().sum(-1), bounds - total[:, None]), total
        best, highest = own.double().sum(-1), elbo_of(bounds, own.double().sum(-1))
        for start in self._starts(bounds, own.double()):
            factors = self._ascended(bounds, start)
            log_q = factors.sum(-1)
            # Where all that an element can become is impossible, its factor adds up to nothing.
            whole = log_q.logsumexp(-1).abs() < 1e-6
            reached = torch.where(whole, elbo_of(bounds, log_q), -math.inf)
            better = reached > highest
            best = torch.where(better[:, None], log_q, best)
            highest = torch.where(better, reached, highest)
        return best, highest

    def _starts(self, bounds: Tensor, own: Tensor) -> list[Tensor]:
        """Factors `(B, K, E)`: the guide's, the marginals of softmax(A), and some near the states of largest A."""
        exists = own > -math.inf
        weights = bounds.log_softmax(-1)
        starts = [own, self._each(weights, exists)]
        for rank in range(min(NUM_PEAKS, bounds.shape[1])):
            top = bounds.topk(rank + 1, -1).indices[:, -1]
            same = self.states[None] == self.states[top][:, None]
            peaked = torch.where(same, math.log(1 - PEAKED), math.log(PEAKED)).to(bounds)
            starts.append(self._normalised(torch.where(exists, peaked, -math.inf)))
        return starts

    def _each(self, log_weights: Tensor, exists: Tensor) -> Tensor:
        """Factors that are the conditionals of a distribution over joint states, `(B, K)`."""
        cells = [_within(log_weights, self._cell(e, own=True)) for e in range(self.states.shape[1])]
        return self._normalised(torch.where(exists, torch.stack(cells, -1), -math.inf))

    def _normalised(self, factors: Tensor) -> Tensor:
        """Factors that add up to 1 over an element's states, from values that only order these."""
        columns = []
        for element in range(factors.shape[-1]):
            columns.append(self._over_states(factors[..., element], element))
        return torch.stack(columns, -1)

    def _over_states(self, values: Tensor, element: int) -> Tensor:
        """`values`, the same within a cell of the element and its parents, less their log-sum over its states."""
        context, own = self._cell(element, own=False), self._cell(element, own=True)
        # Each cell counts once in the sum: by its first member.
        first = torch.zeros(len(own), dtype=torch.bool)
        first[[int((own == cell).nonzero()[0, 0]) for cell in range(int(own.max()) + 1)]] = True
        total = _within(torch.where(first, values, -math.inf), context)
        return torch.where(values > -math.inf, values - total, -math.inf)

    def _cell(self, element: int, *, own: bool) -> Tensor:
        """The joint states in cells of equal states of the element's parents, and if `own` of itself: `(K,)`."""
        chosen = self.parents[element].clone()
        chosen[element] = own
        if not chosen.any():
            return torch.zeros(len(self.states), dtype=torch.long)
        cell: Tensor = self.states[:, chosen].unique(dim=0, return_inverse=True)[1]
        return cell

    def _ascended(self, bounds: Tensor, factors: Tensor) -> Tensor:
        factors, before = factors.clone(), elbo_of(bounds, factors.sum(-1))
        for _ in range(NUM_SWEEPS):
            for element in reversed(range(factors.shape[-1])):
                rest = factors.sum(-1) - factors[..., element]
                rest = torch.where(factors[..., element] > -math.inf, rest, -math.inf)
                own = self._cell(element, own=True)
                share = (rest - _within(rest, own)).exp()
                gain = torch.where(share > 0, share * (bounds - rest), torch.zeros_like(share))
                mean = _summed(gain, own)
                mean = torch.where(factors[..., element] > -math.inf, mean, -math.inf)
                factors[..., element] = self._over_states(mean, element)
            after = elbo_of(bounds, factors.sum(-1))
            if not bool((after > before + SETTLED).any()):
                break
            before = after
        return factors


def elbo_of(bounds: Tensor, log_q: Tensor) -> Tensor:
    """sum_k q_k (A_k - log q_k), `(B,)` in nats."""
    return torch.where(log_q > -math.inf, log_q.exp() * (bounds - log_q), torch.zeros_like(bounds)).sum(-1)


def _within(values: Tensor, cell: Tensor) -> Tensor:
    """The log-sum-exp of `values` `(B, K)` over each cell, at every member: `(B, K)`."""
    member = cell[:, None] == cell
    spread = torch.where(member, values[:, None], -math.inf)
    return spread.logsumexp(-1)


def _summed(values: Tensor, cell: Tensor) -> Tensor:
    """The sum of `values` `(B, K)` over each cell, at every member."""
    return values @ (cell[:, None] == cell).to(values)
