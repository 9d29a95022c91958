"""Random streams: one for every purpose, block of datapoints and block of particles, and no two share numbers.

What is compared are the random words that were drawn while a ledger was made, see `recorded_draws`. One label for two
purposes, or for two blocks, shows as a stream that is drawn twice; noise drawn once for all blocks shows as a block
without a stream; and either shows in the ledger of datapoints that are alike.
"""

import contextlib
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.streams import BLOCK, Chunk, Noise, Stream, chunks, derive_seed, particle_blocks, reseed, seeded
from pyrogaps.training import Training
from tests.recorded_draws import UNNAMED, RecordedDraws, blocks_of, purpose_of
from tests.references import WrongEncoder, anisotropic, draws_of, parabola

# Three blocks of datapoints, the last one short; two blocks of particles; two groups of AIS chains.
NUMBER, SEED = 2 * BLOCK + 2, 7
AIS = pg.AIS(num_chains=66, num_temperatures=2, num_pilot_temperatures=2, num_leapfrog=1)
TINY: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=2, num_particles=2, num_selection=4),
    "num_particles": 130,
    "referee": False,
    "seed": SEED,
    "progress": False,
}
OPTIMISE = import_module("pyrogaps.refine.optimise")  # the package has a function of the name `refine`
# A family whose guides begin at random.
DRAWN_START = partial(AutoNormal, init_loc_fn=init_to_sample)


