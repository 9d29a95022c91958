"""Random Pyro programs: valid pairs of model and guide by construction, and pairs with one fault each.

`python -m tests.fuzz [NUMBER [FIRST]]` runs the checks of `test_fuzz` on many seeds and counts the outcomes.
"""

import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.nn.functional import softplus

import pyrogaps as pg

DTYPE = torch.float64


@dataclass(frozen=True)
class Latent:
    """A latent site: its distribution's name, its shape per datapoint, and where it stands."""

    name: str
    kind: str
    shape: tuple[int, ...]  # event shape, outside of plates
    nested: int = 0  # size of a plate inside the data plate, 0 for none
    masked: bool = False
    depends: str | None = None  # an earlier site that its location follows


@dataclass(frozen=True)
class Spec:
    """A random program, described."""

    seed: int
    number: int
    width: int
    latents: tuple[Latent, ...]
    likelihood: str
    factor: bool
    mask_observed: bool
    scaled_plate: bool
    guide: str
    fault: str | None = None

    @property
    def one_dimensional(self) -> bool:
        return len(self.latents) == 1 and self.latents[0].shape == () and not self.latents[0].nested


def positive(location: Tensor) -> Tensor:
    return 0.2 + softplus(location)


# Of a location `(*batch)`: a distribution of that batch shape. Bounds are tensors that follow the location.
SCALARS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda u: dist.Normal(u, 0.5 + u.detach().abs() * 0 + 0.5),
    "laplace": lambda u: dist.Laplace(u, torch.ones_like(u)),
    "student": lambda u: dist.StudentT(torch.full_like(u, 5.0), u, torch.ones_like(u)),
    "lognormal": lambda u: dist.LogNormal(0.3 * u, 0.5 * torch.ones_like(u)),
    "gamma": lambda u: dist.Gamma(1.0 + positive(u), torch.ones_like(u)),
    "exponential": lambda u: dist.Exponential(positive(u)),
    "halfnormal": lambda u: dist.HalfNormal(positive(u)),
    "beta": lambda u: dist.Beta(1.0 + positive(u), 2.0 * torch.ones_like(u)),
    "uniform": lambda u: dist.Uniform(torch.full_like(u, -1.0), torch.full_like(u, 2.0)),
    "pareto": lambda u: dist.Pareto(torch.full_like(u, 1.5), 3.0 * torch.ones_like(u)),
    "inverse gamma": lambda u: dist.InverseGamma(2.0 + positive(u), torch.ones_like(u)),
    "gumbel": lambda u: dist.Gumbel(u, torch.ones_like(u)),
    "shifted": lambda u: dist.TransformedDistribution(
        dist.Normal(u, torch.ones_like(u)), [dist.transforms.AffineTransform(0.5, 2.0)]
    ),
    "sigmoid normal": lambda u: dist.TransformedDistribution(
        dist.Normal(u, torch.ones_like(u)), [dist.transforms.SigmoidTransform()]
    ),
}
VECTORS: dict[str, Callable[[Tensor], Any]] = {
    "independent": lambda u: dist.Normal(u, 1.0).to_event(1),
    "multivariate": lambda u: dist.MultivariateNormal(u, torch.eye(u.shape[-1], dtype=u.dtype)),
    "dirichlet": lambda u: dist.Dirichlet(1.0 + positive(u)),
    "independent gamma": lambda u: dist.Gamma(1.0 + positive(u), 1.0).to_event(1),
}
LIKELIHOODS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda u: dist.Normal(u, 0.8),
    "laplace": lambda u: dist.Laplace(u, 1.0),
    "bernoulli": lambda u: dist.Bernoulli(logits=u),
    "poisson": lambda u: dist.Poisson(0.1 + softplus(u)),
    "gamma": lambda u: dist.Gamma(0.5 + softplus(u), 1.0),
    "student": lambda u: dist.StudentT(4.0, u, 1.0),
}
# What is wrong with the pair or its data, and words that its message must hold.
FAULTS: dict[str, tuple[str, ...]] = {
    "latent outside the plate": ("plate",),
    "hard-coded plate": ("plate", "hard-coded"),
    "site missing from the guide": ("site 'a'", "missing"),
    "site missing from the model": ("site 'extra'",),
    "observed in the guide": ("observed",),
    "factor in the guide": ("factor",),
    "another support": ("site 'a'", "support"),
    "NaN in the data": ("NaN",),
    "NaN in a parameter": ("NaN",),
    "batch statistics in the model": ("rows",),
    "batch statistics in the guide": ("rows",),
    "delta in the guide": ("site 'a'", "Delta"),
    "wrong shape in the guide": ("site 'a'", "shape"),
    "unknown plate": ("plate",),
    "fails on a subset": ("guide",),
    "random density": ("data",),
}


