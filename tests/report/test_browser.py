"""The page in a real browser, opened as a file: sorting, filtering, pointing at datapoints, and nothing loaded.

Skipped where there is no Chromium with its driver, as in Debian's packages chromium and chromium-driver.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyrogaps as pg
from tests.report.ledgers import EVIL, IMPOSSIBLE, repeated

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,  # more than 5 s
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
    pytest.mark.filterwarnings("default::ResourceWarning"),  # selenium's sockets
]
DESKTOP, PHONE = (1280, 900), (390, 844)
# The text of all tooltips that are seen, wherever Bokeh keeps them.
TOOLTIPS = """
const found = [];
const walk = (root) => root.querySelectorAll("*").forEach((element) => {
  if (element.dataset?.tip !== undefined && element.getBoundingClientRect().width) found.push(element.innerText);
  if (element.shadowRoot) walk(element.shadowRoot);
});
walk(document);
return found;
"""
# Where on the screen the datapoint of a row of the scatter lies.
PLACE = """
const documents = Bokeh.documents.filter((doc) => doc.get_model_by_name(arguments[0]));
const model = documents[documents.length - 1].get_model_by_name("scatter");
const view = Object.values(Bokeh.index.roots ?? Bokeh.index).find((view) => view.model === model);
const source = documents[documents.length - 1].get_model_by_name(arguments[0]);
const box = view.el.getBoundingClientRect();
const [x, y] = [source.data.x[arguments[1]], source.data.y[arguments[1]]];
return [box.left + view.frame.x_scale.compute(x), box.top + view.frame.y_scale.compute(y)];
"""


class Browser:
    """Chromium, with what it wrote to its console and what it asked the network for."""

    def __init__(self, size: tuple[int, int], *, dark: bool) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            f"--window-size={size[0]},{size[1]}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def open(self, path: Path) -> "Browser":
        self.driver.get(path.as_uri())
        self.wait("return document.body.dataset.drawn !== undefined")
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: Any) -> Any:
        end = time.monotonic() + 20
        while not (value := self.run(script, *arguments)) and time.monotonic() < end:
            time.sleep(0.02)
        assert value, script
        return value

    def column(self, label: str) -> list[float]:
        """The shown values of a column of the table, from its first row down."""
        texts = self.run(
            """const place = [...document.querySelectorAll("#rows thead th")].findIndex((th) => th.innerText.replace(
              /[\\n\\u25b2\\u25bc]/g, " ").trim() === arguments[0]);
            return [...document.querySelectorAll("#rows tbody tr")].map((row) => row.cells[place].innerText);""",
            label,
        )
        spelled = {"\N{INFINITY}": "inf", "–": "nan", "\N{MINUS SIGN}": "-", "\N{WARNING SIGN}": ""}
        for sign, text in spelled.items():
            texts = [shown.replace(sign, text) for shown in texts]
        return [float(shown.split()[0]) for shown in texts]

    def sorted_by(self) -> list[tuple[str, str]]:
        return [
            (label, state)
            for label, state in self.run(
                """return [...document.querySelectorAll("#rows thead th[aria-sort]")].map((th) =>
              [th.dataset.label, th.getAttribute("aria-sort")]);"""
            )
            if state != "none"
        ]

    def status(self) -> str:
        return str(self.run("return document.getElementById('status').innerText"))

    def type(self, text: str) -> None:
        self.run("document.getElementById('filter').value = ''")
        self.driver.find_element("id", "filter").send_keys(text)

    def point(self, source: str, row: int) -> list[str]:
        """Move the mouse onto a point of the scatter; the tooltips that show."""
        self.run("document.getElementById('plot-scatter').scrollIntoView({block: 'center', behavior: 'instant'})")
        x, y = self.run(PLACE, source, row)
        for step in (-2, 0):
            event = {"type": "mouseMoved", "x": x + step, "y": y}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
        return list(self.wait(f"const shown = (() => {{{TOOLTIPS}}})(); return shown.length ? shown : null"))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]

    def requests(self) -> list[str]:
        """Addresses that were asked for, but for the page's own and what it holds itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert asked
        return [address for address in asked if not address.startswith(("file:", "data:", "blob:"))]


