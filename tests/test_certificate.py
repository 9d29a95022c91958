"""The certificate of a ledger: what it finds against closed forms, that it is kept, what it warns of, refusals."""

import functools
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyrogaps as pg
from pyrogaps.gaps import certificate as certificates
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.references import anisotropic, draws_of

REFINER = import_module("pyrogaps.refine.refiner")  # the package has a function of the name `refine`
STANDARD_ERRORS = 4.0
CERTIFICATE = pg.Certificate(num_simulated=24, num_refined_again=16)
EVIDENCE = pg.AIS(num_chains=8, num_temperatures=20, num_leapfrog=3)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def pair() -> tuple[LinearGaussian, AmortizedNormal, Tensor]:
    torch.manual_seed(0)
    return anisotropic(4, 2), AmortizedNormal(4, 2, (3,)).double(), draws_of(anisotropic(4, 2), 40)[0]


@functools.cache
def ledger_of(num_steps: int, certificate: pg.Certificate = CERTIFICATE, **options: Any) -> pg.GapLedger:
    model, guide, x = pair()
    chosen = {"refinement": pg.Refinement(num_steps=num_steps), "evidence": EVIDENCE, "num_particles": 400, **options}
    with pytest.MonkeyPatch.context() as monkeypatch:
        # By Adam: the fewest natural gradients leave nothing to gain.
        monkeypatch.setattr(REFINER, "gaussian_form", lambda *arguments: None)
        return pg.decompose(model, guide, x, certificate=certificate, progress=False, **chosen)


@pytest.mark.parametrize("num_steps", [10, 300])
def test_gain_is_what_the_refinement_had_left(num_steps: int) -> None:
    """To the best diagonal Gaussian, which thirty times as many steps of Adam reach."""
    model, _, x = pair()
    ledger = ledger_of(num_steps, replace(CERTIFICATE, longer=30) if num_steps == 10 else CERTIFICATE)
    certificate = ledger.certificate
    assert certificate is not None
    assert certificate.sizes == {"simulated": 24, "refined_again": 16}
    chosen = torch.tensor(certificate["refined_again"].values)
    mean, scale = model.mean_field_optimum(x[chosen])
    best = model.elbo(x[chosen], mean, scale=scale).detach()
    before = torch.tensor(ledger.per_datapoint["elbo_refined"].values[chosen.numpy(), 0])
    left, gain = float((best - before).mean()), float(certificate["gain"].mean())
    error = float(certificate["gain_mcse"].values.mean()) / 16**0.5
    assert abs(gain - left) < STANDARD_ERRORS * error + 1e-3
    assert (left > 0.1) == (num_steps == 10)


def test_sandwich_holds_the_truth_and_narrows() -> None:
    widths = []
    for num_temperatures in (2, 40):
        evidence = pg.AIS(num_chains=8, num_temperatures=num_temperatures, num_leapfrog=3, initial="prior")
        certificate = ledger_of(50, evidence=evidence).certificate
        assert certificate is not None
        widths.append((certificate["upper"] - certificate["lower"]).values)
    assert widths[1].mean() < widths[0].mean() / 2
    assert all(width.mean() > -2 * width.std() / len(width) ** 0.5 for width in widths)