def random_spec(seed: int, fault: str | None = None) -> Spec:
    """The description of the program with this seed."""
    draw = Random(seed)
    latents: list[Latent] = []
    for name in "abc"[: draw.choice([1, 1, 2, 2, 3])]:
        vector = draw.random() < 0.35
        kind = draw.choice([*(VECTORS if vector else SCALARS)])
        earlier = [latent.name for latent in latents]
        latents.append(
            Latent(
                name,
                kind,
                (draw.choice([2, 3]),) if vector else (),
                nested=draw.choice([0, 0, 0, 2]),
                masked=draw.random() < 0.15 and bool(latents),
                depends=draw.choice(earlier) if earlier and draw.random() < 0.6 else None,
            )
        )
    return Spec(
        seed,
        number=draw.choice([1, 2, 3, 4, 6]),
        width=draw.choice([1, 2, 3]),
        latents=tuple(latents),
        likelihood=draw.choice([*LIKELIHOODS]),
        factor=draw.random() < 0.15,
        mask_observed=draw.random() < 0.2,
        scaled_plate=draw.random() < 0.1,
        guide=draw.choice(["bijected", "same family", "sequential", "AutoNormal"]),
        fault=fault,
    )


def prior(latent: Latent, location: Tensor) -> Any:
    return (VECTORS if latent.shape else SCALARS)[latent.kind](location)


