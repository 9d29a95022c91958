"""phi-hat: the guide's own network, trained on for the frozen model until its training bound improves no more."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyrogaps.conditioning import SimulatedData
from pyrogaps.density import Data, IndexedData
from pyrogaps.density.copies import as_module, copied
from pyrogaps.density.data import part_of, rows_of
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError, reason_of
from pyrogaps.run import Run
from pyrogaps.settings import Count, Positive, Several, Whole, checked
from pyrogaps.streams import seeded
from pyrogaps.training import Cosine, Training, train

WARM = "warm"


def _round() -> Training:
    return Training(num_epochs=50, schedule=Cosine(50, final=0.01))


@checked("retraining")
@dataclass(frozen=True)
class Retraining:
    """How phi-hat is found, for the `split` of the amortization gap.

    Args:
        training: settings of one round of `pyrogaps.train`, for the guide alone; the learning rate should fall in it.
        num_restarts: how often to start from fresh weights, besides the guide's own. Fresh ones are drawn by each
            module's `reset_parameters()`; parameters of a module without one start from the guide's values, and the
            ledger names them. Frozen ones (`requires_grad=False`) stay as they are.
        max_rounds: of every start.
        tolerance: a start has converged when a round raises its ELBO on the training data by no more, nats.
        num_datapoints: how many training datapoints, evenly spaced, bounds are measured on; null: all.

    Raises `InputError` for a setting out of range.

    Example:
        >>> import pyrogaps as pg
        >>> fast = pg.Retraining(pg.Training(num_epochs=20, learning_rate=2e-3), num_restarts=0)
        >>> fast.max_rounds
        10
    """

    training: Training = field(default_factory=_round)
    num_restarts: Whole = 1
    max_rounds: Count = 10
    tolerance: Positive = 0.01
    num_datapoints: Several | None = 512

    def __post_init__(self) -> None:
        for name in ("objective", "patience"):
            if getattr(self.training, name) is not None:
                raise InputError(
                    f"retraining.training: leave {name} out. Retraining maximises the ELBO in rounds of fixed length"
                )


@checked("split")
@dataclass(frozen=True)
class Split:
    """The data that the guide was trained on, and how to train it on: what splits the amortization gap.

    Args:
        train_data: as the data of `decompose`. `SimulatedData(model, x)` trains phi-hat on data drawn from the model
            without end, which has nothing to memorise; with datapoints drawn from the model for evaluation too
            (`SimulatedData(model, x).fetch(torch.arange(512))`) the generalization gap is then 0 but for its error, and
            capacity and optimization are those on the model's own distribution: a check on the split.
        retraining: how phi-hat is found.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> quick = pg.Retraining(pg.Training(num_epochs=2), num_restarts=0, max_rounds=1)
        >>> ledger = pg.decompose(model, guide, x[:3], split=pg.Split(x, quick), num_particles=50, progress=False)
        >>> [name for name in ("capacity_gap", "generalization_gap") if name in ledger.gaps["gap"]]
        ['capacity_gap', 'generalization_gap']
    """

    train_data: Data = field(repr=False)
    retraining: Retraining = field(default_factory=Retraining)

    def measured(self, model: Program | None = None) -> tuple[IndexedData, torch.Tensor]:
        """The training datapoints that bounds are measured on, and their indices; simulated ones are drawn once."""
        indexed, most = as_indexed(self.train_data, model), self.retraining.num_datapoints
        if not isinstance(indexed, SimulatedData):
            return part_of(indexed, len(indexed) if most is None else most)
        indices = torch.arange(min(len(indexed), most or len(indexed)))
        with seeded(0, "measured training data"):
            return rows_of(indexed.fetch(indices), len(indices), indexed), indices


@dataclass(frozen=True)
class Candidate:
    """A copy of the guide to train on: its name, and `kept`, the parameters that fresh weights left as they were."""

    name: str
    guide: nn.Module
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """One start of the retraining, with the bound before and after every round, nats, and its best guide."""

    candidate: Candidate
    bounds: list[float]
    converged: bool
    guide: nn.Module

    def described(self) -> dict[str, Any]:
        """What a ledger keeps of it."""
        name, kept = self.candidate.name, list(self.candidate.kept)
        return {"start": name, "elbo": self.bounds, "converged": self.converged, "kept": kept}


def trainable(guide: Any) -> nn.Module:
    """The guide as a module of which copies can be trained.

    Raises `InputError` where it has no parameters of modules.
    """
    module = as_module(guide)
    if module is None:
        raise InputError(
            "split: no module with trainable parameters was found in the guide, so no copy of it can be trained. Write "
            "it as an nn.Module, its networks as attributes and its code in forward, or leave split out"
        )
    return module


def retrain(
    model: Program,
    guide: Program,
    split: Split,
    bound: Callable[[Program], float],
    run: Run,
    folder: Path | None = None,
) -> list[Start]:
    """Copies of `guide` trained on from its weights and from fresh ones, the best by `bound` first.

    A start is trained in rounds until one of them raises `bound`, the ELBO of the measured training data, by no more
    than the tolerance, or there have been `max_rounds`. Neither model nor guide are changed. `folder` keeps finished
    rounds, from which a run that was stopped continues. A guide without any module that can be drawn anew has no fresh
    starts.

    Raises `InputError` for a guide without parameters of modules, and where training diverges.
    """
    candidates = _candidates(trainable(guide), split.retraining.num_restarts, run)
    starts = [_trained_on(model, candidate, split, bound, run, folder) for candidate in candidates]
    return sorted(starts, key=lambda start: -max(start.bounds))


def _candidates(guide: nn.Module, num_restarts: int, run: Run) -> Iterator[Candidate]:
    """The guide's own weights, then fresh ones."""
    yield Candidate(WARM, copied(guide))
    for number in range(1, num_restarts + 1):
        fresh = copied(guide)
        with run.stream("fresh weights").seeded(number):
            kept, some_fresh = _reset(fresh)
        if some_fresh:
            yield Candidate(f"fresh {number}", fresh, kept)


