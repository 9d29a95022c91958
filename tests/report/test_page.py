"""The page of a ledger, read as HTML: its numbers, what it escapes, its size, what it shows of the data."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

import pyrogaps as pg
from pyrogaps.gaps.assemble import with_gaps
from pyrogaps.gaps.terms import values_of
from pyrogaps.report import page_of
from pyrogaps.report.columns import columns_of, flags_of
from pyrogaps.report.page import embedded
from tests.report.ledgers import EVIL, IMPOSSIBLE, SITE, data, repeated

MOST = 8_000_000
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Elements, text by section, the table of means by quantity, and the JSON blocks of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[str]] = {}
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._row: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            quantity = dict(attrs).get("data-quantity")
            self._row = self.rows.setdefault(quantity, []) if quantity else None
        if tag in ("td", "th") and self._row is not None:
            self._row.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += text
        elif not (self._open and self._open[-1] == "style"):
            self.text += text
            if self._row and self._open[-1] in ("td", "th"):
                self._row[-1] += text

    def block(self, name: str) -> Any:
        scripts = [attributes for tag, attributes in self.tags if tag == "script"]
        return json.loads(self.scripts[[attributes.get("id") for attributes in scripts].index(name)])


@pytest.fixture(scope="module")
def page(ledger: pg.GapLedger) -> Page:
    return Page(page_of(ledger, command=f"run --out '{EVIL}'", title=f"title {EVIL}"))


def number(text: str) -> float:
    return float(text.strip().split()[0].replace("\N{MINUS SIGN}", "-").replace(",", "").replace("–", "nan"))


def test_means_are_those_of_the_summary(ledger: pg.GapLedger, page: Page) -> None:
    summary = ledger.summary()
    assert {*page.rows} == {*summary.index}
    for name, (label, mean, error, mcse, direction, estimator) in page.rows.items():
        expected = summary.loc[name]
        shown = [number(text) for text in (mean, error, mcse)]
        np.testing.assert_allclose(shown, expected[["mean", "standard_error", "mcse"]].astype(float), atol=5.1e-4)
        assert (direction, estimator) == (expected["direction"], expected["estimator"])
        assert label.strip()


def test_values_are_those_of_the_ledger(ledger: pg.GapLedger, page: Page) -> None:
    table = page.block("table-data")
    assert table["datapoints"] == ledger.per_datapoint["datapoint"].values.tolist()
    special = {None: np.nan, "inf": np.inf, "-inf": -np.inf}
    columns = {column["id"]: column for column in table["columns"]}
    names = {"elbo": "elbo", "log_evidence": "log_evidence", "inference_gap": "inference_gap", "khat": "khat"}
    for shown, name in names.items():
        value = [special.get(v, v) if not isinstance(v, float) else v for v in columns[shown]["value"]]
        np.testing.assert_allclose(value, ledger.per_datapoint[name].values, atol=5.1e-5)
    refined = ledger.per_datapoint["elbo_refined"].sel(family="own").values
    assert columns["elbo_refined"]["value"][0] == pytest.approx(refined[0], abs=5.1e-5)
    other = ledger.per_datapoint["family_approximation_gap"].sel(family=EVIL).values
    assert columns[f"approximation_gap[{EVIL}]"]["value"][0] == pytest.approx(other[0], abs=5.1e-5)
    error = ledger.per_datapoint["inference_gap_mcse"].values[0]
    assert columns["inference_gap"]["mcse"][0] == pytest.approx(error, rel=6e-3)


def test_warnings_come_first_and_every_doubtful_datapoint_has_a_flag(ledger: pg.GapLedger, page: Page) -> None:
    diagnosis = ledger.diagnose()
    assert len(diagnosis.warnings) >= 2
    places = [page.text.index(warning[:40]) for warning in diagnosis.warnings]
    assert max(places) < page.text.index(diagnosis.verdict) < page.text.index("Tree of gaps")
    flags = {flag.id: flag for flag in flags_of(ledger)}
    assert np.flatnonzero(flags["infinite"].holds).tolist() == [IMPOSSIBLE]
    reliable = ledger.per_datapoint["log_evidence_reliable"].values
    assert (flags["unreliable"].holds == ~reliable).all() and not reliable.all()
    assert all(flags[name].serious for name in ("infinite", "unreliable"))
    bits = page.block("table-data")["bits"]
    assert [flag["id"] for flag in page.block("table-data")["flags"]] == [*flags]
    assert bits == [sum(int(flag.holds[n]) << k for k, flag in enumerate(flags.values())) for n in range(len(bits))]


def test_a_gap_below_zero_by_more_than_its_error_is_flagged(ledger: pg.GapLedger) -> None:
    data = ledger.per_datapoint.copy(deep=True)
    assert not any(flag.id == "negative" for flag in flags_of(ledger))
    data["inference_gap"].values[:2] = np.array([-5, -3]) * data["inference_gap_mcse"].values[:2]
    (flag,) = (flag for flag in flags_of(replace(ledger, per_datapoint=data)) if flag.id == "negative")
    assert np.flatnonzero(flag.holds).tolist() == [0]


def test_nothing_of_the_users_is_markup(page: Page) -> None:
    assert EVIL in page.text and SITE in page.text  # as text
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "embed", "link")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert sum("type" not in attributes for attributes in scripts) == 3  # two of Bokeh's, and the page's own
    assert all("src" not in attributes for attributes in scripts)


def test_embedded_data_hold_no_markup() -> None:
    text = embedded({"a": "</script ><!--<script>&", "b": [1.5, None]})
    assert not {*"<>&"} & {*text}
    assert json.loads(text) == {"a": "</script ><!--<script>&", "b": [1.5, None]}


def test_bokeh_is_given_no_tex(ledger: pg.GapLedger) -> None:
    """It would fetch what draws it."""
    curves = ledger.traces["refined_elbo"]
    traces = ledger.traces.assign(refined_elbo=curves.copy(data=np.zeros(curves.shape)))
    page = Page(page_of(replace(ledger, traces=traces)))
    for name, key in (("figure-tree", "major_label_overrides"), ("figure-refinement", "label")):
        labels = re.findall(rf'"{key}": (?:\{{"type": "(?:map|value)".*?\}})', json.dumps(page.block(name)["doc"]))
        assert any("$\\u2060$x^2" in label for label in labels)  # with a joiner between
        assert not any("$$" in label for label in labels)


def test_the_policy_allows_the_scripts_of_the_page_alone(page: Page) -> None:
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy
    ours = [
        script
        for script, attributes in zip(page.scripts, (a for t, a in page.tags if t == "script"), strict=True)
        if "type" not in attributes
    ]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in ours]
    assert re.findall("'sha256-([^']*)'", policy) == hashes
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses == ["#datapoints"]


def test_tables_are_accessible(page: Page) -> None:
    headings = [attributes for tag, attributes in page.tags if tag == "th"]
    assert headings and all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in headings)
    labels = {attributes.get("for") for tag, attributes in page.tags if tag == "label"}
    assert "filter" in labels
    names = [attributes.get("id") for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len({*names})
    assert ("html", {"lang": "en"}) in page.tags
    assert any(attributes.get("name") == "viewport" for tag, attributes in page.tags if tag == "meta")


def test_the_same_ledger_makes_the_same_page(ledger: pg.GapLedger, tmp_path: Path) -> None:
    first = ledger.report(tmp_path / "one.html", title="a title").read_bytes()
    again = pg.GapLedger.from_datatree(ledger.to_datatree())
    assert again.report(str(tmp_path / "two.html"), title="a title").read_bytes() == first


def test_a_new_term_appears_by_itself(ledger: pg.GapLedger) -> None:
    looseness = pg.Term(
        id="looseness",
        label="looseness & more",
        parent="inference_gap",
        estimator="IWAE - L[q]",
        direction="lower bound of the gap",
        value=lambda columns: values_of(columns.per_datapoint, "iwae").minus(values_of(columns.per_datapoint, "elbo")),
        cause="one draw of the guide is not enough",
        remedy="take more draws",
        colour="#123456",
    )
    page = Page(page_of(with_gaps(ledger, (*pg.TERMS, looseness))))
    assert page.rows["looseness"][0] == "looseness & more"
    assert "one draw of the guide is not enough" in page.text
    table = page.block("table-data")
    labels = [column["label"] for column in table["columns"]]
    assert labels[: table["gaps"]][-1] == "looseness & more"
    assert table["axes"] == ["approximation_gap", "looseness"]
    tree = json.dumps(page.block("figure-tree"))
    assert "#123456" in tree and "looseness\\u00a0&\\u00a0more" in tree


@pytest.mark.parametrize(("number", "channels"), [(10_000, 1), (10_000, 3), (12_000, 1)])
def test_ten_thousand_datapoints_take_at_most_eight_megabytes(ledger: pg.GapLedger, number: int, channels: int) -> None:
    large = repeated(ledger, number)
    shape = (number, 28, 28) if channels == 1 else (number, channels, 16, 16)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    text = page_of(large, x)
    assert len(text.encode()) <= MOST
    page = Page(text)
    table, pictures = page.block("table-data"), page.block("picture-data")
    assert len(table["datapoints"]) == 10_000 and pictures["kind"] == "image"
    gap = large.per_datapoint["inference_gap"].values
    assert int(np.argmax(gap)) in table["datapoints"]
    if number > 10_000:
        left_out = np.setdiff1d(np.arange(number), table["datapoints"])
        assert gap[left_out].max() <= gap[table["datapoints"]].min()
        assert "10,000 of 12,000 datapoints" in page.text


def test_thumbnails_are_the_images(ledger: pg.GapLedger) -> None:
    number = 300
    x = torch.zeros(number, 1, 8, 6)
    x[torch.arange(number), 0, torch.arange(number) % 8, torch.arange(number) % 6] = 1.0
    pictures = Page(page_of(repeated(ledger, number), x)).block("picture-data")
    assert (pictures["height"], pictures["width"], len(pictures["sheets"])) == (8, 6, 2)
    for datapoint in (0, 7, 299):
        sheet, place = divmod(pictures["place"][datapoint], pictures["per_sheet"])
        image = Image.open(io.BytesIO(base64.b64decode(pictures["sheets"][sheet]))).convert("L")
        row, column = divmod(place, pictures["columns"])
        pixels = np.asarray(image)[8 * row : 8 * row + 8, 6 * column : 6 * column + 6]
        assert np.unravel_index(pixels.argmin(), pixels.shape) == (datapoint % 8, datapoint % 6)  # ink is dark


def test_sequences_rows_and_lists(ledger: pg.GapLedger) -> None:
    number, length = 40, 30
    x = torch.linspace(0, 1, length).expand(number, length)[..., None].clone()
    shown = torch.arange(length) < 20
    pictures = Page(page_of(ledger, (x, shown.expand(number, length)))).block("picture-data")
    assert (pictures["kind"], pictures["points"], pictures["channels"]) == ("sequence", length, 1)
    levels = np.frombuffer(base64.b64decode(pictures["values"]), np.uint8).reshape(number, length)
    assert (levels[:, 20:] == pictures["missing"]).all()
    assert (np.diff(levels[:, :20].astype(int)) > 0).all() and levels[0, 19] == 254

    rows = torch.arange(number * 11.0).reshape(number, 11)
    items = [(row, index) for index, row in enumerate(rows)]
    for given in (rows, rows.numpy(), items):
        pictures = Page(page_of(ledger, given)).block("picture-data")
        assert pictures["kind"] == "row" and pictures["total"] == 11
        assert pictures["values"][2] == [22, 23, 24, 25, 26, 27, 28, 29]


def test_images_of_the_ledger_itself(ledger: pg.GapLedger, page: Page) -> None:
    assert ledger.observed["x"].shape == (40, 16)
    assert page.block("picture-data")["kind"] == "image"
    without = replace(ledger, observed=xr.Dataset())
    assert Page(page_of(without)).block("picture-data") is None
    assert Page(page_of(without, data())).block("picture-data") == page.block("picture-data")


def test_data_of_another_size_are_refused(ledger: pg.GapLedger, tmp_path: Path) -> None:
    with pytest.raises(pg.InputError, match=r"data: has 10 datapoints, and the ledger 40\. Pass the data that"):
        ledger.report(tmp_path / "gaps.html", torch.zeros(10, 16))
    assert not [*tmp_path.iterdir()]


def test_written_whole_or_not_at_all(ledger: pg.GapLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "gaps.html"
    assert ledger.report(path) == path and path.read_text("utf-8").startswith("<!doctype html>")
    before = path.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyrogaps.files.os.replace", full)
    with pytest.raises(pg.InputError, match=r"report .*gaps\.html: cannot be written: No space left on device"):
        ledger.report(path, title="another")
    assert path.read_bytes() == before and len([*path.parent.iterdir()]) == 1


def test_one_datapoint_and_none_that_is_finite(ledger: pg.GapLedger) -> None:
    kept = {name: value for name, value in ledger.provenance.items() if name != "infinite"}
    for place, infinite in ((0, False), (IMPOSSIBLE, True)):
        one = replace(
            ledger,
            per_datapoint=ledger.per_datapoint.isel(datapoint=[place]),
            provenance={**(ledger.provenance if infinite else kept), "num_datapoints": 1},
        )
        page = Page(page_of(with_gaps(one, pg.TERMS)))
        assert len(page.block("table-data")["datapoints"]) == 1
        assert ("no finite bounds" in page.text) == infinite


def test_shared_latents() -> None:
    from tests.shared.hierarchies import Structured, X, hierarchy

    settings = {"refinement": pg.Refinement(num_steps=20), "num_particles": 50, "referee": False, "progress": False}
    ledger = pg.decompose(hierarchy, Structured(), X[:4], shared=pg.Shared(num_draws=2, tolerance=1.0), **settings)  # type: ignore[arg-type]
    page = Page(page_of(ledger))
    assert page.rows["inference_gap"][0] == "local gap" and page.rows["log_evidence"][0] == "log p(x|theta)"
    totals = [number(page.rows[name][4]) for name in ("data_set_gap", "global_gap")]
    np.testing.assert_allclose(totals, ledger.summary().loc[["data_set_gap", "global_gap"], "total"], atol=5.1e-4)
    assert "log p(x|theta)" in [column["label"] for column in page.block("table-data")["columns"]]


def test_columns_have_the_names_of_the_table(ledger: pg.GapLedger) -> None:
    labels = [column.label for column in columns_of(ledger)]
    assert labels[:4] == ["inference gap", "approximation gap", "amortization gap", "log p(x)"]
    assert len({*labels}) == len(labels)
    for label in labels[:-1]:
        assert label in str(ledger.table("full"))


def test_calibration_has_its_section(ledger: pg.GapLedger) -> None:
    from pyrogaps.models.linear_gaussian import LinearGaussian
    from tests.references import WrongEncoder, anisotropic, draws_of

    linear: LinearGaussian = anisotropic(4, 2)
    calibration = pg.calibrate(linear, WrongEncoder(linear), draws_of(linear, 8, seed=0)[0], num_simulated=200)
    page = Page(page_of(ledger, calibration=calibration))
    assert "Calibration of the amortized posterior (WrongEncoder): 200 datapoints" in page.text
    overall = calibration.coverage()["overall"].values
    for share in overall:
        assert f"{100 * float(share):.1f} ±" in page.text
    summary = calibration.summary()
    for name, row in summary.iterrows():
        assert str(name) in page.text and f"{row['shift']:.2f}".replace("-", "\N{MINUS SIGN}") in page.text
    assert page.block("figure-ranks")["target_id"] == "plot-ranks"
