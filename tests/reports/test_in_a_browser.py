"""The report in Chromium, if it is installed: layout, themes, and what the script does."""

from __future__ import annotations

import dataclasses
import shutil
import time

import pytest

from tests.reports.test_run_report import INFO, judged, make_config, make_images, make_metrics, make_predictions
from tests.study.simulated import small_study, write_simulated
from xception_jax.reports.run import Live, mark_stopped, write_report
from xception_jax.study.report import write_study_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

DARK = "rgb(22, 24, 27)"
# Every element with a text of its own: its height on the screen. The text of a figure is scaled with the figure.
SIZES = """() => [...document.querySelectorAll('body *')]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length)
  .filter(e => !['SCRIPT', 'STYLE'].includes(e.tagName))
  .map(e => {
    const svg = e.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return [parseFloat(getComputedStyle(e).fontSize) * scale, e.tagName + ' ' + e.textContent.slice(0, 30)];
  })"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def write(directory, **parts):
    predictions = dataclasses.replace(make_predictions(n=300), group=None)
    names = [f"a class with a long name {i}" for i in range(10)]
    info = INFO | {"steps_per_epoch": 40.0}
    shown = judged(predictions, make_images(predictions))
    return write_report(
        directory, config=make_config(), metrics=make_metrics(), info=info, judged=shown, class_names=names, **parts
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def study_report(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_simulated(root, small_study())
    write_study_report(root)
    return root / "report.html"


@pytest.fixture
def show(browser):
    """Returns a function that opens a file and fails the test at the end if the page reports an error."""
    contexts, errors = [], []

    def open_page(path, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.mark.parametrize("name", ["report", "study_report"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_its_text_can_be_read(show, request, name, width):
    page = show(request.getfixturevalue(name), width)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(SIZES)
    assert len(sizes) > 100
    assert [entry for entry in sizes if entry[0] < 11.99] == []
    if width == 390:  # figures are one above the other, and a wide table scrolls and says so
        lefts = page.evaluate(
            "[...document.querySelectorAll('.figures figure')].map(e => e.getBoundingClientRect().left)"
        )
        assert len(set(lefts)) == 1
        wide = page.locator(".scroll.overflows").first
        assert wide.evaluate("e => getComputedStyle(e, '::after').content").startswith('"wider than the page')
        assert wide.evaluate("e => { e.scrollLeft = 50; return e.scrollLeft; }") > 0


@pytest.mark.parametrize("name", ["report", "study_report"])
def test_the_theme_is_that_of_the_system(show, request, name):
    path = request.getfixturevalue(name)
    background = "getComputedStyle(document.body).backgroundColor"
    line = "getComputedStyle(document.querySelector('svg text[style*=figure-quiet]')).fill"
    light, dark = (show(path, color_scheme=scheme) for scheme in ("light", "dark"))
    assert light.evaluate(background) == "rgb(255, 255, 255)"
    assert dark.evaluate(background) == DARK
    assert light.evaluate(line) != dark.evaluate(line)
    dark.emulate_media(media="print")
    assert dark.evaluate(background) == "rgb(255, 255, 255)"


def test_a_click_on_a_cell_shows_its_images(show, report):
    page = show(report)
    button = page.locator(".matrix td.off button").first
    panel = page.locator("#cell")
    assert panel.is_hidden()
    button.click()
    assert panel.is_visible()
    assert panel.locator("h3").text_content() == button.get_attribute("aria-label")
    images = panel.locator("img")
    assert images.count() >= 1
    assert images.first.evaluate("e => e.naturalWidth") == 28
    assert "photos/" in panel.text_content()
    button.click()
    assert panel.is_hidden()


def test_a_figure_shows_the_values_under_the_pointer(show, report):
    page = show(report)
    figure = page.locator("figure", has_text="Loss")
    svg = figure.locator("svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    # The axes begin at 17 % of the width and take 80 %; the steps go from 10 to 300.
    page.mouse.move(box["x"] + (0.17 + 0.8 * 0.655) * box["width"], box["y"] + 0.5 * box["height"])
    tip = figure.locator(".tip")
    assert tip.is_visible()
    assert tip.text_content().startswith("step 200, epoch 5")
    assert "development 1" in tip.text_content()
    assert "development, Polyak average 0.75" in tip.text_content()
    page.mouse.move(1, 1)
    assert tip.is_hidden()


def test_a_live_report_reloads_itself_until_the_run_has_finished(show, tmp_path, browser):
    path = write(tmp_path, live=Live(written=time.time() - 600, seconds=60.0))
    context = browser.new_context()
    page = context.new_page()
    page.clock.install()
    page.goto(path.as_uri())
    assert "Written 10 min ago. The next report is overdue" in page.locator("#age").text_content()
    write(tmp_path)
    page.clock.run_for(31_000)
    page.wait_for_function("!document.getElementById('live')", timeout=10_000)
    assert not page.locator("#stopped").count()
    page.evaluate("window.same = true")
    page.clock.run_for(100_000)
    assert page.evaluate("window.same")
    context.close()


def test_the_live_report_of_a_run_that_stopped_says_so_and_reloads_no_more(show, tmp_path, browser):
    path = write(tmp_path, live=Live(written=time.time(), seconds=60.0))
    context = browser.new_context()
    page = context.new_page()
    page.clock.install()
    page.goto(path.as_uri())
    mark_stopped(tmp_path)
    page.clock.run_for(31_000)
    page.wait_for_selector("#stopped", timeout=10_000)
    assert "run the same command to resume" in page.locator("#stopped").text_content()
    assert not page.locator("#live").count()
    assert 'http-equiv="refresh"' not in path.read_text()
    page.evaluate("window.same = true")
    page.clock.run_for(3_600_000)
    assert page.evaluate("window.same")
    assert "overdue" not in page.locator("body").inner_text()
    context.close()


def test_the_report_of_a_finished_run_is_not_marked_as_stopped(tmp_path):
    path = write(tmp_path)
    before = path.read_bytes()
    mark_stopped(tmp_path)
    assert path.read_bytes() == before
    mark_stopped(tmp_path / "without a report")