class Slope(nn.Module):
    """A guide for `parabola` that sees one mode at most."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.slope.exp()))


def plain() -> Callable[[], Any]:
    """With two further families, and every refinement begun twice."""
    model = anisotropic(4, 2)
    x, guide = draws_of(model, NUMBER)[0], WrongEncoder(model)
    families = {"one": DRAWN_START, "other": DRAWN_START}
    refinement = pg.Refinement(num_steps=2, num_particles=2, num_selection=4, num_starts=2)
    options = {**TINY, "families": families, "evidence": AIS, "refinement": refinement}
    return lambda: pg.decompose(model, guide, x, **options)


def escalated() -> Callable[[], Any]:
    """Posteriors of one mode and of two: every rung is climbed. With a certificate."""
    x = torch.linspace(-2, 5, NUMBER, dtype=torch.float64)
    ladder = pg.Ladder(temperatures=(2, 4), num_pilot_draws=250, max_evaluations=2000)
    options = {**TINY, "evidence": ladder, "certificate": pg.Certificate(66, 66, 2)}
    return lambda: pg.decompose(parabola, Slope(), x, **options)


def examined() -> Callable[[], Any]:
    """Every datapoint from other starts; the posteriors of the last have two modes."""
    x = torch.linspace(-2, 5, NUMBER, dtype=torch.float64)
    ladder = pg.Ladder(temperatures=(2, 4), num_pilot_draws=250, max_evaluations=2000)
    return lambda: pg.decompose(parabola, Slope(), x, **{**TINY, "evidence": ladder, "referee": NUMBER})


def bridged() -> Callable[[], Any]:
    model = anisotropic(4, 2)
    x, guide = draws_of(model, NUMBER)[0], WrongEncoder(model)
    bridge = pg.Bridge(num_draws=130, num_chains=32, num_temperatures=2)
    return lambda: pg.decompose(model, guide, x, evidence=bridge, **TINY)


def probed() -> Callable[[], Any]:
    """As `examined`, with Gaussians of low rank."""
    measure = examined()

    def run() -> Any:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("pyrogaps.gaussians.anchor.MAX_DIM", 0)
            return measure()

    return run


def conditioned() -> Callable[[], Any]:
    """With completions doubled once."""
    model = anisotropic(4, 2)
    x, guide = draws_of(model, NUMBER)[0], PartialNormal(4, 2, (4,), shown=2).double()
    conditioning = pg.Conditioning(num_completions=4, max_completions=8, tolerance=1e-9)
    return lambda: pg.decompose(model, guide, x, conditioning=conditioning, evidence=AIS, **TINY)


def split() -> Callable[[], Any]:
    """With two starts of two rounds, and a certificate by BDMC."""
    model = anisotropic(4, 2)
    x, guide = draws_of(model, NUMBER)[0], AmortizedNormal(4, 2, (4,)).double()
    train, _ = draws_of(model, NUMBER, seed=3)
    training = Training(num_epochs=2, batch_size=70)
    retraining = pg.Retraining(training, num_restarts=1, max_rounds=2, tolerance=1e-9)
    options = {"split": pg.Split(train, retraining), "certificate": pg.Certificate(66, 66, 2)}
    return lambda: pg.decompose(model, guide, x, evidence=AIS, **options, **TINY)


def calibrated() -> Callable[[], Any]:
    """Of refined posteriors."""
    model = anisotropic(4, 2)
    x, guide = draws_of(model, NUMBER)[0], WrongEncoder(model)
    options = {"posterior": "refined", "num_simulated": NUMBER, "num_draws": 130, "seed": SEED}
    return lambda: pg.calibrate(model, guide, x, refinement=TINY["refinement"], **options)


def trained() -> Callable[[], Any]:
    """Two epochs, with validation after each."""
    model = anisotropic(4, 2)
    x, guide = draws_of(model, NUMBER)[0], AmortizedNormal(4, 2, (4,)).double()
    options = {"num_epochs": 2, "batch_size": 70, "freeze_model": True, "seed": SEED, "progress": False}
    return lambda: pg.train(model, guide, x[:100], validation=x[100:], **options)


MEASUREMENTS = (plain, escalated, examined, probed, bridged, conditioned, split, calibrated, trained)
RUNS = {run.__name__: run for run in MEASUREMENTS}

# Every stream, by what it is for; numbers in names, such as those of rungs and groups of chains, left out.
REFINING = {"natural start own", "natural own", "natural further own", "select own"}
# Of further starts, and of the datapoints alone whose refinement needs more than a first round, or whose bounds need
# fresh weights, a matter of luck.
LASTING = (
    r"((natural (longer|again)|refine)( \d+)?( further)?( axes)?|natural( further)? axes|select far( axes)?)"
    r" (own|one|other)( \d+)?|ladder fresh .*"
)
BOUNDS = {"elbo", "refined own", "unused", *REFINING}
ANNEALING = {"pilot", "pilot start", "ais", "ais start"}
LADDER = {
    f"ladder {rung}"
    for rung in (
        *("first pilot", "second pilot", "third pilot", "sample", "pilot", "run"),
        *("bounds sample", "bounds run"),
    )
}
# Weights of a guide are moved only where elements of its parameters may be tied: here, constant scales of two latents.
UNTIED = {"structure", "estimates", "probe", "guide structure", "own family", "freedom"}
STRUCTURE = UNTIED | {"used weights"}


PARTS = ("shown part", "shared first half", "shared second half")
CONDITIONED = {
    *("complete", "resample", "first half", "second half", "completions, first half", "completions, second half"),
    *("error, first half", "error, second half"),
    *(f"{verb} {name}" for verb in ("refine", "refine further", "select") for name in PARTS),
    *("shown part / family", "shown part / family axes"),
}


def under(label: str, purposes: set[str]) -> set[str]:
    return {f"{label} / {purpose}" for purpose in purposes}


def of_family(name: str) -> set[str]:
    verbs = ("natural start", "natural", "natural further", "select", "start", "refined")
    refining = {f"{verb} {name}" for verb in verbs}
    return refining | under(name, {"family", "family axes"})


SIMULATED = {"simulate", "pilot", "pilot start", "reverse ais", "unused"}
CERTIFICATE = under("certificate", SIMULATED) | under("certificate / refined again", {"elbo", "unused", *REFINING})
TRAINING = under("training", {"epoch", "set up"})
PURPOSES = {
    "plain": STRUCTURE
    | BOUNDS
    | ANNEALING
    | {"start own"}
    | of_family("one")
    | of_family("other")
    | under("same family", {"unused", "family axes"}),
    "escalated": UNTIED | BOUNDS | LADDER | CERTIFICATE | under("certificate", LADDER),
    "examined": UNTIED
    | BOUNDS
    | LADDER
    | {"sample"}
    | under("examined", {"explore", "explore prior", "refined own", *REFINING} | LADDER),
    "bridged": STRUCTURE | BOUNDS | under("bridge", {"ladder pilot", "ladder draws", "ladder chains"}),
    "probed": UNTIED
    | BOUNDS
    | LADDER
    | {"sample", "anchor probes"}
    | under("examined", {"explore", "explore prior", "explore probes", "anchor probes", "refined own", *REFINING})
    | under("examined", LADDER),
    "conditioned": UNTIED
    | {"shown", "leak"}
    | BOUNDS
    | ANNEALING
    | under("completions", CONDITIONED | ANNEALING)
    | under("completions / prior run", {"scale prior", "pilot", "pilot prior", "ais", "ais prior"}),
    "split": UNTIED
    | BOUNDS
    | ANNEALING
    | CERTIFICATE
    | under("certificate", ANNEALING)
    | under("training data", BOUNDS | {"retraining", "retrained", "fresh weights"})
    | under("training data / retraining / warm", TRAINING)
    | under("training data / retraining / fresh", TRAINING),
    "calibrated": STRUCTURE | {"simulate", "calibration", "calibration ties", "unused", *REFINING},
    "trained": TRAINING | {"training / validation"},
}

# Streams that are drawn more than once on purpose, by their last label.
REPEATED = {
    r"select .*": "guides that compete, and the ends of one refinement, are scored on the same draws",
    r"completions, .* half": "both halves' guides are judged on the same draws, so that their difference is known best",
    r"anchor probes": "where all are examined, their anchors are the ledger's own, which may have to be fitted again",
    r"retraining": "the bounds of all rounds and starts of a retraining are compared on the same draws",
    r"validation": "the bounds of all epochs are compared on the same draws",
    r"family axes": "a family is set up on two and on three datapoints to see which axes differ; no guide is kept",
    r"unused": "reading a guide's distributions runs it; what it draws is discarded",
}


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest) -> tuple[str, RecordedDraws]:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    measure = RUNS[request.param]()
    with pytest.MonkeyPatch.context() as monkeypatch, RecordedDraws(monkeypatch) as draws:
        monkeypatch.setattr(OPTIMISE, "MIN_FURTHER_STEPS", 2)
        measure()
    return request.param, draws


def of_structure(name: tuple[str | int, ...]) -> bool:
    """Programs are read with a seed of their own, always the same; nothing that is measured rests on those draws."""
    return name[0] == 0


def test_every_stream_is_named(run: tuple[str, RecordedDraws]) -> None:
    kind, draws = run
    assert UNNAMED not in draws.names
    purposes = {purpose_of(name) for name in draws.names}
    needed = {purpose for purpose in purposes if not re.fullmatch(LASTING, purpose.split(" / ")[-1])}
    assert {re.sub(r" \d+", "", purpose) for purpose in needed} == PURPOSES[kind]


def test_no_two_streams_share_numbers(run: tuple[str, RecordedDraws]) -> None:
    _, draws = run
    assert {(one, other) for one, other in draws.shared() if one != other} == set()


def test_no_numbers_are_drawn_twice_but_on_purpose(run: tuple[str, RecordedDraws]) -> None:
    """Were two purposes to have one label, or two blocks, their stream would be drawn twice."""
    _, draws = run
    twice = {name for name, other in draws.shared() if name == other and not of_structure(name)}
    labels = {name: purpose_of(name).split(" / ")[-1] for name in twice}
    assert {name for name, label in labels.items() if not any(re.fullmatch(r, label) for r in REPEATED)} == set()


def test_every_block_of_datapoints_has_a_stream(run: tuple[str, RecordedDraws]) -> None:
    """So no block borrows another one's numbers either: each has drawn its own."""
    kind, draws = run
    blocks = blocks_of(draws.names)
    # Each rung of the ladder, and each further mode, is for some datapoints only; training has epochs, not blocks.
    some = f"ladder|epoch|fresh|examined.* own|examined / anchor|explore probes|{LASTING}"
    expected = {purpose for purpose in blocks if blocks[purpose] and not re.search(some, purpose)}
    smaller = {"certificate": {0, 1}}  # of 66 datapoints
    assert kind == "trained" or "natural own" in expected
    for purpose in expected:
        assert blocks[purpose] == smaller.get(purpose.split(" / ")[0], {0, 1, 2}), purpose


