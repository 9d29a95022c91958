"""Random Pyro programs: pairs of model and guide that are valid by construction, or have one fault."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import biject_to

import pyrogaps as pg
from tests.fuzz.distributions import (
    DISCRETE,
    LIKELIHOODS,
    MATRICES,
    MOVING,
    NO_OWN_FAMILY,
    SCALARS,
    TRUE_SUPPORTS,
    VECTORS,
)


@dataclass(frozen=True)
class Latent:
    """A latent site: its distribution's name, its shape per datapoint, and where it stands."""

    name: str
    kind: str
    shape: tuple[int, ...]  # event shape, outside of plates
    nested: int = 0  # size of a plate inside the data plate, 0 for none
    masked: str = ""  # "": not at all; "datapoint": for some of these; "part": some parts of the nested plate
    depends: str | None = None  # an earlier site that its location follows


@dataclass(frozen=True)
class Spec:
    """A random program, described."""

    seed: int
    number: int
    width: int
    latents: tuple[Latent, ...]
    likelihood: str
    observed: str  # "event": one site; "plate": one with a nested plate; "sites": one for each column
    form: str  # of the data
    factor: bool
    mask_observed: bool
    scaled_plate: bool
    subsampled_plate: bool  # Pyro's idiom for minibatches
    parameter: bool  # a pyro.param in the model
    guide: str
    dtype: torch.dtype = torch.float64
    default_dtype: torch.dtype = torch.float32
    fault: str | None = None
    discrete: tuple[str, ...] = ()  # distributions of discrete latents k0, k1, each following those before
    drawn: bool = False  # whether the guide draws them, or they are summed out
    shared: bool = False  # whether there is a latent m outside of the data plate, which all datapoints share

    @property
    def plate(self) -> bool | None:
        """The argument `plate` of the library's functions."""
        return False if self.guide == "AutoMultivariateNormal" else None

    @property
    def one_dimensional(self) -> bool:
        """Whether log p(x) is known by quadrature."""
        return not self.shared and len(self.latents) == 1 and self.latents[0].shape == () and not self.latents[0].nested


def random_spec(seed: int, fault: str | None = None) -> Spec:
    """The description of the program with this seed."""
    draw = Random(seed)
    latents: list[Latent] = []
    for name in "abc"[: draw.choice([1, 1, 2, 2, 3])]:
        kind = draw.choice([*(VECTORS if draw.random() < 0.35 else SCALARS)])
        size, nested = draw.choice([2, 3]), draw.choice([0, 0, 0, 2])
        earlier = [latent.name for latent in latents]
        mask = draw.choice(["datapoint", "part"] if nested else ["datapoint"])
        latents.append(
            Latent(
                name,
                kind,
                () if kind in SCALARS else (size, size) if kind in MATRICES else (size,),
                nested,
                masked=mask if draw.random() < 0.15 and latents else "",
                depends=draw.choice(earlier) if earlier and draw.random() < 0.6 and kind not in MOVING else None,
            )
        )
    likelihood = draw.choice([*LIKELIHOODS])
    counts, event = LIKELIHOODS[likelihood].counts, LIKELIHOODS[likelihood].event_dim
    forms = ["integers"] if counts and draw.random() < 0.5 else FORMS
    guides = ["bijected", "same family", "sequential", "per datapoint", "AutoNormal"]
    if fault:  # in the plainest surroundings, where its words are known
        guides, forms = guides[:3], ["tensor"]
    elif {latent.kind for latent in latents} & {*TRUE_SUPPORTS}:
        guides = guides[:4]
    elif draw.random() < 0.04 and not any(
        latent.masked for latent in latents
    ):  # one point of many dimensions, and slow
        guides = ["AutoMultivariateNormal"]
    spec = Spec(
        seed,
        number=draw.choice([1, 2, 3, 4, 6] if fault is None else [2, 3, 4]),
        width=draw.choice([1, 2, 3]),
        latents=tuple(latents),
        likelihood=likelihood,
        observed=draw.choice(["event"] if event else ["event", "event", "plate", "sites"]),
        form=draw.choice(forms),
        factor=draw.random() < 0.15,
        mask_observed=draw.random() < 0.2,
        scaled_plate=draw.random() < 0.1,
        subsampled_plate=draw.random() < 0.15 and not fault,
        parameter=draw.random() < 0.15,
        guide=draw.choice(guides),
        dtype=draw.choice([torch.float64, torch.float64, torch.float32]),
        default_dtype=draw.choice([torch.float32, torch.float32, torch.float64]),
        fault=fault,
    )
    return spec if fault else _with_other_latents(spec, Random(f"other latents {seed}"))


