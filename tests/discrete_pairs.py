"""Models with discrete latents, and guides that draw them, whose evidence and best bounds are known exactly.

`Mixture` is y ~ Categorical, z | y ~ N(mu_y, S_y), x | z ~ N(W z, V): given y everything is Gaussian, with posterior
precision P_y and mean m_y of z.
"""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

DTYPE = torch.float64


class Mixture(nn.Module):
    """`alike` gives all components of z one scale; `one_hot` draws y as a one-hot vector; `noise` is that of x, times
    its own scales.
    """

    def __init__(
        self, num_states: int = 3, *, alike: bool = False, one_hot: bool = False, noise: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.probs = torch.softmax(0.7 * torch.randn(num_states, generator=generator, dtype=DTYPE), 0)
        self.loc = 1.5 * torch.randn(num_states, 2, generator=generator, dtype=DTYPE)
        scale = torch.linspace(0.5, 1.3, 2 * num_states, dtype=DTYPE).reshape(num_states, 2)
        self.scale = scale[:1].expand_as(scale) if alike else scale
        self.weight = torch.randn(3, 2, generator=generator, dtype=DTYPE)
        self.noise = noise * torch.tensor([0.9, 0.6, 1.2], dtype=DTYPE)
        self.one_hot = one_hot

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self.one_hot:
                y = pyro.sample("y", dist.OneHotCategorical(self.probs), infer={"enumerate": "parallel"})
                loc, scale = y @ self.loc, y @ self.scale
            else:
                y = pyro.sample("y", dist.Categorical(self.probs))
                loc, scale = self.loc[y], self.scale[y]
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.noise).to_event(1), obs=x)

    def data(self, number: int, seed: int = 1) -> Tensor:
        """Data that the model draws."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            y = torch.multinomial(self.probs, number, replacement=True)
            z = self.loc[y] + self.scale[y] * torch.randn(number, 2, dtype=DTYPE)
            return z @ self.weight.T + self.noise * torch.randn(number, 3, dtype=DTYPE)

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) `(N, K)`."""
        columns = []
        for k, p in enumerate(self.probs):
            covariance = self.weight @ torch.diag(self.scale[k] ** 2) @ self.weight.T + torch.diag(self.noise**2)
            columns.append(p.log() + MultivariateNormal(self.weight @ self.loc[k], covariance).log_prob(x))
        return torch.stack(columns, -1)

    def precisions(self) -> Tensor:
        """P_y `(K, 2, 2)`."""
        return torch.diag_embed(self.scale**-2) + self.weight.T @ torch.diag(self.noise**-2) @ self.weight

    def means(self, x: Tensor) -> Tensor:
        """m_y `(N, K, 2)`."""
        linear = (x / self.noise**2 @ self.weight)[:, None] + self.loc / self.scale**2
        return torch.linalg.solve(self.precisions(), linear[..., None])[..., 0]

    def best_bounds(self, x: Tensor) -> Tensor:
        """The best ELBO of z by independent Normals given each y, `(N, K)`: A_y."""
        precision = self.precisions()
        lost = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))
        return self.log_joint(x) - lost

    def best_shared(self, x: Tensor) -> Tensor:
        """The best ELBO `(N,)` of q(y) q(z) with independent Normals, where all y have the same precision P.

        Given q(y) the best q(z) has the mean of the m_y and the precisions P_ii; what is left is maximised by many
        starts.
        """
        precision, means, bounds = self.precisions()[0], self.means(x), self.best_bounds(x)

        def elbo(log_q: Tensor) -> Tensor:
            q = log_q.exp()
            apart = means - (q[..., None] * means).sum(1, keepdim=True)
            spread = 0.5 * torch.einsum("nki,ij,nkj->nk", apart, precision, apart)
            return (q * (bounds - spread - log_q)).sum(-1)

        starts = [*(6 * torch.eye(len(self.probs), dtype=DTYPE)), torch.zeros_like(self.probs)]
        return best_of([[start.repeat(len(x), 1)] for start in starts], lambda free: elbo(free[0].log_softmax(-1)))


