"""What `decompose` costs over its matrix products alone, which nothing that computes the same numbers can avoid.

A VAE with the decoder 50-200-200-784 (ELU, Bernoulli) on binary images: all of a ledger, from the ELBO of the guide
over the refinement and the scoring of its result to annealed importance sampling, in one process. The points at which
the density was evaluated are counted as the run goes; the floor is the time of the decoder's products for as many
points, forward and backward where there were gradients, forward where there were values, by oneDNN and by PyTorch's own
(MKL). They take turns with the ledgers; the figures are medians over rounds of the ratio in the same round.

    python -m benchmarks.floor            # about five minutes on one thread
    python -m benchmarks.floor --quick    # seconds: does it run?
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import pyrogaps as pg
from benchmarks.reporting import machine, report
from pyrogaps.capture import GradientEvaluator, Mode
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.vae import VAE

LATENT, HIDDEN, PIXELS = 50, (200, 200), 784
ROWS = 1024  # points at a time, as the library takes them
Product = Callable[[Tensor, Tensor], Tensor]


def by_onednn(left: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], "")
    return result


def by_pytorch(left: Tensor, weight: Tensor) -> Tensor:
    return left @ weight.T


LIBRARIES: dict[str, Product] = {"oneDNN": by_onednn, "PyTorch": by_pytorch}


def counted(run: Callable[[], object]) -> tuple[float, int, int]:
    """Seconds that `run` took, and at how many points it evaluated gradients and values alone."""
    evaluators: list[GradientEvaluator] = []
    begin = GradientEvaluator.__init__

    def noted(self: GradientEvaluator, *args: object, **kwargs: object) -> None:
        begin(self, *args, **kwargs)  # type: ignore[arg-type]
        evaluators.append(self)

    GradientEvaluator.__init__ = noted  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    finally:
        GradientEvaluator.__init__ = begin  # type: ignore[method-assign]
    return seconds, sum(e.num_gradients for e in evaluators), sum(e.num_values for e in evaluators)


def products(model: VAE, product: Product, *, backward: bool, repeats: int) -> float:
    """Seconds of the decoder's products, a point."""
    weights = [layer.weight for layer in model.decoder if isinstance(layer, nn.Linear)]
    activations = [torch.randn(ROWS, weight.shape[1]) for weight in weights]
    errors = [torch.randn(ROWS, weight.shape[0]) for weight in weights]
    turned = [weight.T.contiguous() for weight in weights]

    def once() -> None:
        for activation, weight in zip(activations, weights, strict=True):
            product(activation, weight)
        if backward:
            for error, weight in zip(errors, turned, strict=True):
                product(error, weight)

    once()
    start = time.perf_counter()
    for _ in range(repeats):
        once()
    return (time.perf_counter() - start) / repeats / ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--datapoints", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave out the mode that needs a C++ compiler")
    options = parser.parse_args()
    if options.quick:
        options.datapoints, options.rounds, options.no_compile = 64, 1, True
    torch.set_num_threads(options.threads)

    torch.manual_seed(0)
    model = VAE(PIXELS, LATENT, HIDDEN).requires_grad_(False)
    guide = AmortizedNormal(PIXELS, LATENT, HIDDEN).requires_grad_(False)
    x = (torch.rand(options.datapoints, PIXELS) < 0.2).float()
    few = {"num_chains": 4, "num_temperatures": 3} if options.quick else {}
    steps = 5 if options.quick else 300

    def ledger(mode: Mode) -> Callable[[], object]:
        evidence, refinement = pg.AIS(**few), pg.Refinement(num_steps=steps)
        return lambda: pg.decompose(
            pg.Problem.of(model, guide, x, mode=mode), evidence=evidence, refinement=refinement, progress=False
        )

    modes: list[Mode] = ["eager", "captured", *([] if options.no_compile else ["compiled"])]
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    ratios: dict[tuple[str, str], list[float]] = {(mode, library): [] for mode in modes for library in LIBRARIES}
    with torch.no_grad():
        if "compiled" in modes:
            ledger("compiled")()  # what a compiler has done once it finds again
        for _ in range(options.rounds):
            for mode in modes:
                taken, gradients, values = counted(ledger(mode))
                seconds[mode].append(taken)
                for library, product in LIBRARIES.items():
                    whole, alone = (
                        products(model, product, backward=backward, repeats=2 if options.quick else 200)
                        for backward in (True, False)
                    )
                    ratios[mode, library].append(taken / (gradients * whole + values * alone))
    rows = [[mode, median(seconds[mode]), *(median(ratios[mode, library]) for library in LIBRARIES)] for mode in modes]
    title = (
        f"A ledger of {options.datapoints} images ({gradients // options.datapoints} gradients and "
        f"{values // options.datapoints} values each), over its matrix products"
    )
    columns = ["mode", "seconds", *(f"/ products by {library}" for library in LIBRARIES)]
    report("floor", title, columns, rows, quick=options.quick)
    print(machine())


if __name__ == "__main__":
    main()
