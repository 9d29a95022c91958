"""What one leapfrog step costs through a Pyro model, beside a hand-written one, BlackJAX's, and its matrix products.

Every implementation makes the same HMC transition of `--leapfrogs` steps, as annealed importance sampling does from
a guide: on (1 - b) log f_0(z) + b log p(x, z), f_0 a diagonal Gaussian, x binary images, p a VAE with the decoder
50-200-200-784 (ELU, Bernoulli), for 100 datapoints with 16 chains each, in one process, on one thread of one
core, JAX too. They take turns; the figures are medians over rounds of the time per leapfrog step, and of its ratio to
another's in the same round.

    python -m benchmarks.leapfrog            # about two minutes
    python -m benchmarks.leapfrog --quick    # seconds: does it run?

BlackJAX is compared where it is installed (extra `bench`).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.reporting import machine, one_core, report
from pyrogaps import JointDensity
from pyrogaps.capture import GradientEvaluator, Mode
from pyrogaps.evidence.paths import from_gaussian
from pyrogaps.gaussians import Gaussian
from pyrogaps.hmc import Leapfrog, transition
from pyrogaps.models.vae import VAE

BETA, STEP = 0.6, 0.05
Transition = Callable[[], object]


class Problem:
    """Decoder, data, anchor and noise that all implementations share."""

    def __init__(self, num_datapoints: int, num_chains: int, num_leapfrog: int) -> None:
        torch.manual_seed(0)
        self.shape, self.num_leapfrog = (num_chains, num_datapoints), num_leapfrog
        self.model = VAE(784, 50, (200, 200)).requires_grad_(False)
        self.layers = [layer for layer in self.model.decoder if isinstance(layer, torch.nn.Linear)]
        self.x = (torch.rand(num_datapoints, 784) < 0.2).float()
        self.start = Gaussian(0.3 * torch.randn(num_datapoints, 50), 0.5 + torch.rand(num_datapoints, 50))
        self.z = self.start.draw(torch.randn(*self.shape, 50))
        self.velocity, self.uniform = torch.randn(*self.shape, 50), torch.rand(self.shape)
        self.step = torch.full(self.shape, STEP)


def through_pyro(problem: Problem, mode: Mode) -> tuple[Transition, Tensor]:
    """The library's own transition, and its gradient at the starting points."""
    evaluator = GradientEvaluator(JointDensity(problem.model, problem.x), mode)
    bound = evaluator.bind(torch.arange(problem.shape[1]), problem.shape[0])
    evaluate = from_gaussian(problem.start, bound, bound.gradients)
    state = evaluate(problem.z)
    weights = (torch.tensor(1 - BETA), torch.tensor(BETA))
    gradient = weights[0] * state.gradients[0] + weights[1] * state.gradients[1]

    def run() -> object:
        leapfrog = Leapfrog(evaluate, problem.start.scale, problem.num_leapfrog)
        return transition(leapfrog, state, weights, problem.step, problem.velocity, problem.uniform)

    if evaluator.mode != mode:
        raise RuntimeError(f"the model fell back from {mode} to {evaluator.mode}")
    return run, gradient


def by_hand(problem: Problem) -> tuple[Transition, Tensor]:
    """What one would write for this model alone in PyTorch: autograd, fused cross-entropy, data broadcast."""
    x, loc, scale = problem.x, problem.start.loc, problem.start.scale

    def value_and_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            logits = problem.model.decoder(z)
            cross_entropy = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
            log_joint = -cross_entropy - 0.5 * z.square().sum(-1)
            log_start = -0.5 * ((z - loc) / scale).square().sum(-1)
            value = (1 - BETA) * log_start + BETA * log_joint
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    value, gradient = value_and_gradient(problem.z)

    def run() -> object:
        z, velocity, force = problem.z, problem.velocity, gradient
        step = problem.step[..., None]
        energy = value - 0.5 * velocity.square().sum(-1)
        for _ in range(problem.num_leapfrog):
            velocity = velocity + 0.5 * step * scale * force
            z = z + step * scale * velocity
            proposed, force = value_and_gradient(z)
            velocity = velocity + 0.5 * step * scale * force
        accept = problem.uniform < (proposed - 0.5 * velocity.square().sum(-1) - energy).exp()
        return torch.where(accept[..., None], z, problem.z), torch.where(accept, proposed, value)

    return run, gradient


def matrix_products(problem: Problem, library: str) -> Transition:
    """Forward and backward matrix products of the decoder alone: nothing that uses this library can beat them."""
    rows = problem.shape[0] * problem.shape[1]
    weights = [layer.weight for layer in problem.layers]
    activations = [torch.randn(rows, weight.shape[1]) for weight in weights] + [torch.randn(rows, weights[-1].shape[0])]
    results = [torch.empty_like(a) for a in activations]

    def product(left: Tensor, right: Tensor, result: Tensor) -> None:
        if library == "oneDNN":
            torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
        else:
            torch.mm(left, right, out=result)

    def run() -> object:
        for _ in range(problem.num_leapfrog):
            for k, weight in enumerate(weights):
                product(activations[k], weight.T, results[k + 1])
            for k, weight in reversed(list(enumerate(weights))):
                product(activations[k + 1], weight, results[k])
        return results

    return run