@pytest.fixture(scope="module")
def browser() -> Iterator[Callable[..., Browser]]:
    started: dict[Any, Browser] = {}

    def start(size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> Browser:
        if (size, dark) not in started:
            started[size, dark] = Browser(size, dark=dark)
        return started[size, dark]

    yield start
    for each in started.values():
        each.driver.quit()


@pytest.fixture(scope="module")
def path(ledger: pg.GapLedger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ledger.report(tmp_path_factory.mktemp("page") / "gaps.html", title=EVIL)


def test_opened_without_complaints_and_without_network(browser: Callable[..., Browser], path: Path) -> None:
    for size in (DESKTOP, PHONE):
        shown = browser(size).open(path)
        assert shown.driver.title == EVIL
        assert shown.run("return document.documentElement.scrollWidth") <= size[0]
        assert shown.complaints() == [] and shown.requests() == []
        drawn = (
            "return [...document.querySelectorAll('.plot')].every((plot) => plot.firstElementChild.clientHeight > 200)"
        )
        assert shown.run(drawn)


def test_sorting(browser: Callable[..., Browser], path: Path, ledger: pg.GapLedger) -> None:
    shown = browser().open(path)
    gaps = ledger.per_datapoint["inference_gap"].values
    finite = np.isfinite(gaps)
    assert shown.sorted_by() == [("inference gap", "descending")]
    values = np.array(shown.column("inference gap"))
    np.testing.assert_allclose(values[np.isfinite(values)], np.sort(gaps[finite])[::-1], atol=6e-4)
    heading = shown.driver.find_element("css selector", "#rows th[data-label='L[q]'] button")
    for order, sign in (("descending", -1), ("ascending", 1)):
        heading.send_keys("\n")  # by keyboard
        assert shown.sorted_by() == [("L[q]", order)]
        values = np.array(shown.column("L[q]"))
        elbo = ledger.per_datapoint["elbo"].values
        np.testing.assert_allclose(values, sign * np.sort(sign * elbo), atol=6e-3)
    shown.driver.find_element("css selector", "#rows th[data-label='datapoint'] button").click()
    assert shown.column("datapoint") == [*range(len(gaps))]
    assert shown.complaints() == []


def test_filtering(browser: Callable[..., Browser], path: Path, ledger: pg.GapLedger) -> None:
    shown = browser().open(path)
    gap = np.round(ledger.per_datapoint["inference_gap"].values, 4)
    number = len(gap)
    bound = float(np.round(np.median(gap[np.isfinite(gap)]), 2))
    expected = {
        "7": 1,
        "3-6": 4,
        "no finite": 1,
        "unreliable": int((~ledger.per_datapoint["log_evidence_reliable"].values).sum()),
        f"inference gap > {bound}": int((gap > bound).sum()),
        "nothing like this": 0,
    }
    for text, count in expected.items():
        shown.type(text)
        rows = shown.run("return document.querySelectorAll('#rows tbody tr').length")
        assert rows == count, text
        words = f"of {count}, filtered from {number}" if count else "No datapoint fits the filter"
        assert words in shown.status() or count == number
    shown.type("no such column > 3")
    assert "No column has this name" in shown.status()
    shown.run("document.getElementById('filter').value = ''")
    shown.driver.find_element("css selector", "#flags option[value=serious]").click()
    assert IMPOSSIBLE in shown.column("datapoint")
    drawn = shown.run(
        "return ['trusted', 'flagged'].map((name) => Bokeh.documents.findLast((doc) => doc.get_model_by_name(name))"
        ".get_model_by_name(name).data.x.length)"
    )
    assert drawn == [0, len(shown.column("datapoint")) - 1]  # the impossible one has no place
    assert shown.complaints() == []


def test_pointing_at_a_datapoint_shows_it(browser: Callable[..., Browser], path: Path, ledger: pg.GapLedger) -> None:
    shown = browser().open(path)
    tips = "\n".join(shown.point("trusted", 0))
    (place,) = {int(line.split()[1]) for line in tips.splitlines() if line.startswith("datapoint")} or {-1}
    gap = float(ledger.per_datapoint["inference_gap"].values[place])
    assert f"{gap:.3f}" in tips and f"datapoint {place}" in tips
    walk = TOOLTIPS.replace("element.innerText", "element.querySelector('.picture').style.background")
    assert "blob:" in shown.run(walk)[0]  # its thumbnail
    assert shown.complaints() == []


def test_choosing_a_datapoint_in_the_table(browser: Callable[..., Browser], path: Path) -> None:
    shown = browser().open(path)
    button = shown.driver.find_element("css selector", "#rows tbody tr:nth-child(4) th button")
    name = button.text
    button.send_keys("\n")
    assert f"Datapoint {name}" in shown.run("return document.getElementById('chosen').innerText")
    chosen = (
        "return Bokeh.documents.findLast((doc) => doc.get_model_by_name('chosen')).get_model_by_name('chosen').data.x"
    )
    assert len(shown.run(chosen)) == 1


def test_dark_and_back(browser: Callable[..., Browser], path: Path) -> None:
    shown = browser(dark=True).open(path)
    ink = "return getComputedStyle(document.body).color"
    dark = shown.run(ink)
    plot = "return Bokeh.documents.findLast((doc) => doc.get_model_by_name('scatter')).get_model_by_name('scatter')"
    assert shown.run(f"{plot}.background_fill_color") == "#15181c"
    feature = [{"name": "prefers-color-scheme", "value": "light"}]
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    shown.wait("return document.body.dataset.drawn === '2'")
    assert shown.run(ink) != dark and shown.run(f"{plot}.background_fill_color") == "#ffffff"
    assert shown.complaints() == []


def test_ten_thousand_datapoints_are_sorted_and_filtered_at_once(
    browser: Callable[..., Browser], ledger: pg.GapLedger, tmp_path: Path
) -> None:
    large, number = repeated(ledger, 10_000), 10_000
    x = torch.rand(number, 16, 16, generator=torch.Generator().manual_seed(0))
    shown = browser().open(large.report(tmp_path / "large.html", x))
    assert shown.status() == "Rows 1 to 50 of 10,000"
    shown.run("document.getElementById('last').click()")
    assert shown.status() == "Rows 9,951 to 10,000 of 10,000"
    seconds = shown.run(
        """const start = performance.now();
        document.querySelector("#rows th[data-label='L[q]'] button").click();
        document.getElementById("filter").value = "0-4999";
        document.getElementById("filter").dispatchEvent(new Event("input"));
        return (performance.now() - start) / 1000;"""
    )
    assert shown.status() == "Rows 1 to 50 of 5,000, filtered from 10,000"
    elbo = np.sort(large.per_datapoint["elbo"].values[:5000])[::-1]
    np.testing.assert_allclose(shown.column("L[q]"), elbo[:50], atol=6e-3)
    assert seconds < 5  # about 0.1 s alone on a core
    assert shown.complaints() == [] and shown.requests() == []
