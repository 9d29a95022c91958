"""Error of log p(x) per image (root mean square), by the ladder and other methods in equal time.

Test images under the MNIST VAE of `mnist_vae.py`, in one process, all methods on one thread and core. Beside the
ladder at its defaults: adaptive tempered SMC of BlackJAX from the prior, with its HMC kernel and a diagonal mass matrix
from the particles; AIS from the prior by HMC along a sigmoid schedule, as in bidirectional Monte Carlo
(Grosse et al., 2015, arXiv:1511.02543); IWAE from the guide with 5,000 draws, and with as many as time allows; and this
library's bridge sampling.

Each peer's size (particles, temperatures, draws) is raised until it takes at least the ladder's CPU time. A separate
run chooses the settings of `smc_settings` and `ais_settings` with the least error against the reference; it does not
count. Recording, compiling and loading are not timed, and no datapoint is examined from other starts
(`referee=False`). The rounds are interleaved, each with a new seed. The reference is a long run of AIS, whose own
error must be at most 0.02 nats.

    PYROGAPS_DATA=... python -m benchmarks.peers    # 15 minutes after training
    python -m benchmarks.peers --quick              # seconds, on digits: does it run?

BlackJAX is compared where it is installed (extra `bench`).
"""

import argparse
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.mnist_vae import trained_vae
from benchmarks.reporting import machine, one_core, report, write
from pyrogaps import AIS, Bridge, Evidence, Ladder, Problem, log_evidence
from pyrogaps.bounds import chunk_log_weights
from pyrogaps.log_weights import log_mean_exp
from pyrogaps.streams import Chunk, Stream, seeded

REFERENCE, REFERENCE_ERROR = AIS(num_chains=128, num_temperatures=500, num_leapfrog=3), 0.02
TUNING_SEED = 1000
SLACK = 1.1  # a peer gets this many times the ladder's time: its size is set by one noisy measurement
NUM_IWAE = 5000

# From a size and a seed to log p(x) `(N,)`.
Estimator = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Peer:
    """A method with its settings; `size` is what grows with time, in units of `unit`."""

    name: str
    settings: str
    estimate: Estimator
    size: int
    unit: int = 1


def by_evidence(problem: Problem, evidence: Callable[[int], Evidence]) -> Estimator:
    return lambda size, seed: log_evidence(problem, evidence=evidence(size), seed=seed, referee=False).value


def by_iwae(problem: Problem) -> Estimator:
    """As `pyrogaps.iwae`, from the record that the others use."""
    chunk = Chunk(0, problem.num_datapoints)

    def estimate(size: int, seed: int) -> Tensor:
        with seeded(seed, "unused"):
            weights = chunk_log_weights(problem.evaluator, problem.guided(), chunk, size, Stream(seed, "iwae"))
        return log_mean_exp(weights)

    return estimate


