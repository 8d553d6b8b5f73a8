"""A report's page in headless Chromium: figures, hovering, playing, sorting, hiding, phone and desktop, light
and dark, and while a run writes; no error, no request, no violation that axe finds."""

import io
import json
import shutil
import tempfile
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import HOSTILE, STEPS, log_rows, make_probe, make_run, serving
from shards_by_hand import write_shards

from vidssl.report import watch
from vidssl.report.contents import make_contents
from vidssl.report.data_sets import make_data_contents
from vidssl.report.page import MAX_BYTES, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
FLAGS += ("disable-background-networking", "disable-component-update", "disable-dev-shm-usage")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
FRAMES = 4
PATIENCE_S = 300


def sprite() -> str:
    """Frames of four greys side by side."""
    grey = np.repeat(np.arange(FRAMES, dtype=np.uint8) * 60, 8)
    out = io.BytesIO()
    Image.fromarray(np.broadcast_to(grey, (8, len(grey)))).save(out, "PNG")
    return f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    runs = [make_run(root / "runs" / "healthy"), make_run(root / "runs" / "collapsed", collapse_at=20)]
    for run, right in zip(runs, ({"none": 27, "random_init": 12, "shuffled": 20}, {"none": 11}), strict=True):
        make_probe(run / "probe", str(run), right)
    contents = make_contents(runs, ["vidssl", "report", HOSTILE])
    strip = {"label": "clip", "src": sprite(), "width": 8, "height": 8}
    item = {"title": f"clip of {HOSTILE}", "about": "", "frames": FRAMES, "fps": 20, "rows": [strip, strip]}
    contents["pictures"] = [{"id": "masks", "title": "Masks", "about": "", "items": [item]}]
    assert write_page(root / "report.html", contents) < MAX_BYTES
    return root / "report.html"


@pytest.fixture(scope="module")
def data_page(tmp_path_factory) -> Path:
    """Of two data sets, the second with a rejected file and a class less."""
    root = tmp_path_factory.mktemp("data_report")
    facts = {"codec": "h264", "fps": 24.0, "width": 64, "height": 48}
    samples = {
        f"{i}": (b"x" * (9 + i), {**facts, "frames": 24 * i, "duration": float(i), "labels": {"move": i % 2}})
        for i in range(1, 9)
    }
    write_shards(root / "train", samples, {"move": ["clap", HOSTILE]})
    fewer = {key: sample for key, sample in samples.items() if int(key) % 2 == 0}
    rejected = [{"path": f"{HOSTILE}.mp4", "reason": "not_a_video", "detail": "text"}]
    write_shards(root / "test", fewer, {"move": ["clap", HOSTILE]}, rejected)
    contents = make_data_contents([root], ["vidssl", "report"])
    strip = {"label": "clap", "note": "1.mp4", "src": sprite(), "width": 8, "height": 8, "frames": FRAMES}
    item = {"title": "train", "about": "", "frames": FRAMES, "fps": 20, "rows": [strip] * 3, "wide": True}
    contents["pictures"] = [{"id": "clips", "title": "Clips", "about": "", "items": [item]}]
    write_page(root / "data.html", contents)
    return root / "data.html"


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        # A loaded machine parses the library for minutes
        driver.command_executor.client_config.timeout = PATIENCE_S
        driver.set_page_load_timeout(PATIENCE_S)
        driver.set_script_timeout(PATIENCE_S)
        try:
            yield driver
        finally:
            driver.quit()


def show(browser, page: Path | str, width: int, scheme: str) -> None:
    """Opens the page, a file or an address, as a screen of this width shows it."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page if isinstance(page, str) else page.as_uri())


def until(browser, script: str):
    """The value of a script when it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, PATIENCE_S, poll_frequency=0.05).until(lambda b: b.execute_script(script))