def best_of(starts: list[list[Tensor]], elbo: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """The highest `elbo` `(N, *)` that optimisations from `starts` reach, for every entry."""
    reached = []
    for start in starts:
        free = [value.clone().requires_grad_() for value in start]
        search = torch.optim.LBFGS(
            free, max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-13, line_search_fn="strong_wolfe"
        )

        def loss(free: list[Tensor] = free, search: torch.optim.LBFGS = search) -> Tensor:
            search.zero_grad()
            value = -elbo(free).sum()
            value.backward()
            return value

        search.step(loss)
        reached.append(elbo(free).detach())
    return torch.stack(reached).amax(0)


class MixtureGuide(nn.Module):
    """q(y | x) q(z | x, y), or q(z | x) where `shared`; with wrong numbers, so that there is something to find."""

    def __init__(self, num_states: int = 3, *, shared: bool = False, one_hot: bool = False, seed: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.logits = nn.Linear(3, num_states, dtype=DTYPE)
            self.latents = nn.Linear(3, 4, dtype=DTYPE)
            self.shift = nn.Parameter(torch.randn(num_states, 4, dtype=DTYPE))
        self.shared, self.one_hot = shared, one_hot

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits, h = self.logits(x), self.latents(x)
            if self.one_hot:
                y = pyro.sample("y", dist.OneHotCategorical(logits=logits), infer={"enumerate": "sequential"})
                h = h if self.shared else h + y @ self.shift
            else:
                y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                h = h if self.shared else h + self.shift[y]
            pyro.sample("z", dist.Normal(h[..., :2], (0.3 * h[..., 2:]).exp()).to_event(1))


class Sites(nn.Module):
    """y1 ~ Bernoulli, y2 ~ Categorical given y1, z | y2 ~ N(mu_y2, s_y2), x | z, y1 ~ N(z + c_y1, v), all scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.tensor(0.4, dtype=DTYPE)
        self.second = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=DTYPE)
        self.loc, self.scale = torch.tensor([-1.5, 0.2, 2.0], dtype=DTYPE), torch.tensor([0.5, 1.0, 0.7], dtype=DTYPE)
        self.shift, self.noise = torch.tensor([-0.8, 0.9], dtype=DTYPE), torch.tensor(0.8, dtype=DTYPE)
        self.states = torch.cartesian_prod(torch.arange(2), torch.arange(3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y1 = pyro.sample("y1", dist.Bernoulli(self.first)).long()
            y2 = pyro.sample("y2", dist.Categorical(self.second[y1]))
            z = pyro.sample("z", dist.Normal(self.loc[y2], self.scale[y2]))
            pyro.sample("x", dist.Normal(z + self.shift[y1], self.noise), obs=x)

    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p(y), the mean and scale of z, and the shift of x, of the six joint states."""
        y1, y2 = self.states.T
        prior = torch.where(y1 == 1, self.first, 1 - self.first).log() + self.second[y1, y2].log()
        return prior, self.loc[y2], self.scale[y2], self.shift[y1]

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) `(N, 6)`."""
        prior, loc, scale, shift = self.given()
        return prior + dist.Normal(loc + shift, (scale**2 + self.noise**2).sqrt()).log_prob(x[:, None])

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean `(N, 6)` and scale `(6,)` of z given y."""
        _, loc, scale, shift = self.given()
        precision = scale**-2 + self.noise**-2
        return (loc / scale**2 + (x[:, None] - shift) / self.noise**2) / precision, precision.rsqrt()

    def elbo(self, x: Tensor, log_q: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """The ELBO `(N,)` of a table log q(y) `(N, 6)` and Normals of z given each joint state, `(N, 6)`."""
        mean, deviation = self.moments(x)
        kl = 0.5 * (((scale / deviation) ** 2 + ((loc - mean) / deviation) ** 2 - 1) - 2 * (scale / deviation).log())
        return (log_q.exp() * (self.log_joint(x) - kl - log_q)).sum(-1)


class SitesGuide(nn.Module):
    """q(y1) q(y2 | y1) q(z | y1, y2) for `Sites`; leave a dependence out by naming fewer of "21", "z1" and "z2"."""

    def __init__(self, links: tuple[str, ...] = ("21", "z1", "z2")) -> None:
        super().__init__()
        self.links = links
        self.first = nn.Parameter(torch.tensor([0.3, -0.2], dtype=DTYPE))
        self.second = nn.Parameter(torch.tensor([[0.1, 0.4, -0.3], [0.5, 0.0, 0.2]], dtype=DTYPE))
        self.tilt = nn.Parameter(torch.tensor([-0.6, 0.1, 0.7], dtype=DTYPE))
        self.loc = nn.Parameter(torch.tensor([[-1.0, 0.3, 1.5], [-0.7, 0.1, 1.0]], dtype=DTYPE))
        self.scale = nn.Parameter(torch.tensor(-0.3, dtype=DTYPE))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y1 = pyro.sample("y1", dist.Bernoulli(logits=self.first[0] + self.first[1] * x)).long()
            row = y1 if "21" in self.links else torch.zeros_like(y1)
            y2 = pyro.sample("y2", dist.Categorical(logits=self.second[row] + self.tilt * x[:, None]))
            row = y1 if "z1" in self.links else torch.zeros_like(y1)
            column = y2 if "z2" in self.links else torch.zeros_like(y2)
            pyro.sample("z", dist.Normal(self.loc[row, column] + 0.3 * x, self.scale.exp()))


def best_of_sites(model: Sites, links: tuple[str, ...], x: Tensor) -> Tensor:
    """The best ELBO `(N,)` of the family of `SitesGuide(links)`, free for every datapoint, by many optimisations."""
    y1, y2 = model.states.T
    row = y1 if "z1" in links else torch.zeros_like(y1)
    column = y2 if "z2" in links else torch.zeros_like(y2)
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(x), 2), (len(x), 2, 3), (len(x), 2, 3), (len(x), 2, 3)]
    starts = [[2 * torch.randn(shape, generator=generator, dtype=DTYPE) for shape in shapes] for _ in range(6)]

    def elbo(free: list[Tensor]) -> Tensor:
        second = free[1].log_softmax(-1)[:, y1 if "21" in links else torch.zeros_like(y1), y2]
        log_q = free[0].log_softmax(-1)[:, y1] + second
        return model.elbo(x, log_q, free[2][:, row, column], (2 * free[3][:, row, column].tanh()).exp())

    return best_of(starts, elbo)


