"""What must hold of a random program: `check`."""

from importlib import import_module
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

import pyrogaps as pg
from tests.fuzz.faults import FAULTS, pair_of
from tests.fuzz.programs import Guide, Latent, Program, Spec, random_spec

# A few of everything: what is checked holds of any number of steps and draws. The same number of draws everywhere,
# because a density is recorded once for each.
SETTINGS: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=4, num_particles=4, num_selection=16),
    "evidence": pg.AIS(4, num_temperatures=3, num_leapfrog=1, num_pilot_chains=4, num_pilot_temperatures=4),
    "num_particles": 4,
    "progress": False,
}
# Where log p(x) is known by quadrature.
EXACT = {
    "refinement": pg.Refinement(num_steps=60, num_particles=4, num_selection=16),
    "evidence": pg.AIS(64, num_temperatures=60, num_leapfrog=4, num_pilot_chains=4),
}
# Two ledgers, given a draw of the shared latent each, and bounds of the global gap that may lie far apart.
SHARED = {"shared": pg.Shared(num_draws=2, max_draws=8, tolerance=10.0), "referee": False}
# Where the whole data set is one datapoint, and the programs run for one particle at a time.
SETTINGS_WHOLE = SETTINGS | {
    "refinement": pg.Refinement(num_steps=3, num_particles=2, num_selection=16),
    "evidence": pg.AIS(2, num_temperatures=3, num_leapfrog=1, num_pilot_chains=2, num_pilot_temperatures=4),
    "num_particles": 2,
}
NUM_STATES = {"coin": 2, "three": 3, "counts": 3}
# Rounding of a sum of log-probabilities, relative to it.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}