@dataclass
class Program:
    """Model and guide of a spec, and data; what they share is the way they walk the sites."""

    spec: Spec
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.spec.seed)
        spec = self.spec
        x = torch.randn(spec.number, spec.width, dtype=DTYPE, generator=generator)
        if spec.likelihood == "bernoulli":
            x = (x > 0).to(DTYPE)
        elif spec.likelihood == "poisson":
            x = x.abs().round()
        elif spec.likelihood == "gamma":
            x = x.abs() + 0.1
        if spec.fault == "NaN in the data":
            x[-1, 0] = torch.nan
        self.x = x

    def model(self, x: Tensor) -> None:
        spec, total, drawn = self.spec, 0.0, {}
        if spec.fault == "latent outside the plate":
            total = pyro.sample("outside", dist.Normal(torch.zeros((), dtype=DTYPE), 1.0))
        if spec.fault == "random density":
            total = total + torch.randn((), dtype=DTYPE)
        number = spec.number if spec.fault == "hard-coded plate" else len(x)
        with pyro.plate("data", number), ExitStack() as stack:
            if spec.scaled_plate:
                stack.enter_context(poutine.scale(scale=torch.tensor(3.0, dtype=DTYPE)))
            for latent in spec.latents:
                drawn[latent.name] = self._draw(latent, x, drawn)
                total = total + _summary(latent, drawn[latent.name])
            if spec.fault == "batch statistics in the model":
                total = total + x.mean()
            seen = (x[:, 0] < 0.7) if spec.mask_observed else torch.ones(len(x), dtype=torch.bool)
            location = torch.as_tensor(total).expand(len(x))[:, None].expand(len(x), spec.width)
            with poutine.mask(mask=seen):
                pyro.sample("x", LIKELIHOODS[spec.likelihood](location).to_event(1), obs=x)
            if spec.factor:
                pyro.factor("tilt", -0.1 * torch.as_tensor(total).expand(len(x)) ** 2)

    def _draw(self, latent: Latent, x: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        location = 0.3 * x[:, 0]
        if latent.depends is not None:
            by_name = {other.name: other for other in self.spec.latents}
            location = location + 0.3 * _summary(by_name[latent.depends], drawn[latent.depends])
        with ExitStack() as stack:
            if latent.nested:
                stack.enter_context(pyro.plate(f"{latent.name} parts", latent.nested, dim=-2))
                location = location.expand(latent.nested, len(x))
            if latent.masked:
                stack.enter_context(poutine.mask(mask=x[:, 0] > -0.5))
            if latent.shape:
                location = location[..., None].expand(*location.shape, *latent.shape)
            return pyro.sample(latent.name, prior(latent, location))  # type: ignore[no-any-return]

    def guide(self) -> Any:
        if self.spec.guide == "AutoNormal":
            guide = AutoNormal(self.model)
            guide(self.x)
            return guide
        return Guide(self.spec)


def _summary(latent: Latent, value: Tensor) -> Tensor:
    """One bounded number per datapoint that further sites depend on, `(N,)`."""
    bounded = torch.tanh(value / 3.0)
    bounded = bounded.sum(-1) if latent.shape else bounded
    return bounded.sum(-2) if latent.nested else bounded


class Guide(nn.Module):
    """A Normal in unconstrained space for each site, or a member of the prior's family; amortized over x."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        torch.manual_seed(spec.seed)
        self.nets = nn.ModuleDict({latent.name: nn.Linear(spec.width, 2, dtype=DTYPE) for latent in spec.latents})
        for net in self.nets.values():
            nn.init.normal_(net.weight, std=0.05)
            nn.init.zeros_(net.bias)
        if spec.fault == "NaN in a parameter":
            self.nets["a"].weight.data[0, 0] = torch.nan

    def forward(self, x: Tensor) -> None:
        spec, drawn = self.spec, 0.0
        if spec.fault == "fails on a subset" and len(x) != spec.number:
            raise ValueError("needs the whole data set")
        with pyro.plate("data", len(x)):
            for latent in spec.latents:
                if not (spec.fault == "site missing from the guide" and latent.name == "a"):
                    drawn = self._draw(latent, x, drawn)
            if spec.fault == "site missing from the model":
                pyro.sample("extra", dist.Normal(x[:, 0], 1.0))
            if spec.fault == "observed in the guide":
                pyro.sample("seen", dist.Normal(x[:, 0], 1.0), obs=x[:, 0])
            if spec.fault == "factor in the guide":
                pyro.factor("tilt", x[:, 0])

    def _draw(self, latent: Latent, x: Tensor, before: Any) -> Any:
        spec, first = self.spec, latent.name == "a"
        location, log_scale = self.nets[latent.name](x).unbind(-1)
        if spec.guide == "sequential":
            location = location + 0.1 * before
        if spec.fault == "batch statistics in the guide":
            location = location + x.mean() * (1 + location.detach().abs())
        with ExitStack() as stack:
            if latent.nested:
                stack.enter_context(pyro.plate(f"{latent.name} parts", latent.nested, dim=-2))
                location = location.expand(latent.nested, len(x))
            shape = latent.shape
            if first and spec.fault == "wrong shape in the guide":
                shape = (5,)
            if shape:
                location = location[..., None].expand(*location.shape, *shape)
            value = pyro.sample(latent.name, self._distribution(latent, location, log_scale, x, len(shape)))
        return _summary(Latent("", "", shape, latent.nested), value)

    def _distribution(self, latent: Latent, location: Tensor, log_scale: Tensor, x: Tensor, event_dim: int) -> Any:
        first, fault = latent.name == "a", self.spec.fault
        if first and fault == "wrong shape in the guide":
            return dist.Normal(location, 1.0).to_event(1)
        own = prior(latent, location)
        if first and fault == "delta in the guide":
            return dist.Delta(
                biject_to(own.support)(torch.zeros_like(biject_to(own.support).inv(own.sample()))), event_dim=event_dim
            )
        if first and fault == "another support":
            real = own.support in (constraints.real, constraints.real_vector) or (event_dim and "norm" in latent.kind)
            other = dist.Gamma(2.0 + 0 * location, 1.0) if real else dist.Normal(location, 1.0)
            return other.to_event(event_dim) if event_dim else other
        if self.spec.guide == "same family" and latent.kind not in ("uniform", "pareto"):
            return own
        transform = biject_to(own.support)
        shape = transform.inv(own.sample()).shape
        size = shape[-1] if event_dim else None
        base_location = location if size is None else location[..., :1].expand(*location.shape[:-1], size)
        scale = log_scale.exp() if size is None else log_scale.exp()[..., None]
        base = dist.Normal(base_location, scale.expand(base_location.shape))
        return dist.TransformedDistribution(base.to_event(1) if event_dim else base, [transform])


SETTINGS: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=30),
    "evidence": pg.AIS(num_chains=4, num_temperatures=5, num_leapfrog=2),
    "num_particles": 100,
    "progress": False,
}


def check(spec: Spec) -> str:
    """Run everything that must hold of a program; returns the outcome in a word. Raises `AssertionError`."""
    pyro.clear_param_store()
    program = Program(spec)
    guide = program.guide() if spec.fault is None else Guide(spec)
    plate = "nowhere" if spec.fault == "unknown plate" else None
    state = _state()
    try:
        ledger = pg.decompose(program.model, guide, program.x, plate=plate, seed=spec.seed, **SETTINGS)
    except pg.InputError as error:
        _check_state(state)
        _check_refusal(spec, str(error))
        return "refused"
    _check_state(state)
    assert spec.fault is None, f"{spec.fault}: accepted"
    _check_sums(ledger)
    _check_density(program)
    again = pg.decompose(program.model, guide, program.x, seed=spec.seed, **SETTINGS)
    assert again.per_datapoint.identical(ledger.per_datapoint), "the same seed gave another ledger"
    if spec.one_dimensional:
        _check_evidence(program, guide)
    return "measured"


def _check_refusal(spec: Spec, message: str) -> None:
    assert "\n" not in message
    assert spec.fault is not None, f"valid by construction, but refused: {message}"
    missing = [word for word in FAULTS[spec.fault] if word not in message]
    assert not missing, f"{spec.fault}: the message does not say {missing}: {message}"


def _state() -> tuple[Any, ...]:
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    return (
        torch.get_rng_state(),
        store,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        len(poutine.runtime._PYRO_STACK),
    )


def _check_state(before: tuple[Any, ...]) -> None:
    after = _state()
    assert torch.equal(before[0], after[0]), "the generator's state changed"
    assert before[1].keys() == after[1].keys(), "the param store changed"
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1]), "a parameter changed"
    assert before[2:] == after[2:], "dtype, grad mode or handlers changed"


def _check_sums(ledger: pg.GapLedger) -> None:
    gaps = ledger.gaps["mean"]
    parts = [name for name in gaps["gap"].values if str(gaps["gap"].sel(gap=name).item()) != "inference_gap"]
    total = sum(float(gaps.sel(gap=name)) for name in parts)
    assert np.isfinite(gaps.values).all(), f"a gap is not finite: {gaps.values}"
    assert abs(total - float(gaps.sel(gap="inference_gap"))) < 1e-5, "children do not sum to their parent"


def _check_density(program: Program) -> None:
    """log p(x, z) of each datapoint against Pyro's own trace of the data set, at random points."""
    joint = pg.JointDensity(program.model, program.x)
    number = len(program.x)
    z = torch.randn(1, number, joint.dim, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
    active = joint.active(torch.arange(number))
    z = z if active is None else torch.where(active, z, torch.zeros_like(z))
    values = {name: value[0] for name, value in joint.constrain(z).items()}
    handler = joint.run(z[0], joint.fetch(torch.arange(number)), torch.arange(number))
    ours = float((handler.log_prior + handler.log_likelihood - handler.log_jacobian).sum())
    placed = {latent.name: _as_drawn(latent, values[latent.name]) for latent in program.spec.latents}
    trace = poutine.trace(poutine.condition(program.model, placed)).get_trace(program.x)
    trace.compute_log_prob()
    theirs = sum(float(_unscaled(node).sum()) for node in trace.nodes.values() if node["type"] == "sample")
    assert abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs)), f"log p(x, z) is {ours}, by Pyro's trace {theirs}"


