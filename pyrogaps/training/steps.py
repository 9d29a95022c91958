"""The steps of a training run, through Pyro or by replaying a recorded step."""

import hashlib
import time
from collections.abc import Callable
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pyrogaps.guard import warn
from pyrogaps.training.objective import IndexedObjective, Objective
from pyrogaps.training.parameters import JointOptimizer, clear_gradients
from pyrogaps.training.programs import Snapshot, Watched
from pyrogaps.training.record import Arguments, Outcome, Record, agree

# Steps of a kind through Pyro before one is recorded: recording costs as much as a few dozen steps.
WARM_UP = 50
# Longest period between comparisons of a record with Pyro, in uses; new records are compared more often.
COMPARISON_PERIOD = 256
# The use at which the faster of record and Pyro is chosen: both have then been timed four times.
DECISION_USE = 16
# Largest number of kinds of steps. With more, the arguments vary too much for records to save time.
MAX_KINDS = 64


class EagerSteps:
    """Every step through Pyro."""

    def __init__(self, objective: Objective | IndexedObjective, eager: Callable[..., Any]) -> None:
        self._objective, self._eager = objective, eager

    def begin_epoch(self) -> None:
        """Do nothing: there are no records to update."""

    @property
    def mode(self) -> Literal["eager", "captured"]:
        """How most steps are taken now: through Pyro, or by replaying a record."""
        return "eager"

    def share(self, indices: Tensor) -> Tensor:
        """The part of a minibatch that this process takes in the next step."""
        return indices

    def __call__(self, args: tuple[Any, ...], rows: int) -> float:
        """Take a step on a minibatch of `rows` datapoints; returns the loss in nats per datapoint.

        Raises `FloatingPointError`, before anything is changed, if the loss or the gradient is not finite.
        """
        self._objective.begin(rows)
        return float(self._eager(*args))

    def get_state(self) -> dict[str, Any]:
        """The state that a resumed run needs to continue identically."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `get_state`."""


class RecordedSteps(EagerSteps):
    """Steps of each kind (shapes, settings, annealing) run through Pyro first, then replay a record.

    A comparison runs Pyro and the record from the same random state and compares losses, gradients, buffers and the
    random state afterwards. If a step cannot be recorded, or its record disagrees, all later steps go through Pyro,
    with a warning only if the record had been used without comparison. If they agree, the record's result is used even
    then, so that a resumed run continues bit for bit wherever its comparisons fall. Comparisons also time both: a kind
    whose record is no faster goes through Pyro from then on. This choice is part of the state, for the same reason.
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
        self._drop_stale_records()
        if self._given_up or self._has_hooks():
            return super().__call__(args, rows)
        arguments = Arguments(args)
        kind = f"{arguments.key} {self._bound.kind}"
        if kind not in self._uses and len(self._uses) == MAX_KINDS:
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

    def _drop_stale_records(self) -> None:
        """Drop all records if the programs' settings changed or parameters were added."""
        version = f"{self._settings} {len(self._optimizer.named)} {len(pyro.get_param_store())}"
        if version != self._version:
            for table in (self._records, self._uses, self._faster):
                table.clear()
            self._version = version

    def _has_hooks(self) -> bool:
        values = self._optimizer.named.values()
        return any(value._backward_hooks or value._post_accumulate_grad_hooks for value in values)

    def _watched_step(self, args: tuple[Any, ...], rows: int) -> float:
        """A step through Pyro; gives up recording if it changes state that a record would not change."""
        before = self._watched.state()
        loss = super().__call__(args, rows)
        self._given_up = self._watched.state() != before
        return loss

    def _outcome(self, kind: str, arguments: Arguments, args: tuple[Any, ...], rows: int) -> Outcome | None:
        """The outcome of a kind's record; None, with nothing changed, if no record is possible."""
        record = self._records.get(kind)
        self._bound.begin(rows)
        if record is not None and not record.is_due(COMPARISON_PERIOD):
            return record(self._bound, arguments)
        start = Snapshot(self._watched.buffers(), self._device)
        try:
            if record is None:
                record = self._records[kind] = Record(self._bound, list(self._optimizer.named.values()), arguments)
                start.restore()
            outcome = self._compared(record, arguments, args, rows, start)
            self._decide(kind, record)
        except FloatingPointError:
            raise
        except Exception:  # tracing a program can raise anything
            outcome = None
        if outcome is None:
            self._give_up(record)
            start.restore()
        return outcome

    def _compared(
        self, record: Record, arguments: Arguments, args: tuple[Any, ...], rows: int, start: Snapshot
    ) -> Outcome | None:
        """The outcome of a record; None if Pyro's outcome differs."""
        # Thread time, because wall time is unreliable on a busy machine.
        began = time.thread_time()
        expected = self._through_pyro(args, rows)
        by_pyro = time.thread_time() - began
        end = Snapshot(self._watched.buffers(), self._device)
        start.restore()
        self._bound.begin(rows)
        began = time.thread_time()
        outcome = record(self._bound, arguments)
        record.time(by_pyro, time.thread_time() - began)
        same = Snapshot(self._watched.buffers(), self._device).is_like(end) and agree(outcome, expected)
        return outcome if same else None

    def _decide(self, kind: str, record: Record) -> None:
        """Decide, once per kind, whether its steps are replayed from now on."""
        if kind not in self._faster and record.num_uses >= DECISION_USE:
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
            warn(
                "training: the model or the guide depends on state that changed during training. Some steps may have "
                "used its old value; set mode='eager'."
            )

    def _apply(self, outcome: Outcome) -> float:
        loss = self._bound.accept(outcome.loss, outcome.elbo)
        for value, gradient in zip(self._optimizer.named.values(), outcome.gradients, strict=True):
            value.grad = gradient
        self._optimizer(())
        return loss
