r"""A guide's own family, kind (c) again: discrete sites that depend on earlier continuous draws, as q(z2) q(y | z2).

The family is that of `structured`: residuals on the parameters of all sites, of the discrete ones on their logits, with
slopes in earlier continuous draws. Parameters that depend on earlier states y besides have a residual for each:

$$\eta(z_{<}, y_{<}, x_n) = \eta_\phi(z_{<}, y_{<}, x_n) + r_n + s_{n, y_{<}} + A_n (z_{<} - c_n),$$

with $s_{n, y} = 0$ for the first joint state, and the slopes $A_n$ the same for all.

States are not drawn while it is refined. With the same noise $\epsilon$ of all continuous sites, each of the K joint
states gives draws $z_k(\epsilon)$, the weights $w_k = \prod_e q(y_{k,e} \mid x, \text{earlier draws})$, and

$$\mathcal L[q] = \mathbb E_\epsilon \sum_k w_k f_k, \qquad f_k = \log p(x_n, y_k, z_k) - \log q(y_k, z_k)
\;\text{[nats]},$$

with the gradient $\mathbb E_\epsilon \sum_k [w_k \nabla f_k + (f_k - \bar f)\, \nabla w_k]$. In the first term log q is
a function of the draws alone (the path derivative); in the second $\bar f = \sum_k w_k f_k$, which changes nothing in
expectation because weights add up to 1.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrogaps.capture.programs import Values
from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.given_states import columns_of
from pyrogaps.density.local import GuideSite, LocalGuide, PlaceValues, score_term
from pyrogaps.density.paths import Paths
from pyrogaps.density.runs import evaluating
from pyrogaps.refine.families import Start
from pyrogaps.refine.freedom import Freedom
from pyrogaps.refine.parameters import axis_of, build_of, free_leaf, names_of, rebuilt, value_of
from pyrogaps.refine.residuals import ResidualSites, normal_draw
from pyrogaps.refine.structured import StructuredGuide, StructuredLocal


class EnumeratedGuide(StructuredGuide):
    """A `StructuredGuide` whose discrete sites take all joint states `(K, E)` along its paths; see `TakesPaths`."""

    def __init__(
        self, density: GuideDensity, joint: JointDensity, indices: Tensor, freedom: Freedom, states: Tensor
    ) -> None:
        super().__init__(density, joint, indices, freedom)
        self.states, self.num_paths = states, len(states)

    def at(self, indices: Tensor) -> LocalGuide:
        positions = indices - self._first
        return _Enumerated(self, positions, self.active_at(positions), self.states)

    def start_at(self, start: Start) -> bool:
        """It starts at the guide itself alone: a Gaussian of z says nothing of the states."""
        return False


class _Enumerated(StructuredLocal):
    """A `LocalGuide` that runs the guide with residuals at its sites, along all paths where it is asked to."""

    def __init__(self, guide: EnumeratedGuide, positions: Tensor, active: Tensor | None, states: Tensor) -> None:
        super().__init__(guide, positions, active)
        self.states = states

    def sample_paths(self, num_particles: int, antithetic: bool = False) -> Paths:
        """See `Enumerates`."""
        if self.joint.plate is not None:
            return self._recorded_paths(self.states, num_particles, antithetic)
        runs: list[list[Paths]] = []
        for _ in range(num_particles):
            runs.append([])
            for place, state in enumerate(self.states):
                # The noise of a particle is the same in all its paths; the last one uses it up.
                with _kept_noise(self.joint.device, place + 1 < len(self.states)):
                    runs[-1].append(self._recorded_paths(state[None], 1, False))
        paths = [run[place] for place in range(len(self.states)) for run in runs]
        weights = torch.cat([path.log_weights for path in paths if path.log_weights is not None])
        z, log_q = torch.cat([path.z for path in paths]), torch.cat([path.log_q for path in paths])
        return Paths(z, log_q, weights, num_particles)

    def _recorded_paths(self, states: Tensor, num_particles: int, antithetic: bool) -> Paths:
        """All paths through `states` in one run."""
        key = ("paths", *self.indices.tolist(), *states.flatten().tolist(), num_particles, antithetic)
        run = partial(self._paths, states, num_particles, antithetic)
        z, log_q, log_weights = self.guide.recorded(key, run)
        return Paths(z, log_q, log_weights, num_particles)

    def _paths(self, states: Tensor, num_particles: int, antithetic: bool, *parameters: Tensor) -> Values:
        """The parts of `Paths`, through the guide's program, with residuals in `parameters`."""
        number, rows = len(states) * num_particles, len(states) * num_particles * len(self.indices)
        drawn = columns_of(self.joint, drawn=True)
        flat = self.joint.zeros(rows)
        flat[:, drawn] = states.repeat_interleave(num_particles * len(self.indices), 0).to(flat)
        sites_with = self.guide.sites_with(self.indices, number, None, [*parameters])
        handler = PathSites(sites_with, flat, len(states), mirrored=antithetic and num_particles % 2 == 0)
        active = None if self.active is None else self.active.repeat(number, 1)
        log_weights, in_plate = self.joint.zeros(rows)[:, 0], self.joint.plate is not None
        with evaluating(self.density.guide):  # scores too, because one-hot distributions validate values by themselves
            messages = self.density.messages(self.indices, number, handler)
            z, log_q = self.scored(number, {name: (fn, messages[name]["value"]) for name, fn in handler.frozen.items()})
            for term in self.density.terms:
                if term.site.num_states:
                    fn, value = messages[term.name]["fn"], messages[term.name]["value"]
                    log_weights = log_weights + score_term(term, fn, value[None], active, in_plate, (1, rows))[1][0]
        if active is not None:  # what is masked out has one state only, its first
            masked = ((flat[:, drawn] != 0) & ~active[:, drawn]).any(1)
            log_weights = torch.where(masked, -torch.inf, log_weights)
        return z, log_q, log_weights.reshape(log_q.shape)


