"""Every guide and family of the zoo, every feature, and the pairs of them that are refused, with the reason.

`PYROGAPS_CROSSING=all python -m tests.crossing [GUIDE ...]` prints the whole table, a line for each pair.
"""

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedMultivariateNormal, AmortizedNormal
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow, AutoLocalAuxiliaryFlow
from pyrogaps.guides.delta import AmortizedDelta
from pyrogaps.guides.flows import AmortizedFlow, AutoLocalFlow
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.guides.mixture import AmortizedMixture, AutoLocalMixture
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.guides.sequential import LocalStructuredNormal, StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel
from pyrogaps.models.vae import VAE
from pyrogaps.training import Training

NUM_DATAPOINTS, DIM, LATENT, STEPS = 5, 4, 2, 2


@dataclass(frozen=True)
class Case:
    """A model, a guide for it, and data; `plate` as the library takes it."""

    model: nn.Module
    guide: Any
    x: Tensor
    plate: Any = None
    family: Any = None


def amortized(kind: Callable[..., nn.Module], **options: Any) -> Case:
    return Case(VAE(DIM, LATENT, (3,)), kind(DIM, LATENT, (3,), **options), bits(NUM_DATAPOINTS, DIM))


def local(family: Callable[..., Any], plate: Any = None) -> Case:
    """A family set up on the data, as after training: it has parameters for these datapoints."""
    model, x = VAE(DIM, LATENT, (3,)), bits(NUM_DATAPOINTS, DIM)
    guide = family(model)
    guide(x)
    return Case(model, guide, x, plate, family)


def sequential(lookahead: int | str, *, per_datapoint: bool = False) -> Case:
    model, x = DeepMarkovModel(DIM, LATENT, 3, 3), bits(NUM_DATAPOINTS, STEPS, DIM)
    guide: Any = StructuredNormal(DIM, LATENT, 3, lookahead=lookahead)
    if per_datapoint:
        guide = LocalStructuredNormal(guide.combiner)
        guide(x)
    return Case(model, guide, x)


def bits(*shape: int) -> Tensor:
    return torch.rand(shape).round()


FLOW = {"num_steps": 1, "hidden": 2}
LOCAL: dict[str, Callable[..., Any]] = {
    "AutoNormal": AutoNormal,
    "AutoLocalMultivariateNormal": AutoLocalMultivariateNormal,
    "AutoLocalFlow": functools.partial(AutoLocalFlow, **FLOW),
    "AutoLocalAuxiliaryFlow": functools.partial(AutoLocalAuxiliaryFlow, **FLOW),
    "AutoLocalMixture": functools.partial(AutoLocalMixture, num_components=2),
}
GUIDES: dict[str, Callable[[], Case]] = {
    "AmortizedNormal": lambda: amortized(AmortizedNormal),
    "AmortizedMultivariateNormal": lambda: amortized(AmortizedMultivariateNormal),
    "AmortizedFlow": lambda: amortized(AmortizedFlow, num_steps=1, flow_hidden=2),
    "AmortizedAuxiliaryFlow": lambda: amortized(AmortizedAuxiliaryFlow, num_steps=1, flow_hidden=2),
    "AmortizedMixture": lambda: amortized(AmortizedMixture, num_components=2),
    "PartialNormal": lambda: amortized(PartialNormal, shown=2),
    "AmortizedDelta": lambda: amortized(AmortizedDelta),
    "StructuredNormal, filter": lambda: sequential(0),
    "StructuredNormal, one step ahead": lambda: sequential(1),
    "StructuredNormal, smoother": lambda: sequential("inf"),
    "LocalStructuredNormal": lambda: sequential(0, per_datapoint=True),
    **{name: functools.partial(local, family) for name, family in LOCAL.items()},
    "AutoMultivariateNormal": lambda: local(AutoMultivariateNormal),
    "AutoMultivariateNormal, one datapoint": lambda: local(AutoMultivariateNormal, plate=False),
    "AutoLowRankMultivariateNormal": lambda: local(AutoLowRankMultivariateNormal),
    "AutoLowRankMultivariateNormal, one datapoint": lambda: local(AutoLowRankMultivariateNormal, plate=False),
}

# What takes a vector for each datapoint of a plate apart from what takes the whole data set as one.
OF_ONE = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}