def _reset(guide: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Draw all weights anew; returns the names of those that no module could draw, and whether it drew any.

    A module comes after those within it: its own `reset_parameters` may start a layer otherwise than the layer does.
    """
    before = {name: value.detach().clone() for name, value in guide.named_parameters()}
    drawn = set()
    for prefix, module in reversed(list(guide.named_modules())):
        trained = any(value.requires_grad for value in module.parameters())
        if trained and callable(reset := getattr(module, "reset_parameters", None)):
            reset()
            drawn |= {f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
    with torch.no_grad():
        for name, value in guide.named_parameters():
            if not value.requires_grad:
                value.copy_(before[name])
            elif not torch.equal(value, before[name]):
                drawn.add(name)
    trainable = [name for name, value in guide.named_parameters() if value.requires_grad]
    return tuple(name for name in trainable if name not in drawn), any(name in drawn for name in trainable)


def _trained_on(
    model: Program, candidate: Candidate, split: Split, bound: Callable[[Program], float], run: Run, folder: Path | None
) -> Start:
    chosen, name, guide = split.retraining, candidate.name, candidate.guide
    bounds, best = [bound(guide)], copied(guide)
    options = {**vars(chosen.training), "freeze_model": True, "progress": run.progress}
    for number in range(1, chosen.max_rounds + 1):
        file = None if folder is None else folder / f"retraining-{name.replace(' ', '-')}-{number}.pt"
        seed = run.derived("retraining", name, number).seed
        try:
            train(model, guide, split.train_data, **options, checkpoint=file, seed=seed)
        except FloatingPointError as error:
            raise InputError(
                f"split: training from the {name} start diverged ({reason_of(error)}). Lower "
                "retraining.training.learning_rate"
            ) from error
        bounds.append(bound(guide))
        if bounds[-1] == max(bounds):
            best = copied(guide)
        if bounds[-1] - bounds[-2] <= chosen.tolerance:
            return Start(candidate, bounds, True, best)
    return Start(candidate, bounds, False, best)
