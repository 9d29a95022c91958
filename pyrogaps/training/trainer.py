"""`Trainer`: one training run, from the first epoch to the best weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from pyrogaps.density.arguments import check_same_order
from pyrogaps.density.data import Data, IndexedData
from pyrogaps.density.forms import as_given, as_indexed
from pyrogaps.density.runs import Program, modules_of
from pyrogaps.errors import InputError, counted
from pyrogaps.family import augmented
from pyrogaps.memory import free_cycles
from pyrogaps.processes import rank, world_size
from pyrogaps.progress import ProgressBar
from pyrogaps.settings import File
from pyrogaps.streams import reseed, seeded
from pyrogaps.training.checkpoints import Checkpoint, State, fingerprint
from pyrogaps.training.lagging import MUTUAL_INFORMATION, GuideAhead
from pyrogaps.training.objective import IndexedBound, IndexedObjective, Objective
from pyrogaps.training.parallel import SharedSteps, check_divisible, share_weights, sum_of
from pyrogaps.training.parameters import JointOptimizer, clear_gradients, guide_parameters, trainable_parameters
from pyrogaps.training.placing import on_device, place
from pyrogaps.training.programs import Watched
from pyrogaps.training.settings import Training, TrainingResult
from pyrogaps.training.setup import check_minibatches, check_sites, refuse_global_latents
from pyrogaps.training.steps import EagerSteps, RecordedSteps
from pyrogaps.training.weights import all_modules, copy_weights, put_weights

Callback = Callable[[int, dict[str, list[float]]], Any]


class Trainer:
    """One training run. A step uses one minibatch, an epoch all data; each epoch has its own random stream."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Data | None,
        validation: Data | None,
        settings: Training,
        seed: int,
        device: torch.device | str | None,
    ) -> None:
        self.model, self.guide, self.settings = model, guide, settings
        self.seed = seed
        self.device = place(all_modules(model, guide), device)
        given = as_given(data, model)
        check_same_order(guide, given.names)
        self.data = on_device(as_indexed(given), device)
        self.validation = None if validation is None else on_device(as_indexed(validation, model), device)
        self.batch_size = min(settings.batch_size, len(self.data))
        # A guide with auxiliary variables needs a model that includes a reverse model for them.
        self.augmented = augmented(model, guide)
        self.indexed = settings.objective if isinstance(settings.objective, IndexedBound) else None
        self.objective = self._objective()
        check_divisible(settings, len(self.data), indexed=self.indexed is not None)
        with self._evaluating("set up"), given.misread_named():
            self.optimizer = self._set_up()
            self.ahead = self._guide_ahead() if settings.guide_steps else None
            self.fingerprint = fingerprint(settings, seed=seed, data=self.data, validation=self.validation)
        loss = self.objective.loss_and_grads
        svi = SVI(self.objective.model, self.objective.guide, self.optimizer, loss=loss, loss_and_grads=loss)
        self.steps = self._steps(svi.step)

    def _objective(self) -> Objective | IndexedObjective:
        bound, chosen = self.indexed, self.settings
        if bound is None:
            return Objective(self.augmented, self.guide, chosen.num_particles, chosen.objective)
        name = type(bound).__name__
        if len(self.data) != bound.num_datapoints:
            raise InputError(
                f"training: objective {name} was built with {counted(bound.num_datapoints, 'datapoint')}, but data has "
                f"{len(self.data)}. Pass the same data to both."
            )
        if bound.device.type != self.device.type:
            raise InputError(
                f"training: the data of objective {name} are on {bound.device.type}, the modules on {self.device}. "
                f"Build the objective with data on {self.device}."
            )
        if self.validation is not None:
            raise InputError(
                f"training: objective {name} does not support validation data. Leave out validation and patience."
            )
        return IndexedObjective(self.augmented, self.guide, bound)

    def _steps(self, eager: Callable[..., Any]) -> EagerSteps:
        objective = self.objective
        if world_size() > 1 and isinstance(objective, Objective):
            share_weights(self.model, self.guide)
            return SharedSteps(objective, self.optimizer)
        if self.settings.mode == "eager" or isinstance(objective, IndexedObjective) or not objective.is_recordable:
            return EagerSteps(objective, eager)
        watched = Watched([self.model, self.guide], all_modules(self.model, self.guide))
        return RecordedSteps(objective, eager, self.optimizer, watched, self.device)

    def _args(self, data: IndexedData, indices: Tensor) -> tuple[Any, ...]:
        """The arguments of a step: indices for an indexed objective, else the data."""
        return (indices,) if self.indexed is not None else tuple(data.fetch(indices))

    def _set_up(self) -> JointOptimizer:
        """Check and run the pair once, with the caller's validation setting; creates the optimizer."""
        size, shared = len(self.data), world_size() > 1
        # In several processes the pair runs on a share of a minibatch.
        rows = min(-(-self.batch_size // world_size()), size - 1)
        if rows and (self.batch_size < size or self.validation is not None or shared):
            check_minibatches(self.augmented, self.guide, self.data, rows)
        first = torch.arange(rows if shared else self.batch_size)
        if isinstance(self.objective, Objective):
            check_sites(self.augmented, self.guide, self.data.fetch(first))
        self._evaluate(self.data, first)
        if shared and isinstance(self.objective, Objective) and not self.objective.is_scaled_up:
            refuse_global_latents(self.augmented, self.data, rows)
        args = self.data.fetch(first)
        chosen = self.settings
        named = trainable_parameters(self.model, self.guide, args, freeze_model=chosen.freeze_model)
        options = {"lr": chosen.learning_rate, **chosen.optimizer_options}
        return JointOptimizer(chosen.optimizer, options, named, clip_norm=chosen.clip_norm, fixed=chosen.freeze_model)

    def _guide_ahead(self) -> GuideAhead:
        args, named = self.data.fetch(torch.arange(self.batch_size)), self.optimizer.named
        names = set(guide_parameters(named, self.model, self.guide, args, "guide_steps train the guide alone"))
        measured = self.data if self.validation is None else self.validation
        return GuideAhead(self.augmented, self.guide, measured, names, self.settings.guide_steps)

    def rehearse(self) -> None:
        """Compute the first loss with its graph, as a step does, and take no step."""
        objective, first = self.objective, torch.arange(self.batch_size)
        with self._evaluating("rehearsal"):
            objective.begin(len(first))
            args = self._args(self.data, first)
            if isinstance(objective, Objective):
                loss = float(objective.differentiable_loss(objective.model, objective.guide, *args).detach())
            else:
                loss = -objective.evaluate(*args)
        if not math.isfinite(loss):
            raise InputError(
                f"training: the first loss is {loss}. Check the data for NaN and outliers, and the initial weights: "
                "every datapoint needs a finite density at the guide's draws"
            )

    def run(self, path: File | None, callback: Callback | None, progress: bool) -> TrainingResult:
        checkpoint = Checkpoint(path, self.model, self.guide, self.fingerprint)
        state = checkpoint.resume(State(copy_weights(self.model, self.guide)), self.optimizer, self.steps)
        if state.epoch > self.settings.num_epochs:
            raise InputError(
                f"checkpoint {path}: was saved after {counted(state.epoch, 'epoch')}, more than "
                f"num_epochs={self.settings.num_epochs}. Raise num_epochs or use another file."
            )
        self._clear_gradients()
        try:
            self._epochs(state, checkpoint, callback, progress)
        finally:
            self._clear_gradients()
        if self.validation is not None:
            put_weights(state.best, self.model, self.guide)
        exhausted = self._is_exhausted(state)
        return TrainingResult(state.history, state.best_epoch, state.epoch, exhausted, self.steps.mode)

    def _clear_gradients(self) -> None:
        # A frozen model's parameters accumulate gradients too, although no optimizer steps them.
        clear_gradients(value for module in all_modules(self.model, self.guide) for value in module.parameters())
        clear_gradients(self.optimizer.named.values())

    def _epochs(self, state: State, checkpoint: Checkpoint, callback: Callback | None, progress: bool) -> None:
        steps, total = -(-len(self.data) // self.batch_size), self.settings.num_epochs
        started = state.epoch
        shown = progress and rank() == 0
        with ProgressBar(total=total * steps, initial=started * steps, unit="step", disable=not shown) as bar:
            while state.epoch < total and not self._is_exhausted(state):
                bar.set_description(f"epoch {state.epoch + 1}/{total}", refresh=False)
                try:
                    self._epoch(state, bar)
                except FloatingPointError as error:
                    put_weights(state.best, self.model, self.guide)
                    raise FloatingPointError(self._diverged(error, state)) from None
                if callback is not None:  # before the checkpoint, so that a resumed run leaves no epoch out
                    callback(state.epoch, {name: [*values] for name, values in state.history.items()})
                    self._clear_gradients()
                checkpoint.save(state, self.optimizer, self.steps)
        if state.epoch > started:
            checkpoint.save(state, self.optimizer, self.steps, now=True)

    def _epoch(self, state: State, bar: Any) -> None:
        epoch, chosen = state.epoch, self.settings
        self.optimizer.set_rate(chosen.rate(epoch))
        self.objective.anneal(chosen.beta(epoch), chosen.entropy_weight(epoch))
        elbo = 0.0
        self.optimizer.move_only(None)
        ahead = self.ahead if self.ahead is not None and self.ahead.is_active(state.history) else None
        with self._training(epoch):
            self.steps.begin_epoch()
            batches = self._minibatches()
            if world_size() > 1:
                reseed(self.seed, "training", "epoch", epoch, "rank", rank())
            for step, indices in enumerate(batches):
                if ahead is not None:
                    ahead.run(partial(self._step, step=step), self.optimizer, indices, batches)
                self._step(indices, step)
                elbo += self.objective.elbo * len(indices) / len(self.data)
                bar.set_postfix_str(f"ELBO {self.objective.elbo:.3f}", refresh=False)
                bar.update()
        if ahead is not None:
            with self._evaluating("mutual information"), pyro.validation_enabled(False):
                state.history.setdefault(MUTUAL_INFORMATION, []).append(ahead.mutual_information())
        self._finish_epoch(state, elbo)

    def _step(self, indices: Tensor, step: int) -> float:
        free_cycles()
        try:
            own = self.steps.share(indices)
            return self.steps(self._args(self.data, own), len(own))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} at step {step + 1}") from None

    def _finish_epoch(self, state: State, elbo: float) -> None:
        # Buffers differ between processes, and different processors round weights differently.
        share_weights(self.model, self.guide)
        entries = {"train_elbo": elbo, "learning_rate": self.settings.rate(state.epoch)}
        score = -math.inf
        if self.validation is not None:
            entries["validation_elbo"] = score = self._validate(self.validation)
        for name, value in entries.items():
            state.history.setdefault(name, []).append(value)
        # Scores are comparable only once the ELBO itself is trained; before that the newest weights are kept.
        comparable = self.validation is not None and self.settings.annealed(state.epoch)
        better = not comparable or score > state.best_score
        state.finish_epoch(copy_weights(self.model, self.guide) if better else None, score if comparable else -math.inf)

    def _is_exhausted(self, state: State) -> bool:
        patience = self.settings.patience
        return patience is not None and state.epoch - state.best_epoch >= patience

    def _minibatches(self) -> list[Tensor]:
        if self.indexed is not None:
            return self.indexed.minibatches(self.batch_size)
        if self.batch_size == len(self.data):
            # Not shuffled: a guide may have parameters for each datapoint.
            return [torch.arange(self.batch_size)]
        return list(torch.randperm(len(self.data), device="cpu").split(self.batch_size))

    def _validate(self, data: IndexedData) -> float:
        """The ELBO on `data`, nats per datapoint, with the same noise in every epoch."""
        with self._evaluating("validation"), pyro.validation_enabled(False):
            parts = torch.arange(len(data)).split(self.settings.batch_size)
            if world_size() > 1:
                reseed(self.seed, "training", "validation", "rank", rank())
            own = sum(self._evaluate(data, indices) * len(indices) for indices in parts[rank() :: world_size()])
            elbo = sum_of(own, self.device) / len(data)
        if not math.isfinite(elbo):
            raise FloatingPointError(f"the ELBO of the validation data is {elbo}")
        return elbo

    def _evaluate(self, data: IndexedData, indices: Tensor) -> float:
        self.objective.begin(len(indices))
        return self.objective.evaluate(*self._args(data, indices))

    @contextmanager
    def _evaluating(self, purpose: str) -> Iterator[None]:
        for module in all_modules(self.model, self.guide):
            module.eval()
        with seeded(self.seed, "training", purpose, device=self.device):
            yield

    @contextmanager
    def _training(self, epoch: int) -> Iterator[None]:
        # A frozen model also keeps its buffers, such as batch statistics.
        frozen = {id(module) for module in modules_of(self.model)} if self.settings.freeze_model else set()
        for top in all_modules(self.model, self.guide):
            for module in top.modules():
                # cuDNN computes gradients of recurrent layers in training mode only.
                module.training = id(top) not in frozen or isinstance(module, nn.RNNBase)
        # Without Pyro's checks, values that are not finite reach the loss, which raises one error for all causes.
        with seeded(self.seed, "training", "epoch", epoch, device=self.device), pyro.validation_enabled(False):
            yield

    def _diverged(self, error: FloatingPointError, state: State) -> str:
        restored = f"those of epoch {state.best_epoch}" if state.best_epoch else "the initial ones"
        return (
            f"training: epoch {state.epoch + 1}: {error}. Lower learning_rate, set clip_norm, or check the data for "
            f"NaN and outliers. The best weights so far ({restored}) have been restored."
        )