# Densities are recorded when the whole table runs. Without a record these few evaluations take a fifth of the time.
WHOLE = os.environ.get("PYROGAPS_CROSSING") == "all"
MODE: Any = "captured" if WHOLE else "eager"
EVIDENCE: dict[str, Any] = {
    "num_chains": 2,
    "num_temperatures": 2,
    "num_leapfrog": 1,
    "num_pilot_temperatures": 2,
}
AIS = functools.partial(pg.AIS, **EVIDENCE)
REFINEMENT = pg.Refinement(num_steps=2, num_particles=2, num_selection=4)
LADDER = pg.Ladder(max_evaluations=200, num_pilot_draws=100, temperatures=(2,), num_chains=16, tolerance=1.0)
BRIDGE = pg.Bridge(num_draws=16, num_chains=16, num_temperatures=1)
RETRAINING = pg.Retraining(Training(num_epochs=1), max_rounds=1, num_datapoints=NUM_DATAPOINTS)


def problem_of(case: Case) -> pg.Problem:
    return pg.Problem.of(case.model, case.guide, case.x, case.plate, mode=MODE)


def decompose(case: Case, **options: Any) -> pg.GapLedger:
    settings = {"evidence": AIS(), "refinement": REFINEMENT, "num_particles": 4, "progress": False}
    ledger = pg.decompose(problem_of(case), **{**settings, **options})
    names = [name for name in ("elbo", "iwae", "log_evidence", "elbo_refined") if name in ledger.per_datapoint]
    assert_finite(*(ledger.per_datapoint[name].values for name in names))
    assert str(ledger)
    return ledger


def assert_finite(*values: Any) -> None:
    for value in values:
        assert np.isfinite(np.asarray(value, dtype=float)).all()


def cached(case: Case) -> None:
    """Twice with one cache: the second takes up what the first left, and both are what there is without a cache."""
    plain = decompose(case)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            xr.testing.assert_identical(decompose(case, cache=folder).per_datapoint, plain.per_datapoint)


def split(case: Case) -> None:
    ledger = decompose(case, split=pg.Split(case.x, RETRAINING))
    assert_finite(ledger.summary().loc[["capacity_gap", "optimization_gap", "generalization_gap"], "mean"])


def certified(case: Case) -> None:
    ledger = decompose(case, certificate=pg.Certificate(num_simulated=2, num_refined_again=2, longer=2))
    assert ledger.certificate is not None
    assert_finite(*(ledger.certificate[name].values for name in ("lower", "upper", "gain")))


def calibrated(case: Case, posterior: Any) -> None:
    options: dict[str, Any] = {"refinement": REFINEMENT} if posterior == "refined" else {}
    result = pg.calibrate(
        case.model, case.guide, case.x, posterior=posterior, num_simulated=4, num_draws=100, plate=case.plate, **options
    )
    assert_finite(result.ranks)


def measured_evidence(case: Case) -> None:
    assert_finite(pg.log_evidence(problem_of(case), evidence=LADDER, refinement=REFINEMENT).value)


def bdmc(case: Case) -> None:
    options = {"settings": AIS(), "refinement": REFINEMENT, "plate": case.plate}
    bounds = pg.bdmc(case.model, case.x, guide_or_family=case.guide, **options)
    assert_finite(bounds.forward.value, bounds.reverse.value)


def exported(case: Case) -> None:
    tree = pg.to_datatree(case.model, case.guide, case.x, num_draws=4, plate=case.plate)
    assert_finite(*(value.values for value in tree["posterior"].data_vars.values()))


def trained(case: Case, **options: Any) -> None:
    """Two epochs on all the data at once, which guides with parameters for each datapoint take too."""
    before = [value.clone() for value in case.model.parameters()]
    result = pg.train(case.model, case.guide, case.x, num_epochs=2, batch_size=len(case.x), progress=False, **options)
    assert_finite(*result.history.values())
    moved = any(not torch.equal(*pair) for pair in zip(case.model.parameters(), before, strict=True))
    assert moved != bool(options.get("freeze_model"))


def iwae(case: Case, **options: Any) -> pg.IWAE_ELBO:
    return pg.IWAE_ELBO(2, plate=case.plate, **options)


def mapa(case: Case) -> None:
    posterior = pg.mapa_posterior(case.x, "bernoulli", bandwidth=0.9, num_neighbours=3)
    trained(case, objective=pg.MAPA_ELBO(posterior))