def spec_of(seed: int) -> Spec:
    """Four of five seeds are valid programs; the fifth has one fault."""
    names = [*FAULTS]
    return random_spec(seed, None if seed % 5 != 4 else names[seed // 5 % len(names)])


def check(spec: Spec) -> str:
    """Run everything that must hold of a program; returns the outcome in a word. Raises `AssertionError`."""
    pyro.clear_param_store()
    default = torch.get_default_dtype()
    torch.set_default_dtype(spec.default_dtype)
    try:
        with patch.object(import_module("pyrogaps.refine.optimise"), "MIN_FURTHER_STEPS", 2):
            return _check(spec)
    finally:
        torch.set_default_dtype(default)


def _check(spec: Spec) -> str:
    program = Program(spec)
    pair = pair_of(program, program.guide() if spec.fault is None else Guide(spec))
    plate = "nowhere" if spec.fault == "unknown plate" else spec.plate
    state, settings = _state(), SETTINGS if spec.plate is None else SETTINGS_WHOLE
    exact = spec.one_dimensional and spec.plate is None
    settings = settings | EXACT if exact else settings | SHARED if spec.shared else settings
    try:
        ledger = pg.decompose(pair.model, pair.guide, pair.data, plate=plate, seed=spec.seed, **settings)
    except pg.InputError as error:
        _check_state(state)
        _check_refusal(spec, str(error))
        return "refused"
    _check_state(state)
    assert spec.fault is None, f"{spec.fault}: accepted"
    _check_sums(ledger)
    _check_density(program)
    again = pg.decompose(pair.model, pair.guide, pair.data, plate=plate, seed=spec.seed, **settings)
    assert again.per_datapoint.identical(ledger.per_datapoint), "the same seed gave another ledger"
    if exact:
        _check_evidence(program, ledger)
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
    gaps = ledger.gaps
    values, parents = gaps["mean"].to_series(), gaps["parent"].to_series()
    assert np.isfinite(values).all(), f"a gap is not finite: {values.to_dict()}"
    for parent in {*parents} - {""}:
        total = values[parents == parent].sum()
        assert abs(total - values[parent]) < 1e-5, f"the parts of {parent} sum to {total}, not to {values[parent]}"


def _check_density(program: Program) -> None:
    """log p(x, z) of each datapoint against Pyro's own trace of the data set, at random points.

    Discrete latents are set to each of their joint states in turn; the same for all datapoints, which are independent.
    """
    spec, generator = program.spec, torch.Generator().manual_seed(1)
    plate = False if spec.shared else spec.plate
    joint = pg.JointDensity(program.model, program.data, plate=plate)
    indices = torch.arange(joint.num_datapoints)
    z = torch.randn(1, len(indices), joint.dim, dtype=joint.dtype, generator=generator)
    active = joint.active(indices)
    z = z if active is None else torch.where(active, z, torch.zeros_like(z))
    values = {name: value[0] for name, value in joint.constrain(z).items()}
    ours = float(joint(z).sum()) - _log_jacobian(joint, z[0], indices)
    placed = {latent.name: _as_drawn(latent, values[latent.name], plate) for latent in spec.latents}
    placed |= {"m": values["m"][0]} if spec.shared else {}
    traced = [_traced(program, {**placed, **states}) for states in _joint_states(spec)]
    theirs = float(traced[0].rest + torch.logsumexp(torch.stack([trace.rows for trace in traced]), 0).sum())
    rounding = ROUNDING[spec.dtype] * max(1.0, abs(theirs))
    assert abs(ours - theirs) <= rounding, f"log p(x, z) is {ours}, by Pyro's trace {theirs}"


def _joint_states(spec: Spec) -> list[dict[str, Tensor]]:
    """The joint states of a program's discrete latents, each for all datapoints."""
    named = [(f"k{place}", kind) for place, kind in enumerate(spec.discrete)]
    states = product(*(range(NUM_STATES[kind]) for _, kind in named))
    return [
        {
            name: torch.full((spec.number,), k, dtype=_dtype(spec, kind))
            for (name, kind), k in zip(named, ks, strict=True)
        }
        for ks in states
    ]


def _dtype(spec: Spec, kind: str) -> torch.dtype:
    return torch.long if kind == "three" else spec.dtype


class Traced(NamedTuple):
    """log p(x, z) by Pyro's trace: of each datapoint `(N,)`, and of what these share."""

    rows: Tensor
    rest: Tensor


def _traced(program: Program, values: dict[str, Tensor]) -> Traced:
    """The log-density with the sites at `values`."""
    trace = poutine.trace(poutine.condition(program.model, values)).get_trace(*program.arguments)
    trace.compute_log_prob()
    rows, rest = torch.zeros(program.spec.number, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for node in trace.nodes.values():
        if node["type"] == "sample" and "log_prob" in node and not site_is_subsample(node):
            term = (node["log_prob"] / node["scale"]).double()
            if any(frame.name == "data" for frame in node["cond_indep_stack"]):
                rows = rows + term.reshape(-1, term.shape[-1]).sum(0)
            else:
                rest = rest + term.sum()
    return Traced(rows, rest)


def _log_jacobian(joint: pg.JointDensity, z: Tensor, indices: Tensor) -> float:
    return float(joint.run(z, joint.fetch(indices), indices).log_jacobian.sum())


def _as_drawn(latent: Latent, value: Tensor, plate: bool | None) -> Tensor:
    """From the datapoint's axis in front to where the plates have it."""
    if plate is False:
        return value[0]
    return value.movedim(0, 1) if latent.nested else value


def _check_evidence(program: Program, ledger: pg.GapLedger) -> None:
    """log p(x) against quadrature over the one latent."""
    joint = pg.JointDensity(program.model, program.data)
    grid = torch.linspace(-30, 30, 12_001, dtype=joint.dtype)
    z = grid[:, None, None].expand(-1, joint.num_datapoints, 1)
    exact = (torch.logsumexp(joint(z).detach().double(), 0) + torch.log(grid[1] - grid[0])).numpy()
    value, error = (ledger.per_datapoint[name].values for name in ("log_evidence", "log_evidence_mcse"))
    off = np.abs(value - exact) / np.hypot(error, 1e-4)
    assert (off < 5).all(), f"log p(x) is {value} ± {error}, by quadrature {exact}"
