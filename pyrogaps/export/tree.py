"""`to_datatree`: an SVI result as an ArviZ DataTree."""

import inspect
from typing import Any, TypeAlias

import pyro
import torch
import xarray as xr
from arviz_base import dict_to_dataset
from torch import Tensor, nn

from pyrogaps.density import Data, JointDensity
from pyrogaps.density.draws import Posterior
from pyrogaps.density.runs import Program
from pyrogaps.export.draws import Drawn, Records, draw_all
from pyrogaps.export.pair import pair_of
from pyrogaps.export.record import DATAPOINT, Names
from pyrogaps.guard import guarded
from pyrogaps.run import Run
from pyrogaps.settings import Plate, Seed, Several, checked
from pyrogaps.version import __version__

Variables: TypeAlias = dict[str, tuple[list[str], Tensor]]
SAMPLE_DIMS = ["chain", "draw"]
GLOBAL, LOCAL, BOTH = "global", "local", "global and local"


@guarded
@checked()
def to_datatree(
    model: Program,
    guide: Program | Posterior,
    data: Data,
    *,
    num_draws: Several = 1000,
    plate: Plate = None,
    seed: Seed = 0,
) -> xr.DataTree:
    r"""Export draws from a trained guide, with the model's densities, as an ArviZ DataTree.

    Groups, with chain = 1 and S = `num_draws`:

    - `posterior`: latent sites and deterministic ones, (chain, draw, *site); where latents are local, with
      "datapoint" in front, and without deterministic sites outside the data plate.
    - `log_likelihood`: $\log p(x_n \mid z_s)$ of every observed site in nats, (chain, draw, *batch): one value for each
      element of the site's batch shape, summed over its event, without scales; NaN where a mask hides it.
    - `observed_data`: the observed sites. `constant_data`: the model's other tensor arguments, by their names.
    - `sample_stats`: `log_p`, $\log p(x, z_s)$, and `log_q`, $\log q(z_s)$, in nats, both in unconstrained space:
      (chain, draw) of the whole data set, or (chain, draw, datapoint) where every latent is local.

    The data plate's dimension is "datapoint", another plate's has its name, further ones are `<site>_dim_0` and so on.
    Latents are *local* where they lie in every plate of an observed site, so that each observation has its own, and
    else *global*; the attribute "latents" says which (`local_latents` names them). The attributes also hold the
    versions, `num_draws` and the seed. Save the tree with `.to_netcdf(path, engine="h5netcdf")`.

    Args:
        model, guide: as for `JointDensity` and `GuideDensity`: modules, functions, autoguides; or the result of
            `refine`.
        data: as for `JointDensity`; all of it, also for a guide that was trained on minibatches.
        num_draws: S, at least 2.
        plate: the data plate's name. None finds it; False treats the whole data set as one datapoint.
        seed: seed of all random numbers.

    Raises:
        InputError: for `num_draws` below 2, a site whose name is that of a dimension, a log-likelihood that is NaN at
            some draws, and whatever `JointDensity` and `GuideDensity` refuse, naming the site or the argument.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> tree = pg.to_datatree(model, guide, x, num_draws=100)
        >>> sorted(tree.children)
        ['log_likelihood', 'observed_data', 'posterior', 'sample_stats']
    """
    joint, posterior = pair_of(model, guide, data, plate)
    drawn, records = draw_all(joint, posterior, num_draws, Run(seed, batch_size=1))
    data_plate = joint.plate or plate or _plate_of_observations(records)
    arguments = _arguments(joint)
    names = Names(data_plate or None, {*records, *arguments})
    groups: dict[str, Variables] = {**_draws(drawn, records, joint, names), **_data(records, joint, names, arguments)}
    attributes = {"inference_library": "pyro", "inference_library_version": pyro.__version__}
    tree = xr.DataTree.from_dict({name: _dataset(name, held, attributes) for name, held in groups.items() if held})
    tree.attrs = {
        **attributes,
        "pyrogaps_version": __version__,
        **_latent_kinds(records, joint),
        "data_plate": data_plate or "none",
        "model": _name(model),
        "guide": _name(guide),
        "num_draws": num_draws,
        "seed": seed,
        "unnormalised_likelihood": ", ".join(joint.unnormalised),
    }
    return tree