class PathSites(ResidualSites):
    """Puts the states of `flat` `(R, dim)` into discrete sites, and draws the others with the same noise along all
    paths: rows are `num_paths` stretches, one after the other.
    """

    def __init__(self, sites: ResidualSites, flat: Tensor, num_paths: int, *, mirrored: bool) -> None:
        super().__init__([*sites.terms.values()], None, sites.added, sites.centre, sites.in_plate, mirrored)
        self.flat, self.num_paths = flat, num_paths

    def _give(self, term: GuideSite, message: Any) -> None:
        fn = message["fn"]
        if term.site.num_states:
            PlaceValues._pyro_sample(self, message)
        elif self.in_plate:
            value = normal_draw(term, fn, mirrored=self.mirrored, copies=self.num_paths)
            message["value"], message["done"] = self._repeated(term, fn) if value is None else value, True

    def _repeated(self, term: GuideSite, fn: Any) -> Tensor:
        """A draw of a distribution that is no Normal: each path's begins at the same state of the generators."""
        inner, parts = free_leaf(fn), []
        stretches = {
            name: value_of(inner, name).chunk(self.num_paths, axis_of(term, fn, inner, name))
            for name in names_of(inner)
        }
        for place in range(self.num_paths):
            values = {name: stretch[place] for name, stretch in stretches.items()}
            own = build_of(inner)(**values, validate_args=False)
            with _kept_noise(self.flat.device, place + 1 < self.num_paths):
                parts.append(rebuilt(fn, partial(_instead, own), masks=False).rsample())
        return torch.cat(parts, term.site.batch_axis - fn.event_dim)


def _instead(own: Any, _: Any) -> Any:
    return own


def _kept_noise(device: torch.device, kept: bool) -> Any:
    """A context after which torch's generators are as before, if `kept`."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=kept)
