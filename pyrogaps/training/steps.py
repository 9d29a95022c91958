"""Taking the steps of a training run, through Pyro or by replaying the record of one."""

import hashlib
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pyrogaps.training.objective import IndexedObjective, Objective
from pyrogaps.training.parameters import JointOptimizer, clear_gradients
from pyrogaps.training.programs import Snapshot, Watched
from pyrogaps.training.record import Arguments, Outcome, Record, agree

# Steps of a kind that go through Pyro before one is recorded: recording takes as long as some dozens of them.
WARM_UP = 50
# A record is compared with Pyro at its first two uses, then ever more rarely, and at last once in so many.
RARELY = 256
# At this use it is decided whether a record is faster than Pyro: both have then been timed four times.
DECIDING = 16
# So many kinds of steps are told apart. Where there are more, the arguments vary too much for records to pay.
MOST_KINDS = 64


class EagerSteps:
    """Every step through Pyro."""

    def __init__(self, objective: Objective | IndexedObjective, eager: Callable[..., Any]) -> None:
        self._objective, self._eager = objective, eager

    def begin_epoch(self) -> None:
        """Nothing: there is no record that could have become stale."""

    @property
    def mode(self) -> Literal["eager", "captured"]:
        """How most steps are taken now: through Pyro, or by replaying a record."""
        return "eager"

    def share(self, indices: Tensor) -> Tensor:
        """What of a minibatch the next step takes in this process."""
        return indices

    def __call__(self, args: tuple[Any, ...], rows: int) -> float:
        """Take a step on a minibatch of `rows` datapoints; returns the loss, nats per datapoint.

        Raises `FloatingPointError`, before anything is changed, where loss or gradient are not finite.
        """
        self._objective.begin(rows)
        return float(self._eager(*args))

    def get_state(self) -> dict[str, Any]:
        """What another process needs to go on just as this one would."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_state` returned."""