FEATURES: dict[str, Callable[[Case], Any]] = {
    "decompose": decompose,
    "cache": cached,
    "AIS from the guide": lambda case: decompose(case, evidence=AIS(initial="guide")),
    "AIS from the prior": lambda case: decompose(case, evidence=AIS(initial="prior")),
    "ladder": lambda case: decompose(case, evidence=LADDER),
    "bridge": lambda case: decompose(case, evidence=BRIDGE),
    "certificate": certified,
    "split": split,
    "families": lambda case: decompose(case, families=OF_ONE if case.plate is False else LOCAL),
    "calibrate amortized": lambda case: calibrated(case, "amortized"),
    "calibrate refined": lambda case: calibrated(case, "refined"),
    "log_evidence": measured_evidence,
    "bdmc": bdmc,
    "to_datatree": exported,
    "train": trained,
    "train, frozen model": lambda case: trained(case, freeze_model=True),
    "train, Trace_ELBO": lambda case: trained(case, objective=Trace_ELBO()),
    "train, IWAE": lambda case: trained(case, objective=iwae(case)),
    "train, IWAE vectorized": lambda case: trained(case, objective=iwae(case, vectorize_particles=True)),
    "train, IWAE doubly reparametrised": lambda case: trained(case, objective=iwae(case, doubly_reparametrised=True)),
    "train, IWAE frozen model": lambda case: trained(case, objective=iwae(case), freeze_model=True),
    "train, MAPA": mapa,
}


DENSITY = [feature for feature in FEATURES if not feature.startswith("train")]
IWAE = [feature for feature in FEATURES if feature.startswith("train, IWAE")]
JOINT = ["AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]
ONE = [f"{name}, one datapoint" for name in JOINT]
HELD = [*LOCAL, "LocalStructuredNormal"]

# Pairs that are refused, by the reason, and words of the message.
REFUSED: dict[str, tuple[list[str], list[str], str]] = {
    "a Delta has no density, so there is no bound and no gap": (
        ["AmortizedDelta"],
        [*DENSITY, *IWAE],
        "a Delta in the guide has no density",
    ),
    "a joint distribution of all datapoints has no density per datapoint": (
        JOINT,
        [feature for feature in DENSITY if feature != "calibrate amortized"],
        "one joint distribution over all datapoints",
    ),
    "the importance weights of a datapoint need its own density": (JOINT, IWAE, "latent outside the data plate"),
    "parameters for each datapoint are no answer to simulated ones": (
        [*HELD, *JOINT],
        ["calibrate amortized"],
        "has no parameters for simulated datapoints",
    ),
    "one data set has one posterior: there are no simulated datapoints to rank": (
        ONE,
        ["calibrate amortized", "calibrate refined"],
        "the whole data set is one datapoint",
    ),
    "what is not amortized has no amortization gap to split": (ONE, ["split"], "its guide is not amortized"),
    "MAPA's encoder maps a datapoint to one latent, and has no density": (
        [guide for guide in GUIDES if guide != "AmortizedDelta"],
        ["train, MAPA"],
        "encoder",
    ),
    "a free state for each datapoint says nothing of simulated ones, and the class alone makes no new combiner": (
        ["LocalStructuredNormal"],
        ["calibrate refined", "certificate"],
        "has no parameters for simulated datapoints",
    ),
    "a doubly reparametrised gradient leaves out what scores a draw, here the reverse model": (
        ["AutoLocalAuxiliaryFlow"],
        ["train, IWAE doubly reparametrised"],
        "would not train its reverse model",
    ),
}


def expected(guide: str, feature: str) -> str | None:
    """Words of the refusal of a pair; None where it must answer."""
    for guides, features, said in REFUSED.values():
        if guide in guides and feature in features:
            return said
    return None


# Recipes of the guides for the command: their models, whether their data are sequences, and the part of the data that
# they are measured on. Those with parameters for each datapoint have none for others than their training data.
VAE_OF_RECIPE = ("pyrogaps.models.vae.VAE", {"data_dim": DIM, "latent_dim": LATENT, "hidden": [3]})
DMM_OF_RECIPE = (
    "pyrogaps.models.dmm.DeepMarkovModel",
    {"data_dim": DIM, "latent_dim": LATENT, "emission_dim": 3, "transition_dim": 3},
)
AMORTIZED = {"data_dim": DIM, "latent_dim": LATENT, "hidden": [3]}
FLOW_OF_RECIPE = {"num_steps": 1, "flow_hidden": 2}
SEQUENTIAL = {"data_dim": DIM, "latent_dim": LATENT, "rnn_dim": 3}
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "AmortizedNormal": ("pyrogaps.guides.amortized.AmortizedNormal", AMORTIZED),
    "AmortizedMultivariateNormal": ("pyrogaps.guides.amortized.AmortizedMultivariateNormal", AMORTIZED),
    "AmortizedFlow": ("pyrogaps.guides.flows.AmortizedFlow", {**AMORTIZED, **FLOW_OF_RECIPE}),
    "AmortizedAuxiliaryFlow": (
        "pyrogaps.guides.auxiliary_flows.AmortizedAuxiliaryFlow",
        {**AMORTIZED, **FLOW_OF_RECIPE},
    ),
    "AmortizedMixture": ("pyrogaps.guides.mixture.AmortizedMixture", {**AMORTIZED, "num_components": 2}),
    "PartialNormal": ("pyrogaps.guides.partial.PartialNormal", {**AMORTIZED, "shown": 2}),
    "StructuredNormal, filter": ("pyrogaps.guides.sequential.StructuredNormal", {**SEQUENTIAL, "lookahead": 0}),
    "StructuredNormal, one step ahead": ("pyrogaps.guides.sequential.StructuredNormal", {**SEQUENTIAL, "lookahead": 1}),
    "StructuredNormal, smoother": ("pyrogaps.guides.sequential.StructuredNormal", {**SEQUENTIAL, "lookahead": "inf"}),
    "AutoNormal": ("pyro.infer.autoguide.AutoNormal", {}),
    "AutoLocalMultivariateNormal": ("pyrogaps.guides.local.AutoLocalMultivariateNormal", {}),
    "AutoLocalFlow": ("pyrogaps.guides.flows.AutoLocalFlow", FLOW),
    "AutoLocalAuxiliaryFlow": ("pyrogaps.guides.auxiliary_flows.AutoLocalAuxiliaryFlow", FLOW),
    "AutoLocalMixture": ("pyrogaps.guides.mixture.AutoLocalMixture", {"num_components": 2}),
    "AutoMultivariateNormal, one datapoint": ("pyro.infer.autoguide.AutoMultivariateNormal", {}),
    "AutoLowRankMultivariateNormal, one datapoint": ("pyro.infer.autoguide.AutoLowRankMultivariateNormal", {}),
}