def by_blackjax(problem: Problem) -> tuple[Transition, Tensor] | None:
    """BlackJAX's HMC with the same weights, vectorised over chains and datapoints, one compiled call per transition."""
    try:
        import blackjax
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    layers = [(jnp.asarray(layer.weight.numpy()), jnp.asarray(layer.bias.numpy())) for layer in problem.layers]
    x, loc, scale, z = (
        jnp.asarray(value.numpy()) for value in (problem.x, problem.start.loc, problem.start.scale, problem.z)
    )

    def log_density(z, x, loc, scale):  # type: ignore[no-untyped-def]
        hidden = z
        for weight, bias in layers[:-1]:
            hidden = jax.nn.elu(hidden @ weight.T + bias)
        logits = hidden @ layers[-1][0].T + layers[-1][1]
        log_joint = (x * logits - jax.nn.softplus(logits)).sum() - 0.5 * (z**2).sum()
        return (1 - BETA) * -0.5 * (((z - loc) / scale) ** 2).sum() + BETA * log_joint

    def step(key, state, x, loc, scale):  # type: ignore[no-untyped-def]
        sampler = blackjax.hmc(
            lambda z: log_density(z, x, loc, scale),
            step_size=STEP,
            inverse_mass_matrix=scale**2,
            num_integration_steps=problem.num_leapfrog,
        )
        return sampler.step(key, state)[0]

    over_datapoints = jax.vmap(step, in_axes=(0, 0, 0, 0, 0))
    steps = jax.jit(jax.vmap(over_datapoints, in_axes=(0, 0, None, None, None)))
    keys = jax.random.split(jax.random.key(0), problem.shape)

    def start(z, x, loc, scale):  # type: ignore[no-untyped-def]
        return blackjax.mcmc.hmc.init(z, lambda z: log_density(z, x, loc, scale))

    state = jax.jit(jax.vmap(jax.vmap(start), in_axes=(0, None, None, None)))(z, x, loc, scale)
    jax.block_until_ready(steps(keys, state, x, loc, scale))
    gradient = torch.from_numpy(jax.device_get(state.logdensity_grad).copy())
    return lambda: jax.block_until_ready(steps(keys, state, x, loc, scale)), gradient


def agree(gradients: dict[str, Tensor]) -> float:
    """The largest difference of any gradient from the hand-written one, relative to that one's largest entry."""
    reference = gradients["by hand"]
    return max(float((g - reference).abs().max() / reference.abs().max()) for g in gradients.values())


def measure(runs: dict[str, Transition], num_rounds: int, num_leapfrog: int) -> dict[str, list[float]]:
    """Milliseconds per leapfrog step of every implementation, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2):
        for run in runs.values():
            run()
    for _ in range(num_rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin) / num_leapfrog)
    return times


def ratio(values: list[float], others: list[float]) -> float:
    return median(a / b for a, b in zip(values, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--datapoints", type=int, default=100)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--leapfrogs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-compile", action="store_true", help="leave out the mode that needs a C++ compiler")
    options = parser.parse_args()
    if options.quick:
        options.datapoints, options.chains, options.leapfrogs, options.rounds, options.no_compile = 8, 2, 2, 2, True
    with one_core(), torch.no_grad():
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Check that the gradients agree, take times in turns, and report them."""
    problem = Problem(options.datapoints, options.chains, options.leapfrogs)
    runs: dict[str, Transition] = {}
    gradients: dict[str, Tensor] = {}
    runs["by hand"], gradients["by hand"] = by_hand(problem)
    modes: tuple[Mode, ...] = ("eager", "captured") if options.no_compile else ("eager", "captured", "compiled")
    for mode in modes:
        runs[f"pyrogaps, {mode}"], gradients[mode] = through_pyro(problem, mode)
    if (blackjax := by_blackjax(problem)) is not None:
        runs["BlackJAX"], gradients["BlackJAX"] = blackjax
    runs["products alone, PyTorch's"] = matrix_products(problem, "PyTorch")
    if torch.backends.mkldnn.is_available():
        runs["products alone, oneDNN's"] = matrix_products(problem, "oneDNN")
    difference = agree(gradients)
    if difference > 1e-4:
        raise SystemExit(f"the gradients differ by {difference:.1e} of the largest")
    times = measure(runs, options.rounds, options.leapfrogs)

    floor = list(runs)[-1]
    rows = []
    for name, values in times.items():
        ratios = [ratio(values, times[other]) if other in times else None for other in ("by hand", "BlackJAX", floor)]
        rows.append([name, median(values), min(values), *ratios])
    title = (
        f"One leapfrog step, {options.datapoints} datapoints x {options.chains} chains: ms, ratios of the same round"
    )
    report(
        "leapfrog",
        title,
        ["implementation", "median", "best", "/ by hand", "/ BlackJAX", "/ floor"],
        rows,
        quick=options.quick,
    )
    print(f"gradients agree to {difference:.1e} of the largest\n{machine()}")


if __name__ == "__main__":
    main()