def _draws(drawn: Drawn, records: Records, joint: JointDensity, names: Names) -> dict[str, Variables]:
    """The groups with values for every draw."""
    lead = SAMPLE_DIMS + [DATAPOINT] * (joint.plate is not None)
    posterior: Variables = {}
    log_likelihood: Variables = {}
    for name, record in records.items():
        dims = record.dims(name, names)
        axis = None if joint.plate is None else record.axis_of(joint.plate)
        batch = dims[: record.batch_dims]
        if axis is not None:
            del dims[axis], batch[axis + record.event_dim]
        if name in drawn.values:
            posterior[name] = _named(lead, dims, drawn.values[name][None])
        else:
            log_likelihood[name] = _named(lead, batch, drawn.log_likelihood[name][None])
    stats = {name: (lead, value[None]) for name, value in (("log_p", drawn.log_p), ("log_q", drawn.log_q))}
    return {"posterior": posterior, "log_likelihood": log_likelihood, "sample_stats": stats}


def _data(records: Records, joint: JointDensity, names: Names, arguments: dict[str, Tensor]) -> dict[str, Variables]:
    """The groups that hold the data: observed sites, and arguments that are not observed values."""
    observed: Variables = {}
    for name, record in records.items():
        if record.log_likelihood is not None:
            dims, value = record.dims(name, names), record.value
            axis = None if joint.plate is None else record.axis_of(joint.plate)
            if axis is not None:
                dims, value = [dims.pop(axis), *dims], value.movedim(axis, 0)
            observed[name] = _named([], dims, value)
    lengths = [value.shape[dims.index(DATAPOINT)] for dims, value in observed.values() if DATAPOINT in dims]
    values = [value for _, value in observed.values()]
    constant: Variables = {}
    for name, argument in arguments.items():
        if not any(_same_values(argument, value) for value in values):
            lead = [DATAPOINT] * (argument.dim() > 0 and len(argument) in lengths)
            constant[name] = ([*lead, *(f"{name}_dim_{k}" for k in range(argument.dim() - len(lead)))], argument)
    return {"observed_data": observed, "constant_data": constant}


def _named(lead: list[str], dims: list[str | None], value: Tensor) -> tuple[list[str], Tensor]:
    """`value`, whose axes are `lead` and `dims`, without those that have no name (and size one)."""
    sizes = [size for size, dim in zip(value.shape[len(lead) :], dims, strict=True) if dim is not None]
    return [*lead, *(dim for dim in dims if dim is not None)], value.reshape([*value.shape[: len(lead)], *sizes])


def _dataset(group: str, variables: Variables, attributes: dict[str, str]) -> xr.Dataset:
    arrays = {name: value.detach().cpu().numpy() for name, (_, value) in variables.items()}
    dataset: xr.Dataset = dict_to_dataset(
        arrays,
        dims={name: dims for name, (dims, _) in variables.items()},
        sample_dims=[] if group.endswith("data") else SAMPLE_DIMS,
        attrs=attributes,
        check_conventions=False,  # they only require more draws than chains
    )
    return dataset


def _plate_of_observations(records: Records) -> str | None:
    """The one plate around every observed site; None where there are none or several."""
    plates = [set(record.plates.values()) for record in records.values() if record.log_likelihood is not None]
    common = set.intersection(*plates) if plates else set()
    return str(next(iter(common))) if len(common) == 1 else None


def _latent_kinds(records: Records, joint: JointDensity) -> dict[str, str]:
    """Attributes: whether latents are global or local, and which are local."""
    latent = {name: record.enclosing for name, record in records.items() if record.latent}
    observed = [record.enclosing for record in records.values() if record.log_likelihood is not None]
    own = [name for name, plates in latent.items() if any(around and around <= plates for around in observed)]
    if joint.plate is not None:  # also where a pyro.factor is the only likelihood
        own = list(latent)
    kind = GLOBAL if not own else LOCAL if len(own) == len(latent) else BOTH
    return {"latents": kind, "local_latents": ", ".join(own)}


def _arguments(joint: JointDensity) -> dict[str, Tensor]:
    """The model's tensor arguments by name, for all of the data."""
    args = joint.fetch(torch.arange(joint.num_datapoints))
    function = joint.model.forward if isinstance(joint.model, nn.Module) else joint.model
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds]
    known += [f"argument_{position}" for position in range(len(known), len(args))]
    return {name: value for name, value in zip(known, args, strict=False) if isinstance(value, Tensor)}


def _same_values(left: Tensor, right: Tensor) -> bool:
    """Whether an argument is an observed value, in another shape or dtype perhaps."""
    return left.numel() == right.numel() and bool((left.cpu().flatten() == right.cpu().flatten()).all())


def _name(program: Any) -> str:
    return str(getattr(program, "__name__", type(program).__name__))
