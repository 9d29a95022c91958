"""What a ledger does for its user: files, notebooks, papers, some of its datapoints, arithmetic."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal

import pyrogaps as pg
from pyrogaps.gaps.terms import leaves
from tests.references import WrongEncoder, anisotropic, draws_of
from tests.test_integrity import flips

QUICK: dict[str, Any] = {"num_particles": 100, "progress": False, "refinement": pg.Refinement(num_steps=200)}


@pytest.fixture(scope="module")
def ledger() -> pg.GapLedger:
    model = anisotropic(6, 2)
    data = draws_of(model, 9)[0]
    return pg.decompose(model, WrongEncoder(model), data, families={"a<b>&_%": AutoNormal}, **QUICK)


@pytest.fixture(scope="module")
def split_ledger(ledger: pg.GapLedger) -> pg.GapLedger:
    """The same with the parts of a split amortization gap, a certificate and unreliable datapoints."""
    row = {"parent": "amortization_gap", "label": "capacity gap", "mean": 0.1, "standard_error": 0.01, "mcse": 0.01}
    first = ledger.gaps.isel(gap=[-1])
    capacity = first.assign({name: ("gap", [value]) for name, value in row.items()}).assign_coords(gap=["capacity_gap"])
    gaps = xr.concat([ledger.gaps, capacity], "gap")
    reliable = np.arange(9) % 3 != 0
    per_datapoint = ledger.per_datapoint.assign_coords(log_evidence_reliable=("datapoint", reliable))
    certificate = xr.Dataset(
        {"lower": ("simulated", [0.0, 0.0]), "upper": ("simulated", [0.1, 0.1]), "gain": ("refined_again", [0.0, 0.0]),
         "gain_mcse": ("refined_again", [0.0, 0.0])}, attrs={"longer": 4},
    )  # fmt: skip
    provenance = {**ledger.provenance, "split": {"starts": []}}
    parts = {"gaps": gaps, "per_datapoint": per_datapoint, "certificate": certificate}
    return replace(ledger, **parts, provenance=provenance, training=xr.Dataset())


# Files


def test_a_file_brings_the_ledger_back(ledger: pg.GapLedger, tmp_path: Path) -> None:
    for chosen in (ledger, ledger.sel([4, 1])):
        path = tmp_path / "new folder" / "gaps.nc"
        chosen.save(path)
        back = pg.GapLedger.load(str(path))
        assert str(back) == str(chosen) and back.provenance == json.loads(json.dumps(chosen.provenance))
        for name in ("per_datapoint", "traces", "observed", "gaps"):
            xr.testing.assert_identical(getattr(back, name), getattr(chosen, name))
        assert [file.name for file in path.parent.iterdir()] == ["gaps.nc"]


@pytest.mark.parametrize("name", ["gaps.csv", "gaps.json", "gaps"])
def test_a_file_is_what_its_name_says(ledger: pg.GapLedger, tmp_path: Path, name: str) -> None:
    with pytest.raises(pg.InputError, match=r"^path: must end in \.nc, .*, got '.*gaps.*'\. .*ledger\.summary\(\)"):
        ledger.save(tmp_path / name)
    with pytest.raises(pg.InputError, match=r"^path: must end in \.html or \.htm, got .*plot_gaps.* to a PDF$"):
        ledger.report(tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_a_damaged_file_is_refused_by_name(ledger: pg.GapLedger, tmp_path: Path) -> None:
    path, refused, unnoticed = tmp_path / "gaps.nc", 0, 0
    ledger.save(path)
    for place in flips(path, 60):
        try:
            found = pg.GapLedger.load(path)
        except pg.InputError as error:
            message = str(error)
            refused += str(path) in message and "\n" not in message
        else:
            assert found.per_datapoint.equals(ledger.per_datapoint) and str(found) == str(ledger), place
            unnoticed += 1
    assert refused > 10 and refused + unnoticed == 60
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(pg.InputError, match=r"ledger .*gaps\.nc: the file is damaged, or something else"):
        pg.GapLedger.load(path)


def test_what_is_no_ledger_is_refused_by_name(ledger: pg.GapLedger, tmp_path: Path) -> None:
    with pytest.raises(pg.InputError, match=r"none\.nc: no such file"):
        pg.GapLedger.load(tmp_path / "none.nc")
    with pytest.raises(pg.InputError, match="a folder, and no file"):
        pg.GapLedger.load(tmp_path)
    (tmp_path / "text.nc").write_text("gaps")
    with pytest.raises(pg.InputError, match=r"text\.nc: the file is damaged, or something else"):
        pg.GapLedger.load(tmp_path / "text.nc")
    xr.DataTree.from_dict({"a": xr.Dataset({"b": 1})}).to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with pytest.raises(pg.InputError, match=r"tree\.nc: ledger: not a tree written by GapLedger"):
        pg.GapLedger.load(tmp_path / "tree.nc")
    tree = ledger.to_datatree()
    tree["per_datapoint"] = tree["per_datapoint"].to_dataset().drop_vars("elbo")
    del tree.attrs["pyrogaps_sha256"]
    tree.to_netcdf(tmp_path / "part.nc", engine="h5netcdf")
    with pytest.raises(pg.InputError, match=r"part\.nc: ledger: elbo of per_datapoint is missing\. Restore"):
        pg.GapLedger.load(tmp_path / "part.nc")


def test_a_file_is_written_whole_or_not_at_all(
    ledger: pg.GapLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gaps.nc"
    ledger.save(path)
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(pg.InputError, match=r"ledger .*gaps\.nc: cannot be written: No space left.*Choose another"):
        ledger.sel([0]).save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["gaps.nc"]


# Arithmetic


def test_columns_can_be_subtracted_and_flags_stay_beside_them(ledger: pg.GapLedger, tmp_path: Path) -> None:
    ledger.save(tmp_path / "gaps.nc")
    for other in (ledger, pg.GapLedger.load(tmp_path / "gaps.nc")):
        difference = 2 * other.per_datapoint - ledger.per_datapoint
        np.testing.assert_allclose(difference["elbo"], ledger.per_datapoint["elbo"])
        assert all(column.dtype != bool for column in other.per_datapoint.data_vars.values())
        assert other.per_datapoint["converged"].dtype == bool
        assert bool(ledger.per_datapoint["log_evidence"].log_evidence_reliable.all())


def test_flags_of_older_files_are_coordinates_too(ledger: pg.GapLedger) -> None:
    tree = ledger.to_datatree()
    tree["per_datapoint"] = tree["per_datapoint"].to_dataset().reset_coords()
    back = pg.GapLedger.from_datatree(tree)
    xr.testing.assert_identical(back.per_datapoint, ledger.per_datapoint)


# The worst


def test_the_worst_come_first(ledger: pg.GapLedger) -> None:
    gap = ledger.per_datapoint["inference_gap"].values
    worst = ledger.worst(4)
    assert worst.index.name == "datapoint" and worst.index.tolist() == np.argsort(-gap)[:4].tolist()
    np.testing.assert_array_equal(worst["inference_gap"], np.sort(gap)[::-1][:4])
    np.testing.assert_array_equal(
        worst["inference_gap_mcse"], ledger.per_datapoint["inference_gap_mcse"].values[worst.index]
    )
    assert len(ledger.worst(100)) == 9 and len(ledger.worst()) == 9
    assert {"approximation_gap", "amortization_gap", "log_evidence", "elbo", "flags"} < {*worst.columns}
    assert ledger.worst(1, by="elbo").index[0] == int(ledger.per_datapoint["elbo"].values.argmax())
    further = ledger.per_datapoint["family_approximation_gap"].sel(family="a<b>&_%").values
    assert ledger.worst(9, by="approximation_gap[a<b>&_%]").index.tolist() == np.argsort(-further).tolist()


def test_untrusted_datapoints_are_flagged_and_those_without_finite_bounds_come_first(ledger: pg.GapLedger) -> None:
    columns = ledger.per_datapoint.copy(deep=True)
    for name in ("elbo", "log_evidence"):
        columns[name][5] = -np.inf
    columns["inference_gap"][5] = np.nan
    columns["log_evidence_reliable"][2] = False
    columns["converged"][2, 0] = False
    worst = replace(ledger, per_datapoint=columns).worst(9)
    assert worst.index[0] == 5 and worst.loc[5, "flags"] == "no finite bounds"
    assert worst.loc[2, "flags"] == "log p(x) unreliable; refinement not converged"
    assert (worst.loc[[n for n in range(9) if n not in (2, 5)], "flags"] == "").all()


def test_what_has_no_values_per_datapoint_is_refused(ledger: pg.GapLedger, split_ledger: pg.GapLedger) -> None:
    with pytest.raises(pg.InputError, match=r"by: there is no 'inference_gab' per datapoint.*'inference_gap'"):
        ledger.worst(by="inference_gab")
    with pytest.raises(pg.InputError, match=r"Known are .*inference_gap.*approximation_gap\[a<b>&_%\]"):
        ledger.worst(by="approximation_gap[flow]")
    with pytest.raises(pg.InputError, match=r"by: 'capacity_gap' is a difference between data sets.*amortization_gap"):
        split_ledger.worst(by="capacity_gap")
    with pytest.raises(pg.InputError, match="n: must be a whole number of at least 1"):
        ledger.worst(0)


# Some of the datapoints


@pytest.mark.parametrize("form", ["numbers", "mask", "index", "tensor", "column"])
def test_a_selection_is_a_ledger_of_its_datapoints(ledger: pg.GapLedger, form: str) -> None:
    numbers = ledger.worst(3).index
    mask = np.isin(np.arange(9), numbers)
    chosen = ledger.sel(
        {
            "numbers": numbers.tolist(),
            "mask": mask,
            "index": numbers,
            "tensor": torch.tensor(numbers.tolist()),
            "column": ledger.per_datapoint["inference_gap"] >= ledger.worst(3)["inference_gap"].min(),
        }[form]
    )
    assert sorted(chosen.per_datapoint["datapoint"].values) == sorted(numbers)
    values = ledger.per_datapoint.isel(datapoint=np.flatnonzero(mask))
    row = chosen.summary().loc["amortization_gap"]
    assert row["mean"] == pytest.approx(float(values["amortization_gap"].mean()))
    assert row["standard_error"] == pytest.approx(float(values["amortization_gap"].std(ddof=1)) / 3**0.5)
    assert row["mcse"] == pytest.approx(float(np.sqrt((values["amortization_gap_mcse"] ** 2).sum())) / 3)
    assert chosen.summary().loc["elbo", "mean"] == pytest.approx(float(values["elbo"].mean()))
    parts = chosen.gaps["mean"].sel(gap=leaves(chosen.gaps)).sum()
    assert float(parts) == pytest.approx(float(chosen.gaps["mean"].sel(gap="inference_gap")))
    place = {int(n): k for k, n in enumerate(chosen.per_datapoint["datapoint"].values)}
    for n in numbers:
        np.testing.assert_array_equal(chosen.observed["x"][place[n]], ledger.observed["x"][n])


def test_a_selection_says_what_it_is_and_what_it_lacks(split_ledger: pg.GapLedger) -> None:
    chosen = split_ledger.sel([0, 1, 2])
    text, full = str(chosen), str(chosen.table("full"))
    caution = "log p(x), and the gaps measured from it, cannot be trusted for 1 of these 3 datapoints"
    for printed in (text, full):
        assert printed.startswith("Inference gaps of 3 of 9 datapoints")
        assert "A selection of 3 of 9 datapoints; means are over these, and biased where they were selected" in printed
        assert "Left out, because all datapoints are needed: capacity gap, certificate, traces" in printed
        assert "capacity gap  " not in printed
        assert f"Warning: {caution}" in printed
    assert chosen.certificate is None and chosen.training is None
    assert "log p(x) reliable 2/3" in text and "log p(x) is reliable for 2 of these 3 datapoints" in full
    assert any(caution in line for line in chosen.diagnose().warnings)
    assert "In the ledger of all 9 datapoints: modes: all 9 datapoints examined" in full
    assert not any(caution in line for line in split_ledger.sel([1, 2]).diagnose().warnings)
    pg.plot_ledger(chosen)


def test_a_selection_of_a_selection(split_ledger: pg.GapLedger) -> None:
    once, twice = split_ledger.sel([4, 2]), split_ledger.sel([2, 3, 4, 7]).sel([4, 2])
    assert str(once) == str(twice) and once.provenance == twice.provenance
    xr.testing.assert_identical(once.per_datapoint, twice.per_datapoint)
    assert once.sel([2]).per_datapoint["datapoint"].values.tolist() == [2]


def test_datapoints_without_finite_bounds_in_a_selection(ledger: pg.GapLedger) -> None:
    columns = ledger.per_datapoint.copy(deep=True)
    columns["elbo"][[1, 2, 3, 4, 5, 6, 7]] = -np.inf
    named = [{"datapoint": n, "bounds": ["L[q]"], "sites": []} for n in (1, 2, 3, 4, 5)]
    whole = replace(ledger, per_datapoint=columns, provenance={**ledger.provenance, "infinite": named})
    assert "datapoints 1, 2, 3, 4, 5: L[q] = -inf; and 2 more)" in str(whole)
    assert "(datapoints 4, 5: L[q] = -inf; and 1 more)" in str(whole.sel([0, 4, 5, 7]))
    assert "1 of 2 datapoints has no finite bounds, so gaps are means over the other 1.\n" in str(whole.sel([0, 7]))
    assert "finite bounds" not in str(whole.sel([0, 8]))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([9], r"the ledger has no datapoint 9\. Its numbers are in"),
        ([-1], "the ledger has no datapoint -1"),
        ([1, 1], "named twice"),
        ([], "must be numbers of datapoints, or a boolean mask"),
        ([0.5], "must be numbers of datapoints"),
        ("all", "must be numbers of datapoints"),
        ([True, False], "the mask has length 2, and the ledger 9 datapoints"),
        ([False] * 9, "the mask is False everywhere"),
        (slice(0, 3), r"Pass range\(start, stop\)"),
    ],
)
def test_what_selects_nothing_is_refused(ledger: pg.GapLedger, chosen: Any, message: str) -> None:
    with pytest.raises(pg.InputError, match=f"^datapoint: .*{message}"):
        ledger.sel(chosen)


def test_datapoints_that_share_latents_have_no_ledgers_of_their_own(ledger: pg.GapLedger) -> None:
    provenance = {**ledger.provenance, "shared": {"names": "theta"}}
    with pytest.raises(pg.InputError, match=r"datapoint: all datapoints share theta.*per_datapoint\.sel"):
        replace(ledger, shared=xr.Dataset(), provenance=provenance).sel([1])


# The printed table


def rows_of(text: str) -> dict[str, str]:
    """The lines of a printed table by their labels."""
    return {line.strip("│├└─ ").partition("  ")[0]: line for line in text.splitlines()}


def test_the_short_table_has_the_numbers_of_the_summary(ledger: pg.GapLedger) -> None:
    text, summary = str(ledger), ledger.summary()
    rows = rows_of(text)
    assert text.splitlines()[0] == "Inference gaps of 9 datapoints (nats, mean ± standard error over datapoints)"
    for label, name in (
        ("ELBO, refined guide", "elbo_refined[own]"),
        ("ELBO, amortized guide", "elbo"),
        ("inference gap", "inference_gap"),
        ("approximation gap", "approximation_gap"),
        ("amortization gap", "amortization_gap"),
        ("a<b>&_%", "approximation_gap[a<b>&_%]"),
    ):
        figures = re.search(r"([−\d.]+) ± ([\d.]+)", rows[label])
        assert figures is not None
        mean, error = (float(word.replace("−", "-")) for word in figures.groups())
        assert mean == pytest.approx(summary.loc[name, "mean"], abs=0.00501), label
        assert error == pytest.approx(summary.loc[name, "standard_error"], abs=0.00501), label
    assert rows["amortization gap"].endswith("the network does not find the family's best")
    assert "log p(x) reliable 9/9" in text and "refinement converged 9/9" in text
    assert "no missed modes in 9 examined" in text and "Verdict: Mostly the amortization gap." in text
    largest = float(re.findall(r"Monte Carlo error at most ([\d.]+) nats", text)[0])
    assert ledger.gaps["mcse"].max() <= largest <= 2 * ledger.gaps["mcse"].max()
    table, _, below = text.partition("\n\nVerdict: ")
    assert max(map(len, table.splitlines())) <= 100 and len(table.splitlines()) <= 16
    assert below.splitlines()[-1].startswith('More: print(ledger.diagnose()), print(ledger.table("full"))')


def with_rows(ledger: pg.GapLedger, **columns: Any) -> pg.GapLedger:
    """A ledger with other values per datapoint, in columns that it has."""
    data = ledger.per_datapoint
    return replace(ledger, per_datapoint=data.assign({n: (data[n].dims, np.asarray(v)) for n, v in columns.items()}))


def test_bounds_of_log_evidence_are_called_what_they_are(ledger: pg.GapLedger) -> None:
    low = ledger.per_datapoint["log_evidence"].values
    error = float(ledger.summary().loc[["log_evidence", "log_evidence_upper"], "mcse"].pow(2).sum() ** 0.5)
    for upper, words in (
        (low + 0.1, "… .* between two bounds "),
        (low, " two bounds that agree to 0.01 nats "),
        (low - error, " the bounds agree within their error "),
        (low - 9 * error - 0.1, "… .* the bounds contradict each other: do not trust them "),
        (np.where(np.arange(9) == 3, np.inf, low), " a lower bound, without an upper one at 1 datapoint "),
    ):
        changed = with_rows(ledger, log_evidence_upper=upper)
        assert re.search(words, rows_of(str(changed))["log p(x)"]), words
    above = rows_of(str(with_rows(ledger, log_evidence_upper=low - error).table("full")))["log p(x), from above"]
    assert above.endswith("the bounds agree within their error")
    blind = {name: value for name, value in ledger.provenance.items() if name != "examined"}
    unexamined = replace(ledger, per_datapoint=ledger.per_datapoint.drop_vars("examined"), provenance=blind)
    assert str(unexamined).count("not examined for further modes") == 2  # beside log p(x), and among the checks


def test_what_cannot_be_trusted_is_said_in_its_row(ledger: pg.GapLedger) -> None:
    """At one datapoint in nine it is in the short table too; at one in twenty in the full one."""
    reliable, converged = np.arange(9) != 2, ledger.per_datapoint["converged"].values.copy()
    converged[4, 0] = False
    doubtful = with_rows(ledger, log_evidence_reliable=reliable, converged=converged)
    for text in (str(doubtful), str(doubtful.table("full"))):
        rows = rows_of(text)
        assert rows["log p(x)"].endswith("log p(x) unreliable at 1 of 9")
        assert rows["approximation gap"].endswith("log p(x) unreliable at 1 of 9; refinement not converged at 1 of 9")
        assert rows["inference gap"].endswith("log p(x) unreliable at 1 of 9")
        assert rows["amortization gap"].endswith("refinement not converged at 1 of 9")
    assert "log p(x) reliable 8/9" in str(doubtful) and "refinement converged 8/9" in str(doubtful)
    many = xr.concat([ledger.per_datapoint] * 3, "datapoint").assign_coords(datapoint=np.arange(27))
    rare = with_rows(replace(ledger, per_datapoint=many), log_evidence_reliable=np.arange(27) != 2)
    assert "unreliable at" not in str(rare) and "log p(x) reliable 26/27" in str(rare)
    assert rows_of(str(rare.table("full")))["log p(x)"].endswith("log p(x) unreliable at 1 of 27")


def test_a_gap_within_its_error_and_a_family_that_gains_nothing(ledger: pg.GapLedger) -> None:
    gaps = ledger.gaps.copy(deep=True)
    gaps["mean"].loc["approximation_gap"] = 1.9 * float(gaps["mcse"].sel(gap="approximation_gap"))
    small = rows_of(str(replace(ledger, gaps=gaps)))["approximation gap"]
    assert small.endswith("within its error")
    gaps["mean"].loc["approximation_gap"] = -0.5
    assert rows_of(str(replace(ledger, gaps=gaps)))["approximation gap"].endswith("  negative beyond its error")
    elbo = ledger.per_datapoint["elbo_refined"].values
    assert rows_of(str(ledger))["a<b>&_%"].endswith("  within its error; this is the guide's own family")
    ledger = replace(ledger, provenance={**ledger.provenance, "same_families": []})
    for gain, words in (
        (0.5, "0.50 nats better than the guide's own family"),
        (-0.5, "0.50 nats worse than the guide's own family"),
        (0.0, "no gain over the guide's own family"),
    ):
        changed = with_rows(ledger, elbo_refined=np.stack([elbo[:, 0], elbo[:, 0] + gain], 1))
        assert rows_of(str(changed))["a<b>&_%"].endswith(words)


def test_the_full_table_explains_its_errors_and_has_flags_where_there_are_any(ledger: pg.GapLedger) -> None:
    text = str(ledger.table("full"))
    assert text.count("s.e.: standard error of the mean over datapoints. MCSE: Monte Carlo standard error") == 1
    below = text.split("\n\n")[-1].splitlines()
    assert len(below) >= 5 and all(line.endswith(".") for line in below)
    heavy = with_rows(ledger, khat=np.where(np.arange(9) < 2, 0.8, 0.1))
    assert rows_of(str(heavy.table("full")))["IWAE-100[q]"].endswith("k-hat above 0.7 at 2 of 9")
    assert heavy.table("full").headings[-1] == "flag"
    sure = ledger.gaps.assign(mcse=0 * ledger.gaps["mcse"], standard_error=0 * ledger.gaps["mcse"])
    clean = with_rows(replace(ledger, gaps=sure), khat=np.zeros(9), log_evidence_upper=ledger.per_datapoint["elbo"] + 9)
    clean = with_rows(clean, family_approximation_gap=np.ones((9, 2)))
    assert clean.table("full").headings[-1] == "estimated by"
    with pytest.raises(pg.InputError, match=r"^form: must be one of short, full, got 'long'\Z"):
        ledger.table("long")  # type: ignore[arg-type]


def test_importance_weights_above_the_threshold_are_called_unreliable(ledger: pg.GapLedger) -> None:
    heavy = with_rows(
        ledger, khat_refined=np.full((9, 2), 0.81), ess_refined=np.full((9, 2), 97.0), khat=np.full(9, 0.2)
    )
    (line,) = [line for line in str(heavy.table("full")).splitlines() if line.startswith("Importance weights")]
    assert "amortized guide k-hat 0.20, effective sample size" in line
    assert "refined own family k-hat 0.81 (above 0.7: unreliable), effective sample size 97%" in line


def test_frames_print_whole(ledger: pg.GapLedger) -> None:
    worst, summary = ledger.worst(5), ledger.summary()
    with pd.option_context("display.width", 80, "display.max_columns", 4, "display.max_colwidth", 10):
        for frame in (worst, summary, worst.head(2), ledger.worst(9, by="elbo")):
            for text in (repr(frame), frame._repr_html_()):
                assert "..." not in text and all(str(column) in text for column in frame.columns)
            assert len(repr(frame).splitlines()) == len(frame) + 2
    assert isinstance(worst, pd.DataFrame) and type(worst["elbo"]) is pd.Series
    assert worst.copy().equals(worst) and "Monte Carlo ELBO of the refined guide" in repr(summary)


# Notebooks and papers


def test_a_notebook_shows_all_that_is_printed(split_ledger: pg.GapLedger) -> None:
    for shown in (split_ledger, split_ledger.sel([0, 1, 2])):
        text = "".join(ElementTree.fromstring(shown._repr_html_()).itertext())
        for form in ("short", "full"):
            table = shown.table(form)
            assert "".join(ElementTree.fromstring(table.html()).itertext()) in text
            for line in str(table).partition("\n\n")[2].split("\n\n")[-1].splitlines():
                assert line.removeprefix("Verdict: ") in text
            cells = [cell for group in table.groups for row in group for cell in row]
            assert len(cells) > 20 and all(cell in text for cell in cells)


def test_a_notebook_shows_the_diagnosis(split_ledger: pg.GapLedger) -> None:
    found = split_ledger.sel([0, 1, 2]).diagnose()
    text = "".join(ElementTree.fromstring(found._repr_html_()).itertext())
    for line in str(found).splitlines():
        assert line.lstrip("0123456789. ").removeprefix("Note: ") in text


def test_papers_have_the_warnings_too(split_ledger: pg.GapLedger) -> None:
    chosen = split_ledger.sel([0, 1, 2])
    assert r"Mean $\pm$ standard error over 3 of 9 datapoints, in nats. MCSE: Monte Carlo" in chosen.to_latex()
    assert "Mean ± standard error over 9 datapoints, in nats. MCSE: Monte Carlo" in split_ledger.to_markdown()
    assert "cannot be trusted for 1 of these 3" in chosen.to_latex() and "cannot be trusted" in chosen.to_markdown()
    assert r"a\textless{}b\textgreater{}\&\_\%" in chosen.to_latex() and r"a\<b\>&\_%" in chosen.to_markdown()
    assert chosen.to_latex(label="tab:a").startswith("\\begin{table}")
    with pytest.raises(pg.InputError, match="caption: must be a string or None"):
        chosen.to_latex(caption=3)  # type: ignore[arg-type]
