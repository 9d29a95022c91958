"""Training in several processes of `torch.distributed`: each takes its share of every minibatch, all the same step."""

from typing import Any

import pyro
import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.ranks import losses_named, rank, world_size
from pyrogaps.training.objective import Objective
from pyrogaps.training.parameters import JointOptimizer
from pyrogaps.training.settings import Training
from pyrogaps.training.steps import EagerSteps
from pyrogaps.training.weights import all_modules


class SharedSteps(EagerSteps):
    r"""Steps of all processes together, through Pyro, on `DistributedDataParallel`.

    With n_r of a minibatch's n rows in process r of K, that one's loss is weighted by K n_r / n, so that the mean over
    processes is the mean over rows. Where there are fewer rows than processes, one without any runs on a row of another
    with weight 0. Losses are added up before any gradient is taken: one that is not finite ends the run everywhere.

    Raises `FloatingPointError` as a single process does, and `InputError` where a parameter first appears in a step.
    """

    def __init__(self, objective: Objective, optimizer: JointOptimizer) -> None:
        super().__init__(objective, objective.differentiable_loss)
        self._bound, self._optimizer = objective, optimizer
        self._weight, self._num_parameters = 1.0, len(pyro.get_param_store())
        # Which parameters take part may change from step to step: some are reached by some minibatches only.
        self._module = DistributedDataParallel(_Loss(objective, optimizer.named), find_unused_parameters=True)

    def share(self, indices: Tensor) -> Tensor:
        own = share_of(indices)
        self._weight = len(own) * world_size() / len(indices)
        return own if len(own) else indices[:1]

    def __call__(self, args: tuple[Any, ...], rows: int) -> float:
        self._bound.begin(rows)
        with losses_named():
            loss = self._module(*args)
        elbo = self._bound.elbo_of(loss)
        appeared = len(pyro.get_param_store()) - self._num_parameters
        own = torch.stack([loss.detach(), elbo]).double() * self._weight
        value, plain, appeared = (add_up(torch.cat([own, own.new_tensor([appeared])])) / world_size()).tolist()
        if appeared > 0:
            raise InputError(
                "training: in several processes all parameters must be there at the first run, but one has appeared in "
                "a later step; register it in every run, or train in one process"
            )
        self._bound.accept(value, plain)
        with losses_named():
            (self._weight * loss).backward()
        self._optimizer(())
        return float(value)


class _Loss(nn.Module):
    """A module to whose parameters, Pyro's among them, the loss is differentiated."""

    def __init__(self, objective: Objective, named: dict[str, Tensor]) -> None:
        super().__init__()
        self._objective = objective
        # By the dictionary: Pyro keeps plain tensors, and names have dots.
        self._parameters.update(named)  # type: ignore[arg-type]
        # Where every parameter is reached, torch warns on every process that it looked for one in vain.
        example = next(iter(named.values()))
        self._parameters["(never reached)"] = nn.Parameter(torch.zeros((), dtype=example.dtype, device=example.device))

    def forward(self, *args: Any) -> Tensor:
        return self._objective.differentiable_loss(self._objective.model, self._objective.guide, *args)


def share_of(indices: Tensor) -> Tensor:
    """This process's part of a minibatch; sizes differ by one at most."""
    return indices.tensor_split(world_size())[rank()]


def sum_of(value: float, device: torch.device) -> float:
    """The sum of a number over all processes."""
    return value if world_size() == 1 else float(add_up(torch.tensor(value, dtype=torch.double, device=device)))


def add_up(figures: Tensor) -> Tensor:
    """The sum over all processes, the same in each of them."""
    with losses_named():
        distributed.all_reduce(figures)
    return figures


def share_weights(model: Program, guide: Program) -> None:
    """Give all processes the first one's weights and buffers; nothing where there is one process."""
    if world_size() == 1:
        return
    states = [module.state_dict() for module in all_modules(model, guide)]
    found = [*(value for state in states for value in state.values()), *pyro.get_param_store()._params.values()]
    with torch.no_grad():
        for value in {id(value): value for value in found if isinstance(value, Tensor)}.values():
            sent = value.detach().contiguous()
            with losses_named():
                distributed.broadcast(sent, src=0)
            value.copy_(sent)


def check_divisible(settings: Training, num_datapoints: int, *, indexed: bool) -> None:
    """Refuse, in several processes, what cannot be divided among them. Raises `InputError`."""
    if world_size() == 1:
        return
    if indexed:
        name = type(settings.objective).__name__
        raise InputError(f"training: objective {name} makes its own minibatches, which processes cannot share; use one")
    if settings.guide_steps:
        raise InputError("training: guide_steps are taken in one process alone; leave them at 0, or use one process")
    if num_datapoints == 1:
        raise InputError("training: one datapoint cannot be divided among several processes; use one process")
