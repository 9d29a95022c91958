"""Recipes: model, guide, data and settings of a run, as a typed value and as YAML."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import yaml

from pyrogaps.cli.documents import Document, merged
from pyrogaps.cli.typed import Component, typed_arguments
from pyrogaps.conditioning import Conditioning
from pyrogaps.errors import InputError
from pyrogaps.evidence import Ladder
from pyrogaps.gaps import Certificate, Retraining
from pyrogaps.mapa import Mapa
from pyrogaps.memory import Bytes
from pyrogaps.refine import Refinement
from pyrogaps.settings import Count, DeviceName, Name, Plate, Sample, Seed, Several, is_plain
from pyrogaps.shared import Shared
from pyrogaps.training import Training


@dataclass(frozen=True)
class Evaluate:
    """Which datapoints are evaluated.

    Args:
        part: the attribute of the data set to evaluate, such as `test` or `train`.
        num_datapoints: how many of its datapoints, from the first; null: all.
    """

    part: Name = "test"
    num_datapoints: Count | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a ledger.

    Args:
        model: the Pyro model: a class to build or a plain function.
        guide: its guide: a class to build or a plain function; an autoguide is given the model.
        pair: instead of `model` and `guide`, one object with the attributes `.model` and `.guide`.
        data: the data set: an object with tensors `.train`, `.test` and, optionally, `.validation`.
        evaluate: which datapoints are evaluated.
        mapa: settings of MAPA, which trains the model before `training`; null: no MAPA.
        encoder: the encoder h that MAPA trains the model with; null: the guide; MAPA's bound is then one of log p(x).
        training: settings of `pyrogaps.train`; null: no training.
        families: further variational families to compare, by name; each is called with the model.
        evidence: the estimator of log p(x): fields of Ladder, or class_path (such as pyrogaps.AIS) and init_args.
        refinement: settings of the per-datapoint refinement.
        conditioning: settings of the shared posterior, for a guide that is not shown all of x.
        reference: training settings of the reference guide for the conditioning gap of a lookahead; null: none.
        retraining: settings of further training (phi-hat) that splits the amortization gap in three; null: no split.
        certificate: settings of the check of how wrong the bounds can be; null: no check.
        referee: how many datapoints are examined from other starts, for missed modes; false: none.
        shared: settings for latents outside the data plate, which all datapoints share.
        num_particles: number of draws for each bound.
        batch_size: datapoints processed at once; null: chosen to suit the model.
        max_memory: memory that a process may use, such as 4GiB; null: four fifths of the free memory.
        compile: whether to compile the model's density with torch.compile; worthwhile in long runs.
        plate: name of the data plate; null finds it, false treats the whole data set as one datapoint.
        seed: seed of all random numbers.
        device: the device to run on, such as cpu, cuda or cuda:1.
        checkpoint: weights to load instead of training, such as an earlier run's checkpoint.pt.
        model_checkpoint: weights of the model alone, from an earlier run's checkpoint.pt, to start training from.
    """

    data: Component
    model: Component | None = None
    guide: Component | None = None
    pair: Component | None = None
    evaluate: Evaluate = field(default_factory=Evaluate)
    mapa: Mapa | None = None
    encoder: Component | None = None
    training: Training | None = field(default_factory=Training)
    families: dict[str, Component] = field(default_factory=dict)
    evidence: Ladder | Component = field(default_factory=Ladder)
    refinement: Refinement = field(default_factory=Refinement)
    conditioning: Conditioning = field(default_factory=Conditioning)
    reference: Training | None = None
    retraining: Retraining | None = None
    certificate: Certificate | None = None
    referee: Sample = 32
    shared: Shared = field(default_factory=Shared)
    num_particles: Several = 1000
    batch_size: Count | None = None
    max_memory: Bytes | None = None
    compile: bool = False
    plate: Plate = None
    seed: Seed = 0
    device: DeviceName = "cpu"
    checkpoint: Name | None = None
    model_checkpoint: Name | None = None

    def __post_init__(self) -> None:
        if self.pair is not None and (self.model is not None or self.guide is not None):
            raise InputError("recipe: pair replaces model and guide. Set these to null")
        if self.pair is None and (self.model is None or self.guide is None):
            raise InputError("recipe: a model and a guide are missing. Set both, or pair in place of both")
        if self.checkpoint is not None and self.model_checkpoint is not None:
            raise InputError(
                "recipe: checkpoint includes the model's weights. Set only one of checkpoint and model_checkpoint"
            )
        if self.mapa is not None and self.plate is False:
            raise InputError("mapa: plate is false, but MAPA needs the datapoints of a data plate. Leave plate null")
        if self.encoder is not None and self.mapa is None:
            raise InputError("recipe: only mapa uses an encoder. Set mapa too, or leave encoder out")

    def to_yaml(self) -> str:
        """The recipe as YAML, with every field written out."""
        document = _plain(self)
        return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100))


COMPONENTS = ("model", "guide", "pair", "data", "encoder")
FIELDS = dict(re.findall(r"^ {8}(\w+): (.+)$", Recipe.__doc__ or "", re.MULTILINE))
KINDS = get_type_hints(Recipe, include_extras=True)
SECTIONS: dict[str, type] = {
    name: part
    for name, kind in KINDS.items()
    for part in (kind, *get_args(kind))
    if dataclasses.is_dataclass(part) and isinstance(part, type) and part is not Component
}
SCALARS = [name for name in KINDS if name not in {*COMPONENTS, *SECTIONS, "families"}]


def resolve(document: Document) -> Recipe:
    """The typed recipe of a document, defaults filled in.

    Raises `InputError` naming the field for an unknown one (with the nearest known), or a value of the wrong type.
    """
    if document.get("data") is None and document.keys() <= KINDS.keys():
        raise InputError(
            "recipe: data is missing. Name a data set, such as data: {class_path: pyrogaps.datasets.Digits}"
        )
    document = {name: value for name, value in document.items() if name != "families" or value is not None}
    return Recipe(**typed_arguments("", Recipe, document))


def written_out(document: Document) -> str:
    """The recipe of a document as YAML, with defaults filled in. Objects are printed as they are named, not built."""
    given, objects = _apart(document)
    return str(yaml.safe_dump(merged(_plain(resolve(given)), objects), sort_keys=False, allow_unicode=True, width=100))


def _apart(document: Document, kinds: Mapping[str, Any] = KINDS) -> tuple[Document, Document]:
    """`document` without the settings in its sections that would be built, and these alone."""
    given, objects = dict(document), Document()
    for name, value in document.items():
        kind = kinds.get(name)
        section = next((part for part in (kind, *get_args(kind)) if part in SECTIONS.values()), None)
        if section is not None and isinstance(value, dict) and "class_path" not in value:
            given[name], below = _apart(value, get_type_hints(section, include_extras=True))
            objects |= {name: below} if below else {}
        elif kinds is not KINDS and name in kinds and not is_plain(kind) and value is not None:
            objects[name] = given.pop(name)
    return given, objects


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has; a setting that is an object becomes `class_path` and `init_args`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (Recipe, Component, *SECTIONS.values())):
            return fields
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": fields}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
