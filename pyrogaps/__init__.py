"""pyrogaps: how far is inference in a Pyro model from the truth, and whose fault is it?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyrogaps.bounds import elbo, iwae
from pyrogaps.conditioning import Conditioning, SimulatedData, reference_guide, shared_posterior
from pyrogaps.density import GuideDensity, IndexedData, JointDensity
from pyrogaps.errors import InputError
from pyrogaps.evidence import AIS, Bridge, Evidence, Ladder, Measured, Measurement, ais, bdmc, log_evidence
from pyrogaps.family import AmortizedGuide, LocalFamily
from pyrogaps.objectives import IWAE_ELBO
from pyrogaps.problem import Problem
from pyrogaps.refine import Refinement, refine
from pyrogaps.shared import Shared
from pyrogaps.training import Training, train
from pyrogaps.version import __version__ as __version__

if TYPE_CHECKING:
    # Functions that have their module's name, from the module: mypy takes `pyrogaps.gaps.compare` for either.
    from pyrogaps.adapters import from_anndata, from_arrays, from_scvi, from_torch, to_obs
    from pyrogaps.calibration import Calibration
    from pyrogaps.calibration.calibrate import calibrate
    from pyrogaps.export import to_datatree
    from pyrogaps.export.loo import loo
    from pyrogaps.gaps import TERMS, Certificate, Comparison, GapLedger, Retraining, Split, Term
    from pyrogaps.gaps.compare import compare
    from pyrogaps.gaps.decompose import decompose
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

# What needs pandas, xarray, SciPy's larger parts or Matplotlib, by package: loaded when a name is first used, because
# that takes longer than all the rest. (`pyrogaps.refine` must not be among them: it is a package and a function.)
_LATER = {
    "adapters": ("from_anndata", "from_arrays", "from_scvi", "from_torch", "to_obs"),
    "calibration": ("Calibration", "calibrate"),
    "export": ("loo", "to_datatree"),
    "gaps": ("TERMS", "Certificate", "Comparison", "GapLedger", "Retraining", "Split", "Term", "compare", "decompose"),
    "grid": ("posterior_grid",),
    "mapa": (
        "MAPA_ELBO",
        "MAPA_IWAE_ELBO",
        "BernoulliKernel",
        "ContinuousBernoulliKernel",
        "GaussianKernel",
        "MapaPosterior",
        "mapa_posterior",
    ),
    "monitor": ("GapMonitor",),
    "plots": (
        "plot_calibration",
        "plot_comparison",
        "plot_datapoints",
        "plot_gaps",
        "plot_ledger",
        "plot_monitor",
        "plot_posteriors",
        "plot_traces",
    ),
}

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
    "from_anndata",
    "from_arrays",
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


def __getattr__(name: str) -> Any:
    """A name of `_LATER`, or one of its packages, when it is first used."""
    for package, names in _LATER.items():
        if name == package or name in names:
            module = import_module(f"pyrogaps.{package}")
            globals()[name] = value = module if name == package else getattr(module, name)
            return value
    raise AttributeError(f"module 'pyrogaps' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATER})