@pytest.mark.parametrize("run", ["plain"], indirect=True)
def test_every_block_of_particles_has_a_stream(run: tuple[str, RecordedDraws]) -> None:
    _, draws = run
    for purpose in ("elbo", "refined own", "refined one", "refined other"):
        assert {name[2:] for name in draws.names if name[1] == purpose} == {(n, s) for n in range(3) for s in range(2)}
    groups = {purpose_of(name) for name in draws.names} & {"ais", "ais start", "ais 1", "ais 1 start"}
    assert len(groups) == 4


# --- The same, as a user would see it: datapoints that are alike differ by their noise alone.


@pytest.fixture(scope="module")
def alike() -> Any:
    """The ledger of 130 datapoints that are alike, with a refinement that has nowhere to move."""
    model = anisotropic(4, 2)
    x = draws_of(model, 1)[0].expand(NUMBER, -1).clone()
    refinement = pg.Refinement(num_steps=2, num_particles=2, num_selection=4, learning_rate=1e-12)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(OPTIMISE, "MIN_FURTHER_STEPS", 2)
        optimal = WrongEncoder(model, shrink=1.0, shift=0.0, width=1.0)
        return pg.decompose(model, optimal, x, evidence=AIS, **{**TINY, "refinement": refinement})


@pytest.mark.parametrize("bound", ["elbo", "iwae", "elbo_refined", "log_evidence"])
def test_no_two_datapoints_share_noise(alike: Any, bound: str) -> None:
    values = torch.tensor(alike.per_datapoint[bound].values).flatten()
    assert len(values.unique()) == NUMBER


