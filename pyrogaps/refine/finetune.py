"""A guide's own family, kind (d): its own weights, fine-tuned datapoint by datapoint."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.local import Draws, LocalGuide, NoInverseError
from pyrogaps.density.runs import evaluating, modules_of
from pyrogaps.errors import InputError, counted
from pyrogaps.refine.settings import Refinement
from pyrogaps.streams import seeded

MIN_ANNOUNCED = 60.0  # seconds


@dataclass
class Weight:
    """A learned tensor of a guide and every place that holds it: attributes of modules, names in Pyro's store."""

    value: Tensor
    attributes: list[tuple[nn.Module, str]]
    names: list[str]


def learned_weights(density: GuideDensity) -> list[Weight]:
    """The leaf tensors that a guide learns, of its modules and of its `pyro.param` statements.

    A guide of which all parameters are frozen (`requires_grad=False`) has been put aside as a whole, after training:
    all of them count. Raises `InputError` where there are none.
    """
    used = used_weights(density)
    if not used:
        if untrained := [name for name in _parameter_names(density) if name not in pyro.get_param_store()._params]:
            raise InputError(
                f"guide: its parameters are not in Pyro's param store ({', '.join(untrained)}), so it was never run. "
                "Train it, or run it once on the data, as in guide(x), to measure it untrained"
            )
        raise InputError(
            "guide: it has no learned parameters, so it has no family of its own to refine. Give it some (pyro.param, "
            "or a module's), or call elbo, iwae and ais(..., initial='prior'), which do not refine"
        )
    return used


def used_weights(density: GuideDensity) -> list[Weight]:
    """As `learned_weights`; none where there are none."""
    weights: dict[tuple[int, torch.Size], Weight] = {}

    def weight(value: Tensor) -> Weight:
        return weights.setdefault((value.data_ptr(), value.shape), Weight(value, [], []))

    store = pyro.get_param_store()._params
    for name in _parameter_names(density):
        if name in store:  # those that an untrained guide makes in its run are gone again
            weight(store[name]).names.append(name)
    for module in {sub: None for top in modules_of(density.guide) for sub in top.modules()}:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                weight(parameter).attributes.append((module, name))
    used = _used(density, list(weights.values()))
    return [weight for weight in used if weight.value.requires_grad] or used


def _used(density: GuideDensity, weights: list[Weight]) -> list[Weight]:
    """Those of `weights` that the guide's draws depend on; a module that is model and guide holds others too."""
    subset = torch.arange(min(8, density.num_datapoints))
    values = [weight.value.detach().requires_grad_() for weight in weights]
    if not values:
        return []
    with seeded(0, "used weights"), torch.enable_grad(), substituted(weights, values):
        z, log_q = density.at(subset).sample(1)
        total = z.sum() + log_q.sum()
        if not total.requires_grad:
            return []
        gradients = torch.autograd.grad(total, values, allow_unused=True)
    return [weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]


def _parameter_names(density: GuideDensity) -> list[str]:
    """The names under which one run of the guide reads or makes parameters in Pyro's param store."""
    indices = torch.zeros(1, dtype=torch.long)
    with evaluating(density.guide), seeded(0, "used weights"), poutine.trace(param_only=True) as tracer:
        density.messages(indices)
    return [name for name, node in tracer.trace.nodes.items() if node["type"] == "param"]


@contextmanager
def substituted(weights: list[Weight], values: list[Tensor]) -> Iterator[None]:
    """Run a guide with other tensors in the places of its weights; gradients reach them."""
    try:
        for weight, value in zip(weights, values, strict=True):
            _put(weight, value)
        yield
    finally:
        for weight in weights:
            _put(weight, weight.value)