def recipe(guide: str) -> dict[str, Any]:
    """A recipe of two chunks, the last one short; `crossed.Bits` is the data set of `DATA`."""
    path, arguments = COMMANDS[guide]
    model, sizes = DMM_OF_RECIPE if guide.startswith("Structured") else VAE_OF_RECIPE
    shape = [STEPS, DIM] if guide.startswith("Structured") else [DIM]
    whole = guide.endswith("one datapoint")
    held = path.rpartition(".")[2].startswith("Auto")
    return {
        "data": {"class_path": "crossed.Bits", "init_args": {"shape": shape, "number": 6 if whole else 66}},
        "model": {"class_path": model, "init_args": sizes},
        "guide": {"class_path": path, "init_args": arguments},
        "evaluate": {"part": "train" if held else "test"},
        "training": {"num_epochs": 2, "batch_size": 66},
        "evidence": {"class_path": "pyrogaps.AIS", "init_args": EVIDENCE},
        "refinement": {"num_steps": 2, "num_particles": 2, "num_selection": 4},
        "conditioning": {"num_completions": 4, "max_completions": 4},
        "num_particles": 4,
        "batch_size": 64,
        **({"plate": False} if whole else {}),
    }


DATA = """
import torch

class Bits:
    def __init__(self, shape: list[int], number: int):
        draws = torch.rand(2 * number, *shape, generator=torch.Generator().manual_seed(0)).round()
        self.train, self.test = draws[:number], draws[number:]
"""


def check(guide: str, feature: str) -> str | None:
    """Run one cell; None where it answers with finite numbers, else what it was refused with."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    case = GUIDES[guide]()
    try:
        FEATURES[feature](case)
    except pg.InputError as error:
        return str(error)
    return None


def main() -> None:
    for guide in sys.argv[1:] or GUIDES:
        for feature in FEATURES:
            start = time.perf_counter()
            try:
                said = check(guide, feature)
                outcome = "ok" if said is None else f"refused: {said}"
                wanted = expected(guide, feature)
                if (said is None) != (wanted is None) or (wanted or "") not in (said or ""):
                    outcome = f"NOT AS EXPECTED ({wanted}): {outcome}"
            except Exception as error:
                outcome = f"FAILED: {type(error).__name__}: {str(error).splitlines()[:1]}"
            print(f"{guide} | {feature} | {time.perf_counter() - start:.1f} s | {outcome}", flush=True)


if __name__ == "__main__":
    main()