def test_the_ledger_keeps_and_prints_it(tmp_path: Path) -> None:
    ledger = ledger_of(50)
    ledger.to_datatree().to_netcdf(tmp_path / "ledger.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "ledger.nc", engine="h5netcdf") as tree:
        back = pg.GapLedger.from_datatree(tree.load())
    assert str(back) == str(ledger)
    for text in (str(ledger), str(ledger.table("full"))):
        assert "Certificate of log p(x), by BDMC on 24 datapoints simulated from the model: " in text
        assert "Certificate of the refinement: 4 times as many steps change the ELBO of 16 datapoints by" in text


@pytest.mark.usefixtures("brief_check")
def test_nothing_else_changes() -> None:
    model, guide, x = pair()
    options: dict[str, Any] = {"refinement": pg.Refinement(num_steps=20), "evidence": EVIDENCE, "progress": False}
    whole = pg.decompose(model, guide, x, **options)
    xr.testing.assert_identical(
        pg.decompose(model, guide, x, certificate=CERTIFICATE, **options).per_datapoint, whole.per_datapoint
    )
    assert whole.certificate is None


def test_advice_minds_it() -> None:
    poor = ledger_of(
        3,
        replace(CERTIFICATE, longer=100),
        evidence=pg.AIS(num_chains=2, num_temperatures=2, num_leapfrog=1, initial="prior"),
        referee=False,  # whose starts are better than three steps of a refinement
    )
    warnings = " ".join(poor.diagnose().warnings)
    assert "nats higher than measured (BDMC). Raise num_temperatures of AIS" in warnings
    assert "Bridge" not in warnings and "Ladder" not in warnings
    assert "a longer refinement gains" in warnings
    assert not [warning for warning in ledger_of(300).diagnose().warnings if "BDMC" in warning or "longer" in warning]


@pytest.mark.parametrize(
    ("evidence", "advice"),
    [(pg.Ladder(), "Lower tolerance of Ladder"), (pg.Bridge(), "Raise num_temperatures of Bridge")],
)
def test_advice_is_of_the_evidence_at_hand(evidence: pg.Evidence, advice: str) -> None:
    wide = xr.Dataset({name: ("simulated", np.full(2, value)) for name, value in (("lower", 0.0), ("upper", 3.0))})
    wide = wide.assign(gain=("refined_again", np.zeros(2)), gain_mcse=("refined_again", np.zeros(2)))
    (line,) = certificates.cautions(wide.assign_attrs(longer=4, more=evidence.more), 1.0, "amortization gap")
    assert line.endswith(advice + (", or raise its max_evaluations" if "Ladder" in advice else ""))


def test_more_datapoints_than_the_memory_holds_are_refused_before_anything_is_measured() -> None:
    model, guide, x = pair()
    with pytest.raises(pg.InputError, match=r"certificate.num_simulated: 100,000,000,000 datapoints take .* at most"):
        pg.decompose(model, guide, x, certificate=pg.Certificate(num_simulated=10**11), progress=False)


def test_an_autoguide_of_these_datapoints_is_certified_by_its_class() -> None:
    model, _, x = pair()
    guide = AutoNormal(model)
    pg.train(model, guide, x, freeze_model=True, num_epochs=20, batch_size=len(x), progress=False)
    options: dict[str, Any] = {"refinement": pg.Refinement(num_steps=50), "evidence": EVIDENCE, "progress": False}
    ledger = pg.decompose(model, guide, x, certificate=CERTIFICATE, **options)
    assert ledger.certificate is not None
    assert bool(ledger.certificate.notnull().all().to_array().all())


@pytest.mark.parametrize("name", ["num_simulated", "num_refined_again", "longer"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(pg.InputError, match=f"certificate.{name}: must be a whole number of at least 2, got 1"):
        pg.Certificate(**{name: 1})


@pytest.mark.parametrize(
    ("upper", "said"),
    [
        ([0.2, 0.3, 0.4], "log p(x) is at most 0.300 ± 0.058 nats higher than measured on average"),
        ([-0.1, 0.1, 0.03], "its upper bound agree within their error (0.010 ± 0.059 nats apart)"),
        ([-0.1, 0.1, -0.03], "its upper bound agree within their error (-0.010 ± 0.059 nats apart)"),
        ([-0.2, -0.3, -0.4], "log p(x) as measured is 0.300 ± 0.058 nats above its upper bound, by chance"),
        ([0.2], "log p(x) is at most 0.200 nats higher than measured on average"),
    ],
)
def test_a_sandwich_in_words(upper: list[float], said: str) -> None:
    """Bounds that cross by less than their error agree; there is no "at most" of a negative number."""
    width = np.array(upper)
    certificate = xr.Dataset(
        {"lower": ("simulated", 0 * width), "upper": ("simulated", width), "gain": ("refined_again", np.zeros(2)),
         "gain_mcse": ("refined_again", np.zeros(2))}, attrs={"longer": 4},
    )  # fmt: skip
    line, _ = certificates.lines_of(certificate)
    certain = max(0.0, width.mean() + math.log(20) / len(width))
    assert said in line and f"with 95% confidence log p(x) is at most {certain:.3f} nats higher" in line
    assert "at most -" not in line and "nan" not in line


def test_a_gap_within_its_error_says_so() -> None:
    """With one latent a Normal is exact, so that the approximation gap is none; the guide is far from trained."""
    model = LinearGaussian.random(4, 1).double()
    torch.manual_seed(1)
    guide = AmortizedNormal(4, 1, (3,)).double()
    options: dict[str, Any] = {"refinement": pg.Refinement(num_steps=200), "evidence": EVIDENCE, "progress": False}
    lines = str(pg.decompose(model, guide, draws_of(model, 40)[0], **options)).splitlines()
    told = {line.split(" gap")[0].strip(" ├└─"): "  within its error" in line for line in lines if " gap " in line}
    assert told["approximation"]
    assert not told["amortization"]
    assert not told["inference"]