class RecordedSteps(EagerSteps):
    """Steps of one kind (shapes, settings, annealing) go through Pyro at first, and are then replayed from a record.

    A record is compared with Pyro from the same random state: loss, gradients, buffers, and the random state after it.
    Where a step cannot be recorded, or its record disagrees, all later steps go through Pyro. That is silent, unless
    the record has been used in between. Where it agrees its own results are used all the same, so that a run that was
    broken off goes on bit for bit, whenever it is compared. Comparisons time both as well: a kind whose record is no
    faster than Pyro goes through Pyro from then on. That verdict is part of the state, for the same reason.
    """

    def __init__(
        self,
        objective: Objective,
        eager: Callable[..., Any],
        optimizer: JointOptimizer,
        watched: Watched,
        device: torch.device,
    ) -> None:
        super().__init__(objective, eager)
        self._bound, self._optimizer, self._watched, self._device = objective, optimizer, watched, device
        self._records: dict[str, Record] = {}
        self._uses: dict[str, int] = {}
        self._faster: dict[str, bool] = {}
        self._settings = self._version = ""
        self._given_up = False

    def begin_epoch(self) -> None:
        self._settings = hashlib.blake2b(self._watched.settings().encode(), digest_size=8).hexdigest()
        self._given_up |= self._watched.is_opaque() or torch.is_autocast_enabled(self._device.type)

    def __call__(self, args: tuple[Any, ...], rows: int) -> float:
        self._forget_what_is_stale()
        if self._given_up or self._has_hooks():
            return super().__call__(args, rows)
        arguments = Arguments(args)
        kind = f"{arguments.key} {self._bound.kind}"
        if kind not in self._uses and len(self._uses) == MOST_KINDS:
            return super().__call__(args, rows)
        self._uses[kind] = use = self._uses.get(kind, 0) + 1
        if use < WARM_UP or not self._faster.get(kind, True):
            return super().__call__(args, rows)
        if use == WARM_UP:
            return self._watched_step(args, rows)
        outcome = self._outcome(kind, arguments, args, rows)
        return super().__call__(args, rows) if outcome is None else self._apply(outcome)

    @property
    def mode(self) -> Literal["eager", "captured"]:
        if self._given_up or not self._uses:
            return "eager"
        most = max(self._uses, key=lambda kind: self._uses[kind])
        replayed = self._uses[most] > WARM_UP and self._faster.get(most, True)
        return "captured" if replayed else "eager"

    def get_state(self) -> dict[str, Any]:
        state = {"uses": dict(self._uses), "faster": dict(self._faster)}
        return {**state, "version": self._version, "given_up": self._given_up}

    def set_state(self, state: dict[str, Any]) -> None:
        self._uses, self._version = dict(state.get("uses", {})), state.get("version", "")
        self._faster = dict(state.get("faster", {}))
        self._given_up = state.get("given_up", False)

    def _forget_what_is_stale(self) -> None:
        """Drop records from before the programs' settings changed, or parameters joined."""
        version = f"{self._settings} {len(self._optimizer.named)} {len(pyro.get_param_store())}"
        if version != self._version:
            for kept in (self._records, self._uses, self._faster):
                kept.clear()
            self._version = version

    def _has_hooks(self) -> bool:
        values = self._optimizer.named.values()
        return any(value._backward_hooks or value._post_accumulate_grad_hooks for value in values)

    def _watched_step(self, args: tuple[Any, ...], rows: int) -> float:
        """A step through Pyro after which it is known whether steps change what no record would."""
        before = self._watched.state()
        loss = super().__call__(args, rows)
        self._given_up = self._watched.state() != before
        return loss

    def _outcome(self, kind: str, arguments: Arguments, args: tuple[Any, ...], rows: int) -> Outcome | None:
        """What the record of a kind gives; None, with everything as before, where there can be none."""
        record = self._records.get(kind)
        self._bound.begin(rows)
        if record is not None and not record.is_due(RARELY):
            return record(self._bound, arguments)
        start = Snapshot(self._watched.buffers(), self._device)
        try:
            if record is None:
                record = self._records[kind] = Record(self._bound, list(self._optimizer.named.values()), arguments)
                start.restore()
            found = self._compared(record, arguments, args, rows, start)
            self._decide(kind, record)
        except FloatingPointError:
            raise
        except Exception:  # tracing, and programs that are traced, raise anything
            found = None
        if found is None:
            self._give_up(record)
            start.restore()
        return found

    def _compared(
        self, record: Record, arguments: Arguments, args: tuple[Any, ...], rows: int, start: Snapshot
    ) -> Outcome | None:
        """What a record gives; None where Pyro gives something else."""
        # The thread's own time: on a busy machine time on the wall says little.
        began = time.thread_time()
        expected = self._through_pyro(args, rows)
        by_pyro = time.thread_time() - began
        end = Snapshot(self._watched.buffers(), self._device)
        start.restore()
        self._bound.begin(rows)
        began = time.thread_time()
        found = record(self._bound, arguments)
        record.time(by_pyro, time.thread_time() - began)
        same = Snapshot(self._watched.buffers(), self._device).is_like(end) and agree(found, expected)
        return found if same else None

    def _decide(self, kind: str, record: Record) -> None:
        """Once, whether steps of a kind are replayed from now on."""
        if kind not in self._faster and record.num_uses >= DECIDING:
            self._faster[kind] = record.is_faster
            if not record.is_faster:
                del self._records[kind]

    def _through_pyro(self, args: tuple[Any, ...], rows: int) -> Outcome:
        values = self._optimizer.named.values()
        self._bound.begin(rows)
        try:
            loss = self._bound.loss_and_grads(self._bound.model, self._bound.guide, *args)
            return Outcome(loss, self._bound.elbo, [value.grad for value in values])
        finally:
            clear_gradients(values)

    def _give_up(self, record: Record | None) -> None:
        self._given_up = True
        self._records.clear()
        if record is not None and record.num_uses > 2:
            warnings.warn(
                "training: the model or the guide has changed in what neither arguments nor parameters hold, and some "
                "steps may have been taken as if it had not; set mode='eager'",
                stacklevel=2,
            )

    def _apply(self, outcome: Outcome) -> float:
        loss = self._bound.accept(outcome.loss, outcome.elbo)
        for value, gradient in zip(self._optimizer.named.values(), outcome.gradients, strict=True):
            value.grad = gradient
        self._optimizer(())
        return loss