def test_the_refined_and_the_amortized_bound_share_no_noise(alike: Any) -> None:
    """A refined guide that has not moved is the guide itself: on one stream both bounds would be equal."""
    per_datapoint = alike.per_datapoint
    difference = per_datapoint["elbo_refined"].values[:, 0] - per_datapoint["elbo"].values
    assert abs(difference).min() > 1e-6
    error = (per_datapoint["elbo_mcse"].values ** 2 + per_datapoint["elbo_refined_mcse"].values[:, 0] ** 2) ** 0.5
    # As independent as they should be: the scaled differences have a variance of 1.
    assert abs((difference / error).var() - 1) < 4 * (2 / NUMBER) ** 0.5


def test_no_two_particles_share_noise() -> None:
    model = anisotropic(4, 2)
    x = draws_of(model, 1)[0]
    weights = pg.elbo(model, WrongEncoder(model), x, num_particles=300).log_weights
    assert weights is not None and len(weights.unique()) == 300


# --- The streams themselves.


def test_a_stream_is_named_by_seed_and_labels_in_order() -> None:
    names: list[tuple[Any, ...]] = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 0), (0, "a", "0"), (0, 0, "a"), (0, "a0")]
    names += [(0, "a", "b"), (0, "b", "a"), (0, "ab"), (0, "a", 1), (0, "a", 64), (10, "a"), (1, 0, "a")]
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    """Python's own `hash` of a string is not; ledgers saved before rest on these."""
    assert derive_seed(0, "elbo", 0, 0) == 1715809249585123710


def test_seeded_gives_the_callers_state_back() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with seeded(0, "a"):
        first = torch.randn(5)
        reseed(0, "b")
        second = torch.randn(5)
    assert torch.equal(torch.get_rng_state(), state)
    with contextlib.suppress(ZeroDivisionError), seeded(0, "a"):
        _ = torch.randn(1) / (1 // 0)
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(0, "b"):
        assert torch.equal(torch.randn(5), second)
    assert not torch.isin(first, second).any()


@pytest.mark.parametrize(("number", "size"), [(1, 1), (64, 64), (130, 1), (130, 65), (130, 500), (300, 128)])
def test_chunks_are_whole_blocks_and_hold_every_datapoint_once(number: int, size: int) -> None:
    pieces = chunks(number, size)
    assert torch.equal(torch.cat([chunk.indices for chunk in pieces]), torch.arange(number))
    blocks = [block for chunk in pieces for block in chunk.blocks()]
    assert [block.start for block in blocks] == list(range(0, number, BLOCK))
    assert all(len(block) == BLOCK for block in blocks[:-1])
    assert all(len(chunk) % BLOCK == 0 and len(chunk) < size + BLOCK for chunk in pieces[:-1])


@pytest.mark.parametrize("number", [1, 127, 128, 129, 300])
def test_particle_blocks_hold_every_particle_once(number: int) -> None:
    sizes = particle_blocks(number)
    assert sum(sizes) == number
    assert set(sizes[:-1]) <= {128} and 0 < sizes[-1] <= 128


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_does_not_depend_on_the_size_of_a_chunk(kind: str, dtype: torch.dtype) -> None:
    """Nor on how often it was asked for elsewhere: a block goes on with its own generator alone."""

    def noise(chunk: Chunk, purpose: str = "test", seed: int = 0) -> Tensor:
        source = Noise(Stream(seed, purpose), chunk, dtype=dtype, device=torch.device("cpu"))
        return torch.cat([getattr(source, kind)(3, 2), getattr(source, kind)(4, 2)])

    whole = noise(Chunk(0, NUMBER))
    assert whole.shape == (7, NUMBER, 2) and whole.dtype == dtype
    parts = [noise(chunk) for chunk in chunks(NUMBER, 1)]
    assert torch.equal(torch.cat(parts, 1), whole)
    # Nothing is repeated: among single precision's uniforms, of 24 bits, a few are alike by chance.
    for other in (noise(Chunk(0, NUMBER), "other"), noise(Chunk(0, NUMBER), seed=1)):
        together = torch.cat([whole, other]).flatten()
        assert len(together.unique()) > 0.999 * len(together)


def test_noise_is_standard() -> None:
    source = Noise(Stream(0, "test"), Chunk(0, NUMBER), dtype=torch.float64, device=torch.device("cpu"))
    normal, uniform = source.normal(200), source.uniform(200)
    number = normal.numel()
    assert abs(normal.mean()) < 4 / number**0.5 and abs(normal.var() - 1) < 4 * (2 / number) ** 0.5
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / number) ** 0.5 and uniform.min() >= 0 and uniform.max() < 1