def _as_drawn(latent: Latent, value: Tensor) -> Tensor:
    """From the datapoint's axis in front to where the plates have it."""
    return value.movedim(0, 1) if latent.nested else value


def _unscaled(node: Any) -> Tensor:
    return node["log_prob"] / node["scale"] if "log_prob" in node else torch.zeros(())


def _check_evidence(program: Program, guide: Any) -> None:
    """log p(x) against quadrature over the one latent."""
    settings = {**SETTINGS, "refinement": pg.Refinement(num_steps=300), "evidence": pg.AIS(64, 60, num_leapfrog=4)}
    ledger = pg.decompose(program.model, guide, program.x, seed=program.spec.seed, **settings)
    joint = pg.JointDensity(program.model, program.x)
    grid = torch.linspace(-30, 30, 12_001, dtype=DTYPE)
    z = grid[:, None, None].expand(-1, len(program.x), 1)
    exact = (torch.logsumexp(joint(z), 0) + torch.log(grid[1] - grid[0])).numpy()
    value, error = (ledger.per_datapoint[name].values for name in ("log_evidence", "log_evidence_mcse"))
    off = np.abs(value - exact) / np.hypot(error, 1e-4)
    assert (off < 5).all(), f"log p(x) is {value} ± {error}, by quadrature {exact}"


def spec_of(seed: int) -> Spec:
    """Four of five seeds are valid programs; the fifth has one fault."""
    names = [*FAULTS]
    if seed % 5 != 4:
        return random_spec(seed)
    spec = random_spec(seed, names[seed // 5 % len(names)])
    return spec


def main(number: int = 500, first: int = 0) -> int:
    """Check `number` seeds; print what failed, and the counts."""
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + number):
        began, spec = time.perf_counter(), spec_of(seed)
        try:
            outcome = check(spec)
        except AssertionError as error:
            outcome = "WRONG"
            print(f"{seed}: {error}\n    {spec}", flush=True)
        except Exception as error:
            outcome = "TRACEBACK"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{seed}: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})\n    {spec}", flush=True)
        outcomes[outcome] += 1
        if time.perf_counter() - began > 60:
            print(f"{seed}: took {time.perf_counter() - began:.0f} s", flush=True)
    print(dict(outcomes))
    return int(bool(outcomes["WRONG"] + outcomes["TRACEBACK"]))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
