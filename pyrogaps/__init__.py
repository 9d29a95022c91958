"""pyrogaps: how far is inference in a Pyro model from the truth, and whose fault is it?"""

from pyrogaps.ais import AIS, ais, bdmc
from pyrogaps.bounds import elbo, iwae
from pyrogaps.conditioning import Conditioning, SimulatedData, reference_guide, shared_posterior
from pyrogaps.density import GuideDensity, IndexedData, JointDensity
from pyrogaps.errors import InputError
from pyrogaps.gaps import GapLedger, decompose
from pyrogaps.plots import plot_datapoints, plot_gaps, plot_ledger, plot_posteriors, plot_traces
from pyrogaps.posterior_grid import posterior_grid
from pyrogaps.refine import Refinement, refine
from pyrogaps.training import train

__all__ = [
    "AIS",
    "Conditioning",
    "GapLedger",
    "GuideDensity",
    "IndexedData",
    "InputError",
    "JointDensity",
    "Refinement",
    "SimulatedData",
    "ais",
    "bdmc",
    "decompose",
    "elbo",
    "iwae",
    "plot_datapoints",
    "plot_gaps",
    "plot_ledger",
    "plot_posteriors",
    "plot_traces",
    "posterior_grid",
    "refine",
    "reference_guide",
    "shared_posterior",
    "train",
]