class ClassVAE(nn.Module):
    """A semi-supervised VAE without labels: y ~ Categorical, z ~ N(0, 1), binary x from a network of both; tiny, so
    that everything is a sum over y and an integral over one z.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.weight = nn.Parameter(1.5 * torch.randn(3, 5, dtype=DTYPE))
            self.bias = nn.Parameter(torch.randn(3, 5, dtype=DTYPE))
        self.probs = torch.tensor([0.5, 0.3, 0.2], dtype=DTYPE)

    def logits(self, y: Tensor, z: Tensor) -> Tensor:
        """Of x, from one-hot y `(*, 3)` and z `(*)`."""
        return y @ self.bias + (1.5 * z[..., None]).tanh() * (y @ self.weight)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(self.probs))
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=DTYPE), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=self.logits(y, z)).to_event(1), obs=x)

    def log_density(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, y, z) `(*, N, 3)` at z `(*, N, 3)`, one for each y."""
        likelihood = dist.Bernoulli(logits=self.logits(torch.eye(3, dtype=DTYPE), z)).log_prob(x[:, None]).sum(-1)
        return self.probs.log() + dist.Normal(0.0, 1.0).log_prob(z) + likelihood

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) `(N,)` by the trapezoidal rule."""
        z = torch.linspace(-9, 9, 4001, dtype=DTYPE)
        step = math.log(18 / 4000)
        return (self.log_density(x, z[:, None, None].expand(-1, len(x), 3)).logsumexp(0) + step).logsumexp(-1)

    def bounds(self, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """A_y `(N, 3)` of Normals of z given y, by quadrature."""
        noise = torch.linspace(-8, 8, 301, dtype=DTYPE)
        share = torch.softmax(-0.5 * noise**2, 0)
        z = loc + scale * noise[:, None, None]
        value = self.log_density(x, z) - dist.Normal(loc, scale).log_prob(z)
        return (share[:, None, None] * value).sum(0)

    def best_bounds(self, x: Tensor) -> Tensor:
        """The best A_y, by optimisation from several starts."""
        like = torch.zeros(len(x), 3, dtype=DTYPE)
        starts = [[like + start, like - 0.3] for start in (-1.5, -0.5, 0.5, 1.5)]
        return best_of(starts, lambda free: self.bounds(x, free[0], (3 * (free[1] / 3).tanh()).exp()))


class ClassGuide(nn.Module):
    """q(y | x) q(z | x, y) of `ClassVAE`."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.logits = nn.Linear(5, 3, dtype=DTYPE)
            self.latents = nn.Linear(5, 2, dtype=DTYPE)
            self.shift = nn.Parameter(0.5 * torch.randn(3, 2, dtype=DTYPE))

    def given(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of z, from one-hot y."""
        h = self.latents(x) + y @ self.shift
        return h[..., 0], (0.5 * h[..., 1] - 0.5).exp()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.logits(x)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(*self.given(x, y)))


ONLY = torch.tensor([[0.2, 0.1], [0.3, 0.4]], dtype=DTYPE)
LEVELS = torch.tensor([[-1.0, 0.4], [0.9, 2.0]], dtype=DTYPE)


def only_states(x: Tensor) -> None:
    """Two discrete latents, of which the second depends on the first, and nothing else."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(ONLY.sum(1)))
        b = pyro.sample("b", dist.Categorical(ONLY[a]))
        pyro.sample("x", dist.Normal(LEVELS[a, b], 0.7), obs=x)


MOVE = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=DTYPE)
STEPS = torch.tensor([-1.0, 2.0], dtype=DTYPE)


def ragged_chain(y: Tensor, lengths: Tensor) -> None:
    """Chains of two states of different lengths, with one continuous latent for each."""
    with pyro.plate("data", len(y), dim=-1):
        a, k = pyro.sample("z", dist.Normal(0.0, 1.0)), 0
        for t in pyro.markov(range(y.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):
                k = pyro.sample(f"k{t}", dist.Categorical(MOVE[k]))
                pyro.sample(f"y{t}", dist.Normal(STEPS[k] + a, 1.0), obs=y[:, t])
