"""The report's page: what it says is escaped, and a real browser opens it from disk and finds nothing amiss."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestdiff_core.evaluation.figures import history_plot, image_grid, noise_level_curves, power_plot
from nestdiff_core.evaluation.page import Figure, Section, cell, flat, render

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def hostile_page() -> str:
    """A page whose every text was written by somebody else, with a table wider than a phone."""
    grid = image_grid(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8))
    wide = [{HOSTILE if i == 0 else f"column {i}": HOSTILE if i == 1 else i / 7 for i in range(14)}] * 3
    section = Section(
        HOSTILE,
        notes=[HOSTILE],
        figures=[Figure(grid, HOSTILE), Figure(grid, "second")],
        abreast=2,
        tables={HOSTILE: wide},
        folded={HOSTILE: flat({HOSTILE: {"a": [1, 2.5]}})},
    )
    return render(HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}, [section, Section("Later", missing=HOSTILE)])


def test_what_others_wrote_is_text() -> None:
    """No element and no attribute comes from a name; template marks in it are not evaluated."""
    html = hostile_page()
    assert "<script" not in html and "<img src=x" not in html and "onerror=alert(1)>" not in html
    assert "&lt;script&gt;" in html and "{{ 7 * 7 }}" in html


def test_cells_are_short_and_never_nan() -> None:
    """Four digits, thousands apart, a dash for what is missing; infinity stays a word."""
    assert [cell(v) for v in (None, True, 12_345, 0.000123456, 123_456.7, [4, 8.0], "x")] == [
        "–",
        "yes",
        "12,345",
        "0.0001235",
        "123,457",
        "4, 8",
        "x",
    ]
    assert cell(float("inf")) == "inf"
    assert flat({"a": {"b": 1, "c": {}}}) == [{"field": "a.b", "value": "1"}, {"field": "a.c", "value": "{}"}]


def test_new_plots_are_small_pngs() -> None:
    """About 600 pixels wide, below 80 kB, the same bytes twice; lines without some number are drawn all the same."""
    lines = [
        {"step": s, "loss_t0.00": 1 / s, "loss_t0.75": 0.1, **({"held_out_loss_t0.00": 2 / s} if s % 2 else {})}
        for s in range(1, 9)
    ]
    plots = [
        lambda: noise_level_curves(lines, title="t"),
        lambda: noise_level_curves([{"step": 1, "loss": 1.0}], title="t"),
        lambda: history_plot({2: [(5, 1.0, 0.1), (1, 2.0, 0.1)], 1: [(3, 9.0, 0.0)]}, {2: 0.5}, title="t", ylabel="fd"),
        lambda: power_plot({"real": np.geomspace(1, 1e-3, 8), "samples": np.geomspace(1, 1e-2, 32)}),
    ]
    for plot in plots:
        assert plot().startswith(b"\x89PNG") and len(plot()) < 80_000 and plot() == plot()


# --- a browser ----------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium, spoken to in its own protocol: a page, what it asks of a network, what it complains of."""

    def __init__(self, folder: Path) -> None:
        from websockets.sync.client import connect

        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port, end = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.is_file() and len(port.read_text().split()) == 2):
            assert time.monotonic() < end and self.process.poll() is None, "chromium did not start"
            time.sleep(0.1)
        number, path = port.read_text().split()
        self.connection = ExitStack()
        self.socket = self.connection.enter_context(connect(f"ws://127.0.0.1:{number}{path}", max_size=None))
        self.events: list[dict[str, Any]] = []
        self.count, self.session = 0, None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := json.loads(self.socket.recv(timeout=60))).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, *, width: int, height: int = 844, dark: bool = False) -> None:
        self.events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.as_uri())
        end = time.monotonic() + 60
        while self.value("document.readyState") != "complete" or not self.value("location.href").startswith("file"):
            assert time.monotonic() < end
            time.sleep(0.1)

    def value(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def said(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium")
    pytest.importorskip("websockets")
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True)])
def test_a_browser_finds_nothing_amiss(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    """From disk, on a desk and on a phone: no request but the file, nothing too wide, every image there, no complaint,
    and nothing that was slipped in has run."""
    file = tmp_path / "report.html"
    file.write_text(hostile_page())
    browser.open(file, width=width, dark=dark)
    check_page(browser, file, width)
    assert browser.value("document.title") == HOSTILE
    assert browser.value("document.scripts.length") == 0
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (ground != "rgb(255, 255, 255)") is dark


def check_page(browser: Browser, file: Path, width: int) -> None:
    asked = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.images.length") >= 2
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    for kind in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
        assert browser.said(kind) == []


def test_the_report_of_an_experiment_in_a_browser(browser: Browser, toy_run: Any) -> None:
    """What the quickstart's job has written is one small file with every section, and nothing amiss on a phone."""
    from nestdiff_core.experiment import Experiment, Ref
    from nestdiff_core.recipes import toy

    file = Experiment(toy(), toy_run.root).artifact(Ref("report")).path / "report.html"
    assert file.stat().st_size < 3e6
    browser.open(file, width=390)
    check_page(browser, file, 390)
    titles = browser.value("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert {"Samples", "Levels", "What each level decides", "Numbers", "Losses", "Spectra"} < set(titles)
    assert (
        browser.value("document.querySelector('#nearest-training-images').parentElement.querySelectorAll('img').length")
        >= 4
    )