def ais_settings(problem: Problem, options: argparse.Namespace) -> Iterator[Peer]:
    """AIS from the prior by few or many chains, on either schedule, with one leapfrog step to a temperature."""
    for schedule in options.schedules:
        for number in options.chains:
            settings = AIS(
                num_chains=number, num_leapfrog=1, schedule=schedule, initial="prior", target_acceptance=0.65
            )
            evidence = partial(_with_temperatures, settings)
            label = f"{schedule}, {number} chains, temperatures:"
            yield Peer("AIS from the prior (BDMC)", label, by_evidence(problem, evidence), 960 // number)


def _with_temperatures(settings: AIS, number: int) -> AIS:
    return replace(settings, num_temperatures=number)


def smc_settings(problem: Problem, model: torch.nn.Module, x: Tensor, options: argparse.Namespace) -> Iterator[Peer]:
    """BlackJAX's adaptive tempered SMC from the prior, by step size (in particles' standard deviations) and the
    effective share of particles that sets its temperatures. Each mutation is one HMC transition.
    """
    try:
        import blackjax
        import blackjax.smc.resampling as resampling
        import jax
        import jax.numpy as jnp
        from blackjax.smc import adaptive_tempered
    except ImportError:
        return
    linear = [layer for layer in model.decoder if isinstance(layer, torch.nn.Linear)]  # type: ignore[union-attr]
    layers = [(jnp.asarray(layer.weight.numpy()), jnp.asarray(layer.bias.numpy())) for layer in linear]
    images, dim = jnp.asarray(x.flatten(1).numpy()), problem.dim

    def log_prior(z: Any) -> Any:
        return -0.5 * (z**2).sum() - 0.5 * dim * math.log(2 * math.pi)

    def log_likelihood(z: Any, image: Any) -> Any:
        hidden = z
        for weight, bias in layers[:-1]:
            hidden = jax.nn.elu(hidden @ weight.T + bias)
        logits = hidden @ layers[-1][0].T + layers[-1][1]
        return (image * logits - jax.nn.softplus(logits)).sum()

    point = 0.3 * torch.randn(1, len(x), dim, generator=torch.Generator().manual_seed(0))
    ours = problem.joint(point, torch.arange(len(x)))[0].detach()
    theirs = [float(log_prior(z) + log_likelihood(z, image)) for z, image in zip(point[0].numpy(), images, strict=True)]
    if (difference := float((ours - torch.tensor(theirs)).abs().max())) > 1e-2:
        raise SystemExit(f"the densities differ by {difference:.1e} nats")

    def run(key: Any, image: Any, step_size: Any, num_particles: int, target_ess: float) -> Any:
        kernel = adaptive_tempered.build_kernel(
            log_prior,
            lambda z: log_likelihood(z, image),
            partial(blackjax.hmc.build_kernel(), num_integration_steps=options.num_leapfrog),
            blackjax.hmc.init,
            resampling.systematic,
            target_ess,
        )

        def advance(carry: Any) -> Any:
            key, state, log_evidence = carry
            key, own = jax.random.split(key)
            mean = (state.weights[:, None] * state.particles).sum(0)
            variance = (state.weights[:, None] * (state.particles - mean) ** 2).sum(0).clip(1e-4)
            parameters = {"step_size": step_size[None], "inverse_mass_matrix": variance[None]}
            state, info = kernel(own, state, 1, parameters)
            return key, state, log_evidence + info.log_likelihood_increment

        key, own = jax.random.split(key)
        start = adaptive_tempered.init(jax.random.normal(own, (num_particles, dim)))
        return jax.lax.while_loop(lambda carry: carry[1].tempering_param < 1, advance, (key, start, 0.0))[2]

    compiled = jax.jit(run, static_argnums=(3, 4))

    def estimate(step_size: float, target_ess: float, size: int, seed: int) -> Tensor:
        keys = jax.random.split(jax.random.key(seed), len(images))
        found = [
            compiled(key, image, jnp.float32(step_size), size, target_ess)
            for key, image in zip(keys, images, strict=True)
        ]
        return torch.tensor([float(value) for value in found], dtype=torch.float64)

    for target_ess in options.target_ess:
        for step_size in options.step_sizes:
            label = f"{options.num_leapfrog} leapfrog steps of {step_size:g}, ESS {target_ess:.0%}, particles:"
            yield Peer("BlackJAX's adaptive tempered SMC", label, partial(estimate, step_size, target_ess), 8, 2)


def cpu_seconds(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What `work` returns, and the CPU time of all threads of this process in it."""
    begin = time.process_time()
    return work(), time.process_time() - begin


def sized(peer: Peer, budget: float) -> int:
    """The size at which a peer takes the budget, seconds, whose cost is nearly proportional to it."""
    peer.estimate(peer.size, TUNING_SEED)
    _, seconds = cpu_seconds(partial(peer.estimate, peer.size, TUNING_SEED))
    size = peer.size
    for _ in range(3):  # what does not grow with the size, such as a pilot, is found out this way
        if seconds >= budget:
            break
        size = math.ceil(size * min(SLACK * budget / seconds, 16) / peer.unit) * peer.unit
        peer.estimate(size, TUNING_SEED)
        _, seconds = cpu_seconds(partial(peer.estimate, size, TUNING_SEED))
    return size


def rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def best(peers: Iterator[Peer], budget: float, truth: Tensor) -> Peer | None:
    """Of the settings of a method, those with the least error, at the size that takes the budget."""
    tried = []
    for peer in peers:
        size = sized(peer, budget)
        values, seconds = cpu_seconds(partial(peer.estimate, size, TUNING_SEED + 1))
        tried.append((rms(values - truth), Peer(peer.name, f"{peer.settings} {size}", peer.estimate, size)))
        print(f"  {peer.name}, {peer.settings} {size}: error {tried[-1][0]:.3f}, {seconds:.2f} s", flush=True)
    return min(tried, key=lambda pair: pair[0])[1] if tried else None


def reference(problem: Problem, settings: AIS, file: Path) -> tuple[Tensor, float]:
    """log p(x) by the long run, kept in `file`, and the root mean square of its errors."""
    if not file.exists():
        found, stream = log_evidence(problem, evidence=settings, seed=2000, referee=False), io.BytesIO()
        torch.save({"value": found.value, "mcse": found.mcse}, stream)
        write(file, stream.getvalue())
    kept = torch.load(file)
    return kept["value"], rms(kept["mcse"])


def compare(problem: Problem, model: torch.nn.Module, x: Tensor, options: argparse.Namespace) -> None:
    """Sizes, then rounds in turns."""
    truth, error = reference(problem, options.reference, options.runs / options.file)
    print(f"reference: root mean square standard error {error:.4f}, at most {REFERENCE_ERROR} allowed", flush=True)
    if error > REFERENCE_ERROR and not options.quick:
        raise SystemExit("the reference is too noisy; raise num_chains of REFERENCE")
    ladder = Peer("ladder", "defaults", by_evidence(problem, lambda size: Ladder()), 1)
    bridge = Peer("bridge sampling", "defaults", by_evidence(problem, lambda size: Bridge()), 1)
    for peer in (ladder, bridge):
        peer.estimate(1, TUNING_SEED)
    budget = median(cpu_seconds(partial(ladder.estimate, 1, seed))[1] for seed in range(TUNING_SEED, TUNING_SEED + 3))
    iwae = Peer("IWAE from the guide", "draws:", by_iwae(problem), options.num_iwae, 128)
    methods = (smc_settings(problem, model, x, options), ais_settings(problem, options), iter([iwae]))
    peers = [peer for method in methods if (peer := best(method, budget, truth)) is not None]
    fixed = Peer(f"IWAE-{options.num_iwae} from the guide", f"draws: {options.num_iwae}", iwae.estimate, iwae.size)
    everyone, errors, seconds = [ladder, bridge, *peers, fixed], {}, {}
    for seed in range(options.rounds):
        for peer in everyone:
            values, spent = cpu_seconds(partial(peer.estimate, peer.size, seed))
            errors.setdefault(peer.name, []).append(values - truth)
            seconds.setdefault(peer.name, []).append(spent)
    own = rms(torch.stack(errors["ladder"]))
    rows = []
    for peer in everyone:
        off, spent = torch.stack(errors[peer.name]), median(seconds[peer.name])
        ratio = median(a / b for a, b in zip(seconds[peer.name], seconds["ladder"], strict=True))
        row = [peer.name, peer.settings, spent / len(x) * 1000, ratio, rms(off), float(off.mean()), rms(off) / own]
        rows.append([*row, error])
    columns = [
        "",
        "settings",
        "CPU ms",
        "/ ladder's",
        "rms error",
        "mean error",
        "error / ladder's",
        "reference's s.e.",
    ]
    title = f"log p(x) of {len(x)} images in equal time, one thread, {options.rounds} rounds: errors per image (nats)"
    report("peers", title, columns, rows, quick=options.quick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, on digits: does it run?")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path(__file__).parent / "runs")
    options = parser.parse_args()
    options.reference, options.schedules, options.num_iwae = REFERENCE, ("sigmoid",), NUM_IWAE
    # What was worse on these images, in equal time: SMC with 1 or 10 leapfrog steps, other steps from 0.2 to 0.8, and
    # an effective share of 50%; AIS with 3 or 10 leapfrog steps, and linear.
    options.num_leapfrog, options.step_sizes, options.target_ess = 3, (0.4,), (0.8, 0.9, 0.95)
    options.chains = (4, 16)
    if options.quick:
        options.reference, options.images, options.rounds = AIS(num_chains=16, num_temperatures=20), 4, 1
        options.schedules, options.num_iwae, options.chains = ("sigmoid",), 128, (16,)
        options.step_sizes, options.target_ess = (0.4,), (0.5,)
    options.file = f"peers-reference-{options.images}{'-quick' if options.quick else ''}.pt"
    model, guide, test = trained_vae(options.runs, quick=options.quick)
    x = test[: options.images]
    with one_core(), torch.no_grad():
        print(f"{machine()}; {len(x)} test images", flush=True)
        compare(Problem.of(model, guide, x), model, x, options)


if __name__ == "__main__":
    main()
