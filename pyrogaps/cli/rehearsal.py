"""Raise before the training what would be raised after it."""

from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import nn

from pyrogaps.cli.building import DataSet, build_encoder, build_programs, part_named
from pyrogaps.cli.recipe import Recipe
from pyrogaps.conditioning import Lookahead, SimulatedData, declared, rehearse_reference
from pyrogaps.density.autoguides import OtherDataError
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.runs import Program
from pyrogaps.density.shared import SharedLatents
from pyrogaps.errors import InputError
from pyrogaps.gaps.decompose import rehearse
from pyrogaps.guard import failures_named
from pyrogaps.mapa import rehearse_mapa
from pyrogaps.problem import Problem
from pyrogaps.streams import seeded
from pyrogaps.training import load_model_weights, load_weights, rehearse_training


def rehearse_run(recipe: Recipe, model: Program, guide: Program, data: DataSet, settings: dict[str, Any]) -> None:
    """Check trainings and every part of the data, and measure a little of what `settings` of `decompose` ask for."""
    _check_training(recipe, model, data)
    if recipe.checkpoint is not None:
        load_weights(recipe.checkpoint, model, guide, data.example)
    elif recipe.model_checkpoint is not None:
        load_model_weights(recipe.model_checkpoint, model, guide, data.example)
    for name, part in (("train", data.train), ("validation", data.validation), (recipe.evaluate.part, data.evaluated)):
        if part is not None:
            with part_named(name), suppress(SharedLatents):  # which are seen to with the guide
                Problem.of(model, None, part, recipe.plate)
    if recipe.checkpoint is not None or not isinstance(guide, AutoGuide):
        _rehearse(recipe, model, guide, data, settings)
    if recipe.checkpoint is None:
        _rehearse_training(recipe, data, settings)


def _rehearse_training(recipe: Recipe, data: DataSet, settings: dict[str, Any]) -> None:
    """Compute the first loss, by a pair of its own: an autoguide is made for the data of its first call."""
    store = pyro.get_param_store()
    state = store.get_state()
    try:
        with seeded(recipe.seed, "rehearsal"), torch.no_grad():
            model, guide = build_programs(recipe)
            if isinstance(guide, AutoGuide):
                indexed = as_indexed(data.example, model)
                with failures_named("guide"):
                    guide(*indexed.fetch(torch.arange(len(indexed))))
        if isinstance(guide, AutoGuide):
            _rehearse(recipe, model, guide, data, settings)
        if recipe.training is not None and data.train is not None:
            rehearse_training(model, guide, data.train, data.validation, recipe.training, recipe.seed)
        if recipe.mapa is not None and data.train is not None:
            encoder = build_encoder(recipe)
            bound = partial(recipe.mapa.bound, plate=recipe.plate, encoded=encoder is not None)
            rehearse_mapa(model, encoder, guide, data.train, recipe.mapa, bound, recipe.seed)
        if recipe.reference is not None and isinstance(declared(guide), Lookahead) and isinstance(guide, nn.Module):
            drawn = SimulatedData(model, data.example, plate=recipe.plate)
            rehearse_reference(model, guide, drawn, recipe.reference, recipe.seed)
    finally:
        store.set_state(state)


def _rehearse(recipe: Recipe, model: Program, guide: Program, data: DataSet, settings: dict[str, Any]) -> None:
    try:
        rehearse(model, guide, data.evaluated, recipe.plate, **settings)
    except OtherDataError as error:
        raise InputError(f"{error.reason}. Set evaluate: {{part: train, num_datapoints: null}}") from error


def _check_training(recipe: Recipe, model: Program, data: DataSet) -> None:
    """What is known of the settings of trainings before the first of them."""
    sections = {"training": recipe.training, "reference": recipe.reference}
    if recipe.mapa is not None:
        if data.train is not None and recipe.checkpoint is None:
            recipe.mapa.check(data.train, encoded=recipe.encoder is not None, model=model)
        sections["mapa.training"] = recipe.mapa.training
    if recipe.retraining is not None:
        sections["retraining.training"] = recipe.retraining.training
    for name, section in sections.items():
        if section is not None:
            with failures_named(f"{name}.schedule: its first epoch", own_too=True):
                section.rate(0)
    validated = data.validation is not None or recipe.checkpoint is not None
    if recipe.training is not None and recipe.training.patience is not None and not validated:
        raise InputError(
            f"training.patience: {recipe.data.class_path} has no part 'validation'. Set training.patience to null, or "
            "use a data set that has it"
        )
