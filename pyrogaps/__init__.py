"""pyrogaps: how far is inference in a Pyro model from the truth, and whose fault is it?"""

from pyrogaps.adapters import from_scvi, from_torch, to_obs
from pyrogaps.bounds import elbo, iwae
from pyrogaps.calibration import Calibration, calibrate
from pyrogaps.conditioning import Conditioning, SimulatedData, reference_guide, shared_posterior
from pyrogaps.density import GuideDensity, IndexedData, JointDensity
from pyrogaps.errors import InputError
from pyrogaps.evidence import AIS, Bridge, Evidence, Ladder, Measured, Measurement, ais, bdmc, log_evidence
from pyrogaps.export import loo, to_datatree
from pyrogaps.family import AmortizedGuide, LocalFamily
from pyrogaps.gaps import TERMS, Certificate, Comparison, GapLedger, Retraining, Split, Term, compare, decompose
from pyrogaps.grid import posterior_grid
from pyrogaps.mapa import (
    MAPA_ELBO,
    MAPA_IWAE_ELBO,
    BernoulliKernel,
    ContinuousBernoulliKernel,
    GaussianKernel,
    MapaPosterior,
    mapa_posterior,
)
from pyrogaps.monitor import GapMonitor
from pyrogaps.objectives import IWAE_ELBO
from pyrogaps.plots import (
    plot_calibration,
    plot_comparison,
    plot_datapoints,
    plot_gaps,
    plot_ledger,
    plot_monitor,
    plot_posteriors,
    plot_traces,
)
from pyrogaps.problem import Problem
from pyrogaps.refine import Refinement, refine
from pyrogaps.shared import Shared
from pyrogaps.training import Training, train
from pyrogaps.version import __version__ as __version__

__all__ = [
    "AIS",
    "IWAE_ELBO",
    "MAPA_ELBO",
    "MAPA_IWAE_ELBO",
    "TERMS",
    "AmortizedGuide",
    "BernoulliKernel",
    "Bridge",
    "Calibration",
    "Certificate",
    "Comparison",
    "Conditioning",
    "ContinuousBernoulliKernel",
    "Evidence",
    "GapLedger",
    "GapMonitor",
    "GaussianKernel",
    "GuideDensity",
    "IndexedData",
    "InputError",
    "JointDensity",
    "Ladder",
    "LocalFamily",
    "MapaPosterior",
    "Measured",
    "Measurement",
    "Problem",
    "Refinement",
    "Retraining",
    "Shared",
    "SimulatedData",
    "Split",
    "Term",
    "Training",
    "ais",
    "bdmc",
    "calibrate",
    "compare",
    "decompose",
    "elbo",
    "from_scvi",
    "from_torch",
    "iwae",
    "log_evidence",
    "loo",
    "mapa_posterior",
    "plot_calibration",
    "plot_comparison",
    "plot_datapoints",
    "plot_gaps",
    "plot_ledger",
    "plot_monitor",
    "plot_posteriors",
    "plot_traces",
    "posterior_grid",
    "reference_guide",
    "refine",
    "shared_posterior",
    "to_datatree",
    "to_obs",
    "train",
]