def problems(browser, server: str = "file:") -> list[str]:
    """Messages of the console, and addresses of others than the server that were asked for."""
    found = [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if not url.startswith((server, "data:", "blob:", "chrome:", "chrome-untrusted:")):
                found.append(url)
    return found


CHART = "document.querySelector('[data-panel=\"{}\"] .chart')"


def test_a_page_shows_what_the_files_say(browser, page):
    show(browser, page, 1280, "light")
    loss = CHART.format("Loss")
    until(browser, f"const c = {loss}; c.scrollIntoView(); return c.data && c.data.length === 2")
    last = json.loads((page.parent / "runs/healthy/log.jsonl").read_text().splitlines()[-1])
    points = browser.execute_script(f"const [t] = {loss}.data; return [t.x.length, t.y.at(-1), t.name]")
    assert points == [STEPS, pytest.approx(last["loss"], rel=1e-5), "healthy"]
    # hovered by the keyboard, as the mouse would
    browser.execute_script(
        f"const c = {loss}; c.focus(); for (let i = 0; i < {STEPS}; i++)"
        "c.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    )
    # labels follow the keys with a delay, and at the last point a further key stays there
    text = until(
        browser,
        f"const c = {loss};"
        "c.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));"
        f"const t = c.querySelector('.hoverlayer').textContent; return t.includes('{last['loss']:.3g}') && t",
    )
    assert "healthy" in text
    spans = CHART.format("Rank of the features")
    until(
        browser, f"const c = {spans}; c.scrollIntoView(); return c.data && c._fullLayout.shapes.length === 1"
    )

    cell = "[...document.querySelectorAll('#probes tbody tr')].map(r => r.children[{}].textContent)"
    heads = browser.execute_script(
        "return [...document.querySelectorAll('#probes thead th')].map(h => h.textContent)"
    )
    column = heads.index("value")
    shown = browser.execute_script(f"return {cell.format(column)}")
    report = json.loads((page.parent / "runs/healthy/probe/probe.json").read_text())
    assert f"{report['results'][0]['value']:.1f}" in shown and len(shown) == 4
    sort = f"document.querySelectorAll('#probes thead button')[{column}].click()"
    browser.execute_script(sort)
    assert browser.execute_script(f"return {cell.format(column)}") == ["90.0", "66.7", "40.0", "36.7"]
    browser.execute_script(sort)
    assert browser.execute_script(f"return {cell.format(column)}") == ["36.7", "40.0", "66.7", "90.0"]
    browser.execute_script("document.querySelector('#runs input').click()")
    assert browser.execute_script(f"return {cell.format(column)}") == ["36.7"]
    assert browser.execute_script(f"return {loss}.data.length") == 1
    assert problems(browser) == []


def test_a_clip_plays_and_stops(browser, page):
    show(browser, page, 1280, "light")
    frame = "document.querySelector('.player output').textContent"
    button = "document.querySelector('.player button')"
    browser.execute_script(f"{button}.scrollIntoView()")
    until(browser, f"return {frame} === '3 / {FRAMES}'")
    browser.execute_script(f"{button}.click()")
    assert browser.execute_script(f"return {button}.textContent") == "Play"
    stopped = browser.execute_script(f"return {frame}")
    place = browser.execute_script("return document.querySelector('.clip').style.backgroundPositionX")
    assert float(place.rstrip("%")) == pytest.approx(100 * (int(stopped[0]) - 1) / (FRAMES - 1), abs=0.01)
    browser.execute_script(f"{button}.click()")
    until(browser, f"return {frame} !== '{stopped}'")
    assert (
        browser.execute_script("return document.querySelector('.player h3').textContent")
        == f"clip of {HOSTILE}"
    )


@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_phone_and_desktop_fit_and_are_accessible(browser, page, width, scheme):
    from axe_core_python.selenium import Axe

    show(browser, page, width, scheme)
    until(browser, f"const c = {CHART.format('Loss')}; c.scrollIntoView(); return c.data")
    assert browser.execute_script("return document.documentElement.dataset.theme") == scheme
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    found = Axe().run(browser)["violations"]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in found] == []
    assert problems(browser) == []


def test_a_page_of_data_sets_shows_their_classes_on_a_phone(browser, data_page):
    from axe_core_python.selenium import Axe

    show(browser, data_page, 390, "dark")
    card = "document.querySelector('[data-labels=move]')"
    counts = until(
        browser,
        f"const c = {card}.querySelector('.chart'); c.scrollIntoView();"
        "return c.data && c.data.map(t => [t.name, ...t.y])",
    )
    assert counts == [["train", 4, 4], ["test", 4, 0]]
    browser.execute_script(f"{card}.querySelector('details').open = true")
    rows = (
        f"return [...{card}.querySelectorAll('tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    assert until(browser, rows) == [["clap", "4", "4", "8"], [HOSTILE, "4", "0", "4"]]
    reasons = browser.execute_script("return document.querySelector('#rejected').textContent")
    assert "not_a_video" in reasons and f"{HOSTILE}.mp4" in reasons
    until(browser, f"return document.querySelector('.player output').textContent !== '1 / {FRAMES}'")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert [v["id"] for v in Axe().run(browser)["violations"]] == []
    assert problems(browser) == []


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """(address, folders) of a page of two runs that is served while they write."""
    runs = [make_run(tmp_path / "runs" / name) for name in ("first", "second")]
    monkeypatch.setattr(watch, "ASK_EVERY_S", 0.1)
    live = watch.LiveContents(runs, lambda _: make_contents(runs, ["vidssl", "report", "--watch"]))
    with serving(live) as address:
        yield f"{address}/", runs


READING = """
const card = (title) => document.querySelector(`[data-panel="${title}"]`);
const features = document.querySelector('#features');
return {
  step: card('Loss').querySelector('.chart').data.map((t) => t.x.at(-1)),
  zoom: card('Loss').querySelector('.chart')._fullLayout.xaxis.range,
  values: [...card('Loss').querySelectorAll('tbody tr')].map((r) => r.lastChild.textContent),
  column: card('Spread within a clip').querySelector('select').value,
  log: card('Clips a second').querySelector('button').getAttribute('aria-pressed'),
  rules: [...document.querySelectorAll('#summary details')].map((d) => d.open),
  runs: [...document.querySelectorAll('#runs input')].map((i) => i.checked),
  focus: document.activeElement.dataset.run,
  place: Math.round(features.getBoundingClientRect().top),
  opened: window.openedOnce,
};
"""


def test_a_watched_page_follows_its_run_and_keeps_what_the_reader_does(browser, watched):
    address, (run, _) = watched
    show(browser, address, 1280, "light")
    loss = CHART.format("Loss")
    until(browser, f"const c = {loss}; c.scrollIntoView(); return c.data && c.data.length === 2")
    browser.execute_script(
        """
        window.openedOnce = true;
        const card = (title) => document.querySelector(`[data-panel="${title}"]`);
        Plotly.relayout(card('Loss').querySelector('.chart'), {'xaxis.range': [5, 15]});
        card('Loss').querySelector('details').open = true;
        const select = card('Spread within a clip').querySelector('select');
        select.value = 'feature_std_tokens';
        select.dispatchEvent(new Event('change'));
        card('Clips a second').querySelector('button').click();
        document.querySelectorAll('#summary details')[2].open = true;
        const second = document.querySelectorAll('#runs input')[1];
        second.click();
        second.focus({preventScroll: true});
        document.querySelector('#features').scrollIntoView({behavior: 'instant'});
        """
    )
    before = until(browser, READING.replace("return", "const now =") + "return now.values.length && now")
    assert before["step"] == [STEPS] and before["rules"].index(True) == 2

    # A new column is a chart more above what is read, and the summary has other figures
    rows = [row | {"online_probe_knn": 50.0} for row in log_rows(STEPS + 5)[STEPS:]]
    with open(run / "log.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    until(browser, f"return {loss}.data[0].x.at(-1) === {STEPS + 5} && {CHART.format('Online probe')}")
    after = browser.execute_script(READING)
    assert float(after["values"][0]) == pytest.approx(rows[-1]["loss"], rel=1e-3)
    kept = [name for name in before if name not in ("step", "values")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert problems(browser, address) == []