def _with_other_latents(spec: Spec, draw: Random) -> Spec:
    """One of three programs has discrete latents, or one that all datapoints share; by numbers of its own, so that
    programs of earlier seeds stay what they were.
    """
    kind = draw.random()
    if kind < 0.25 and spec.guide not in ("AutoNormal", "AutoMultivariateNormal"):  # which would draw them as Normals
        discrete = tuple(draw.choice([*DISCRETE]) for _ in range(draw.choice([1, 1, 2])))
        return replace(spec, discrete=discrete, drawn=draw.random() < 0.3)
    is_shared = kind > 0.9 and spec.guide != "AutoMultivariateNormal" and spec.number > 1
    return replace(spec, shared=is_shared)


# How the data are given: integers, and those with a second tensor, are among them.
FORMS = ["tensor", "array", "other dtype", "tuple", "indexed", "dictionary"]


def prior(latent: Latent, location: Tensor) -> Any:
    return (VECTORS if latent.shape else SCALARS)[latent.kind](location)


def transform_to_support(latent: Latent, fn: Any) -> Any:
    support = TRUE_SUPPORTS[latent.kind](fn) if latent.kind in TRUE_SUPPORTS else fn.support
    return biject_to(support)


@dataclass
class Program:
    """Model and guide of a spec, and data; what they share is the way they walk the sites."""

    spec: Spec
    x: Tensor = field(init=False)
    weight: Tensor = field(init=False)  # a second number of each datapoint, in some forms of the data

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.spec.seed)
        spec = self.spec
        x = torch.randn(spec.number, spec.width, dtype=torch.float64, generator=generator).to(spec.dtype)
        x = LIKELIHOODS[spec.likelihood].data(x)
        self.weight = torch.rand(spec.number, dtype=torch.float64, generator=generator).to(spec.dtype)
        if spec.fault == "NaN in the data":
            x[-1, 0] = torch.nan
        self.x = x

    @property
    def data(self) -> Any:
        """The data in their form."""
        x, weight, other = self.x, self.weight, {torch.float32: torch.float64, torch.float64: torch.float32}
        forms: dict[str, Any] = {
            "tensor": x,
            "array": x.numpy(),
            "integers": x.long(),
            "other dtype": x.to(other[self.spec.dtype]),
            "tuple": (x, weight),
            "indexed": pg.IndexedData(len(x), lambda rows: (x[rows], weight[rows])),
            "dictionary": pg.IndexedData(len(x), lambda rows: ({"x": x[rows], "weight": weight[rows]},)),
        }
        return forms[self.spec.form]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The model's arguments for all data."""
        data = self.data
        data = data.fetch(torch.arange(self.spec.number)) if isinstance(data, pg.IndexedData) else data
        return data if isinstance(data, tuple) else (torch.as_tensor(data),)

    def model(self, *args: Any) -> None:
        spec, drawn, (x, weight) = self.spec, {}, read(self.spec, *args)
        total: Any = 0.3 * weight
        if spec.fault == "latent outside the plate":
            total = pyro.sample("outside", dist.Normal(torch.zeros((), dtype=spec.dtype), 1.0))
        if spec.shared:
            total = total + 0.5 * pyro.sample("m", dist.Normal(torch.zeros((), dtype=spec.dtype), 0.5))
        if spec.fault == "random density":
            total = total + torch.randn((), dtype=spec.dtype)
        with self._plate(x) as rows, ExitStack() as stack:
            if spec.fault == "rows drawn with replacement":
                x = x[rows]
            if spec.scaled_plate:
                stack.enter_context(poutine.scale(scale=torch.tensor(3.0, dtype=spec.dtype)))
            for latent in spec.latents:
                drawn[latent.name] = self._draw(latent, x, drawn)
                total = total + _summary(latent, drawn[latent.name])
            for value in draw_discrete(spec, 0.3 * x[:, 0]):
                total = total + 0.4 * value
            if spec.fault == "batch statistics in the model":
                total = total + x.mean()
            if spec.parameter:
                total = total * pyro.param(
                    "slope", torch.tensor(0.9, dtype=spec.dtype), constraint=constraints.positive
                )
            location = torch.as_tensor(total)  # with dimensions of enumerated values, left of the plates
            location = location.expand(torch.broadcast_shapes(location.shape, (len(x),)))
            seen = (x[:, 0] < 0.7) if spec.mask_observed else torch.ones(len(x), dtype=torch.bool)
            with poutine.mask(mask=seen):
                self._observe(location, x, *args)
            if spec.factor:
                pyro.factor("tilt", -0.1 * location**2)

    def _plate(self, x: Tensor) -> Any:
        spec = self.spec
        if spec.fault == "rows drawn with replacement":
            return pyro.plate("data", len(x), subsample=torch.randint(len(x), (len(x),)))
        if spec.subsampled_plate:
            return pyro.plate("data", spec.number, subsample_size=len(x))
        return pyro.plate("data", spec.number if spec.fault == "hard-coded plate" else len(x))

    def _observe(self, location: Tensor, x: Tensor, *args: Any) -> None:
        spec, likelihood = self.spec, LIKELIHOODS[self.spec.likelihood]
        if spec.form == "integers" and spec.likelihood != "negative binomial":  # whose log_prob takes none
            x = args[0]
        if spec.observed == "sites":
            for column in range(spec.width):
                pyro.sample(f"x{column}", likelihood.of(location), obs=x[:, column])
        elif spec.observed == "plate":
            with pyro.plate("columns", spec.width, dim=-2):
                shape = torch.broadcast_shapes(location.shape, (spec.width, len(x)))
                pyro.sample("x", likelihood.of(location.expand(shape)), obs=x.T)
        else:
            fn = likelihood.of(location[..., None].expand(*location.shape, spec.width))
            pyro.sample("x", fn.to_event(1 - likelihood.event_dim), obs=x)

    def _draw(self, latent: Latent, x: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        location = 0.3 * x[:, 0]
        if latent.depends is not None:
            by_name = {other.name: other for other in self.spec.latents}
            location = location + 0.3 * _summary(by_name[latent.depends], drawn[latent.depends])
        with _nested_plate(latent, x), ExitStack() as stack:
            location = _expand(latent, location, latent.shape)
            if latent.masked:
                threshold = torch.tensor([-0.5, 0.5])[:, None] if latent.masked == "part" else -0.5
                stack.enter_context(poutine.mask(mask=x[:, 0] > threshold))
            return pyro.sample(latent.name, prior(latent, location))  # type: ignore[no-any-return]

    def guide(self) -> Any:
        autoguides = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
        if self.spec.guide in autoguides:
            guide: Any = autoguides[self.spec.guide](self.model)
        else:
            guide = Guide(self.spec)
        guide(*self.arguments)  # which makes its parameters
        return guide


def read(spec: Spec, first: Any, weight: Any = 0.0) -> tuple[Tensor, Any]:
    """The tensor x in the program's dtype, and the weights, of a model's arguments."""
    if isinstance(first, dict):
        first, weight = first["x"], first["weight"]
    return first.to(spec.dtype), weight


def draw_discrete(spec: Spec, location: Tensor) -> list[Tensor]:
    """The discrete latents of a program or a guide, as numbers about 0."""
    values: list[Tensor] = []
    for place, kind in enumerate(spec.discrete):
        before = location + 0.5 * sum(values, torch.zeros((), dtype=spec.dtype))
        values.append(pyro.sample(f"k{place}", DISCRETE[kind](before)).to(spec.dtype) - 0.5)
    return values


def _nested_plate(latent: Latent, x: Tensor) -> Any:
    return pyro.plate(f"{latent.name} parts", latent.nested, dim=-2) if latent.nested else ExitStack()


def _expand(latent: Latent, location: Tensor, shape: tuple[int, ...]) -> Tensor:
    """From `(R,)` to the batch shape of a site and `shape`."""
    location = location.expand(latent.nested, len(location)) if latent.nested else location
    return location.reshape(*location.shape, *[1] * len(shape)).expand(*location.shape, *shape)


def _summary(latent: Latent, value: Tensor) -> Tensor:
    """One bounded number per datapoint that further sites depend on, `(N,)`."""
    bounded = torch.tanh(value / 3.0)
    bounded = bounded.flatten(-len(latent.shape)).sum(-1) if latent.shape else bounded
    return bounded.sum(-2) if latent.nested else bounded


class Guide(nn.Module):
    """A Normal in unconstrained space for each site, or a member of the prior's family; amortized over x, or with
    parameters of each datapoint.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        torch.manual_seed(spec.seed)
        linear = {latent.name: nn.Linear(spec.width, 2, dtype=spec.dtype) for latent in spec.latents}
        self.nets = nn.ModuleDict({} if spec.guide == "per datapoint" else linear)
        for net in linear.values():
            nn.init.normal_(net.weight, std=0.05)
            nn.init.zeros_(net.bias)
        if spec.fault == "NaN in a parameter":
            self.broken = nn.Parameter(torch.full((1,), torch.nan))

    def forward(self, *args: Any) -> None:
        spec, drawn, (x, _) = self.spec, 0.0, read(self.spec, *args)
        if spec.fault == "fails on a subset" and len(x) != spec.number:
            raise ValueError("needs the whole data set")
        number = spec.number + 3 if spec.fault == "guide's plate of another size" else len(x)
        subsampled = spec.guide == "per datapoint"
        if spec.shared:
            location = pyro.param("location m", torch.tensor(0.1, dtype=spec.dtype))
            pyro.sample("m", dist.Normal(location, 0.4))
        with pyro.plate("data", spec.number, subsample_size=number) if subsampled else pyro.plate("data", number):
            for latent in spec.latents:
                if not (spec.fault == "site missing from the guide" and latent.name == "a"):
                    drawn = self._draw(latent, x, drawn)
            if spec.drawn:
                draw_discrete(spec, 0.1 * x[:, 0])
            if spec.fault == "site missing from the model":
                pyro.sample("extra", dist.Normal(x[:, 0], 1.0))

    def _parameters_of(self, latent: Latent, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.guide != "per datapoint":
            location, log_scale = self.nets[latent.name](x).unbind(-1)
            return location, log_scale
        start = torch.linspace(-0.1, 0.1, self.spec.number, dtype=self.spec.dtype)
        return (
            pyro.param(f"location {latent.name}", start, event_dim=0),
            pyro.param(f"log scale {latent.name}", 0 * start, event_dim=0),
        )

    def _draw(self, latent: Latent, x: Tensor, before: Any) -> Any:
        spec, first = self.spec, latent.name == "a"
        location, log_scale = self._parameters_of(latent, x)
        if spec.guide == "sequential":
            location = location + 0.1 * before
        if spec.fault == "batch statistics in the guide":
            location = location + x.mean() * (1 + location.detach().abs())
        shape = latent.shape
        if first and spec.fault == "wrong shape in the guide":
            shape = (5,)
        if first and spec.fault == "event dimension in the guide":
            shape = shape[:-1] if shape else (1,)
        anchor = 0.3 * x[:, 0]
        with _nested_plate(latent, x):
            fn = self._distribution(latent, *(_expand(latent, u, shape) for u in (location, log_scale, anchor)), shape)
            seen = fn.sample() if first and spec.fault == "observed in the guide" else None
            value = pyro.sample(latent.name, fn, obs=seen)
        return _summary(Latent("", "", shape, latent.nested), value)

    def _distribution(self, latent: Latent, location: Tensor, log_scale: Tensor, anchor: Tensor, shape: Any) -> Any:
        fault, event_dim = self.spec.fault if latent.name == "a" else None, len(shape)
        if shape != latent.shape:
            return dist.Normal(location, 1.0).to_event(event_dim)
        if fault == "discrete in the guide":
            return dist.Poisson(location.exp()).to_event(event_dim)
        own = prior(latent, anchor if latent.kind in MOVING else location)
        transform = transform_to_support(latent, own)
        if fault == "delta in the guide":
            return dist.Delta(own.sample(), event_dim=event_dim)
        if fault == "another support":
            real = own.support in (constraints.real, constraints.real_vector) or (event_dim and "norm" in latent.kind)
            other = dist.Gamma(2.0 + 0 * location, 1.0) if real else dist.Normal(location, 1.0)
            return other.to_event(event_dim) if event_dim else other
        if self.spec.guide == "same family" and latent.kind not in NO_OWN_FAMILY:
            return own
        size = transform.inv(own.sample()).shape[len(own.batch_shape) :]
        rows = own.batch_shape
        first = (..., *[0] * event_dim)
        location, scale = (
            u[first].broadcast_to(rows).reshape(*rows, *[1] * len(size)).expand(*rows, *size)
            for u in (location, log_scale)
        )
        base = dist.Normal(location, scale.exp()).to_event(len(size))
        return dist.TransformedDistribution(base, [transform])