def _put(weight: Weight, value: Tensor) -> None:
    """`value` in every place of `weight`, among its module's parameters as before: guides ask those for their dtype."""
    store = pyro.get_param_store()
    for module, name in weight.attributes:
        module._parameters[name] = value  # type: ignore[assignment]
        if "_flat_weights" in vars(module):  # a recurrent network, of torch versions that keep a list besides
            names: list[str] = vars(module)["_flat_weights_names"]
            vars(module)["_flat_weights"] = [module._parameters.get(flat) for flat in names]
    for name in weight.names:
        store._params[name] = value


class FinetunedGuide:
    """The guide's own weights, a copy for every datapoint of a chunk; see `Refinable`.

    The guide runs once for each datapoint, with that datapoint's copy in place. It works for any guide and is the slow
    way: a guide class can bring a batched family instead (`local_family(model) -> guide`).
    """

    def __init__(self, density: GuideDensity, joint: JointDensity, indices: Tensor) -> None:
        self.density, self.joint = density.restrict(joint, indices), joint
        self._first = int(indices[0])
        self.weights = learned_weights(density)
        self.parameters: list[Tensor] = [_copies(weight.value, joint.num_datapoints) for weight in self.weights]
        self.axes, self.rows = [0] * len(self.parameters), [slice(None)] * len(self.parameters)
        self.units: list[Tensor | float] = [0.1] * len(self.parameters)

    def seconds_per_step(self, num_particles: int) -> float:
        """How long a gradient step takes for one datapoint: draws, their log q, and the gradients of both."""
        start = time.perf_counter()
        with seeded(0, "announced"), torch.enable_grad():
            local = self.at(torch.tensor([self._first]))
            z, _ = local.sample(num_particles)
            try:
                total = z.sum() + local.log_prob(z.detach()).sum()
            except NoInverseError:
                total = z.sum()
            if total.requires_grad:
                torch.autograd.grad(total, self.parameters, allow_unused=True)
        return time.perf_counter() - start

    def at(self, indices: Tensor) -> LocalGuide:
        return _OneByOne(self, indices - self._first)


def announcement(guide: FinetunedGuide, num_datapoints: int, settings: Refinement) -> str | None:
    """What a long refinement datapoint by datapoint will take, and the remedy; None for a short one."""
    seconds = num_datapoints * settings.num_steps * guide.seconds_per_step(settings.num_particles)
    if seconds < MIN_ANNOUNCED:
        return None
    return (
        f"guide: it is refined datapoint by datapoint, which takes about {seconds / 60:.0f} min for "
        f"{counted(num_datapoints, 'datapoint')}, because its distributions have no parameters that can be freed, as "
        "flows. Give its class a local_family(model) with parameters for each datapoint (pyrogaps.LocalFamily), or "
        "pass fewer datapoints or refinement=Refinement(num_steps=...)"
    )


def _copies(value: Tensor, count: int) -> Tensor:
    return value.detach()[None].repeat(count, *[1] * value.dim()).requires_grad_()


class _OneByOne:
    """A `LocalGuide` that runs a fine-tuned guide datapoint by datapoint."""

    mean_field = False

    def __init__(self, guide: FinetunedGuide, indices: Tensor) -> None:
        self.guide, self.indices, self.joint = guide, indices, guide.joint
        # At once: the gradient of a single one is as large as all of them.
        self._copies = [copies.unbind() for copies in guide.parameters]

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        draws = [self._run(position, num_particles, None) for position in self.indices.tolist()]
        return torch.cat([z for z, _ in draws], 1), torch.cat([log_q for _, log_q in draws], 1)

    def log_prob(self, z: Tensor) -> Tensor:
        scored = [self._run(n, len(z), z[:, i : i + 1])[1] for i, n in enumerate(self.indices.tolist())]
        return torch.cat(scored, 1)

    def _run(self, position: int, num_particles: int, z: Tensor | None) -> Draws:
        with substituted(self.guide.weights, [copies[position] for copies in self._copies]):
            local = self.guide.density.at(torch.tensor([position]))
            return local.sample(num_particles) if z is None else (z, local.log_prob(z))
