"""Training in several processes of `torch.distributed`: each takes a share of every minibatch, all the same step."""

from typing import Any

import pyro
import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.processes import as_lost_rank_error, rank, world_size
from pyrogaps.training.objective import Objective
from pyrogaps.training.parameters import JointOptimizer
from pyrogaps.training.settings import Training
from pyrogaps.training.steps import EagerSteps
from pyrogaps.training.weights import all_modules


class SharedSteps(EagerSteps):
    r"""Joint steps of all processes, through Pyro and `DistributedDataParallel`.

    If process r of K has n_r of a minibatch's n rows, its loss is weighted by K n_r / n, so that the mean over
    processes is the mean over rows. A process without rows runs on another's row with weight 0. Losses are summed
    before any gradient is computed, so a loss that is not finite ends the run in all processes.

    Raises `FloatingPointError` as a single process does, and `InputError` if a parameter first appears during a step.
    """

    def __init__(self, objective: Objective, optimizer: JointOptimizer) -> None:
        super().__init__(objective, objective.differentiable_loss)
        self._bound, self._optimizer = objective, optimizer
        self._weight, self._num_parameters = 1.0, len(pyro.get_param_store())
        # Some minibatches may not use all parameters.
        self._module = DistributedDataParallel(_Loss(objective, optimizer.named), find_unused_parameters=True)

    def share(self, indices: Tensor) -> Tensor:
        own = share_of(indices)
        self._weight = len(own) * world_size() / len(indices)
        return own if len(own) else indices[:1]

    def __call__(self, args: tuple[Any, ...], rows: int) -> float:
        self._bound.begin(rows)
        with as_lost_rank_error():
            loss = self._module(*args)
        elbo = self._bound.elbo_of(loss)
        appeared = len(pyro.get_param_store()) - self._num_parameters
        own = torch.stack([loss.detach(), elbo]).double() * self._weight
        value, plain, appeared = (all_sum(torch.cat([own, own.new_tensor([appeared])])) / world_size()).tolist()
        if appeared > 0:
            raise InputError(
                "training: a parameter was first registered after training had started, which several processes do not "
                "support. Register it in every call of the model and the guide, or train in one process."
            )
        self._bound.accept(value, plain)
        with as_lost_rank_error():
            (self._weight * loss).backward()
        self._optimizer(())
        return float(value)


class _Loss(nn.Module):
    """The loss as a module that owns all parameters, including those in Pyro's store."""

    def __init__(self, objective: Objective, named: dict[str, Tensor]) -> None:
        super().__init__()
        self._objective = objective
        # register_parameter would refuse Pyro's plain tensors and names with dots.
        self._parameters.update(named)  # type: ignore[arg-type]
        # Without an unused parameter torch warns in every process that find_unused_parameters was not needed.
        example = next(iter(named.values()))
        self._parameters["(never reached)"] = nn.Parameter(torch.zeros((), dtype=example.dtype, device=example.device))

    def forward(self, *args: Any) -> Tensor:
        return self._objective.differentiable_loss(self._objective.model, self._objective.guide, *args)


def share_of(indices: Tensor) -> Tensor:
    """This process's share of a minibatch; sizes differ by at most one."""
    return indices.tensor_split(world_size())[rank()]


def sum_of(value: float, device: torch.device) -> float:
    """The sum of a number over all processes."""
    return value if world_size() == 1 else float(all_sum(torch.tensor(value, dtype=torch.double, device=device)))


def all_sum(values: Tensor) -> Tensor:
    """The sum over all processes, computed in place; the same in each of them."""
    with as_lost_rank_error():
        distributed.all_reduce(values)
    return values


def share_weights(model: Program, guide: Program) -> None:
    """Copy the first process's weights and buffers to all others."""
    if world_size() == 1:
        return
    states = [module.state_dict() for module in all_modules(model, guide)]
    values = [*(value for state in states for value in state.values()), *pyro.get_param_store()._params.values()]
    with torch.no_grad():
        for value in {id(value): value for value in values if isinstance(value, Tensor)}.values():
            sent = value.detach().contiguous()
            with as_lost_rank_error():
                distributed.broadcast(sent, src=0)
            value.copy_(sent)


def check_divisible(settings: Training, num_datapoints: int, *, indexed: bool) -> None:
    """Raise `InputError` for settings and data that several processes cannot share."""
    if world_size() == 1:
        return
    if indexed:
        name = type(settings.objective).__name__
        raise InputError(
            f"training: objective {name} makes its own minibatches, which several processes cannot share. Use one "
            "process."
        )
    if settings.guide_steps:
        raise InputError("training: guide_steps does not support several processes. Set it to 0, or use one process.")
    if num_datapoints == 1:
        raise InputError("training: one datapoint cannot be divided among several processes. Use one process.")
