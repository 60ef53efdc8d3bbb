"""The report looks as in the small screenshots of `screenshots/`: on a phone, on a desktop, light, dark, and in print.

After an intended change of the report, rewrite the screenshots, look at them, and commit them:

    UPDATE_SCREENSHOTS=1 .venv/bin/python -m pytest tests/reports/test_screenshots.py

Pages are drawn in the font that comes with Matplotlib, because another font wraps lines elsewhere. Parts of the page
are compared one by one, so that a line more in one does not shift those below it.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.reports.test_run_report import INFO, judged, make_config, make_metrics, make_predictions
from xception_jax.reports.run import write_report

SCREENSHOTS = Path(__file__).parent / "screenshots"
UPDATE = "UPDATE_SCREENSHOTS"
VIEWS = {  # width in pixels, theme of the system, medium
    "phone_light": (390, "light", "screen"),
    "phone_dark": (390, "dark", "screen"),
    "desktop_light": (1280, "light", "screen"),
    "desktop_dark": (1280, "dark", "screen"),
    "print": (718, "dark", "print"),  # the width of A4 between its margins
}
SHRINK = 8  # each pixel of a screenshot is the mean of a square with this side
BLOCK = 6  # side of a block, in pixels of a screenshot
# Without font hinting, parts differ by up to 2.2 of 255 on average and 3.6 in a block. A chart without lines differs by
# 6.9 or more in a block, and a missing chart by 24 or more.
MAX_MEAN, MAX_BLOCK, MAX_STRETCH = 4.0, 6.0, 0.05

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FACES = {"DejaVuSans": "page", "DejaVuSans-Bold": "page; font-weight: bold", "DejaVuSansMono": "mono"}
PARTS = "[...document.querySelectorAll('body > header, body > section')]"

Parts = dict[str, np.ndarray]  # heading -> float32 [h, w, 3]


def fonts() -> str:
    data = {file: base64.b64encode((FONTS / f"{file}.ttf").read_bytes()).decode() for file in FACES}
    faces = [f"@font-face {{ font-family: {n}; src: url(data:font/ttf;base64,{data[f]}) }}" for f, n in FACES.items()]
    return "\n".join([*faces, "* { font-family: page !important }", "code, pre { font-family: mono !important }"])


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    predictions = make_predictions(n=60)
    colors = np.array([[230, 159, 0], [0, 114, 178], [204, 121, 167]], np.uint8)
    halves = np.arange(28)[:, None] // 14
    images = {int(i): np.broadcast_to(colors[(halves + i) % 3], (28, 28, 3)) for i in predictions.index}
    maps = {i: image[::-1] for i, image in list(images.items())[::5]}
    return write_report(
        tmp_path_factory.mktemp("report"),
        config=make_config(),
        metrics=make_metrics(),
        info=INFO | {"steps_per_epoch": 40.0},
        judged=dataclasses.replace(judged(predictions, images), heat_maps=maps),
        class_names=[f"a class with a long name {i}" for i in range(10)],
    )


def shoot(show, path: Path, view: str, change: str = "") -> Parts:
    """Draws the page, after running `change` in it, and returns its parts at an eighth of their size."""
    width, scheme, medium = VIEWS[view]
    page = show(path, width, color_scheme=scheme, bypass_csp=True)  # the page allows no fonts from elsewhere
    page.emulate_media(media=medium)
    page.add_style_tag(content=fonts())
    page.evaluate(f"(async () => {{ {change}; await document.fonts.ready; dispatchEvent(new Event('resize')) }})()")
    assert page.evaluate("[...document.fonts].map(font => font.status)") == ["loaded"] * len(FACES)
    headings = page.evaluate(f"{PARTS}.map(part => part.querySelector('h1, h2')?.textContent ?? 'Result')")
    tops = page.evaluate(f"{PARTS}.map(part => part.getBoundingClientRect().top)")
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    parts = {}
    for heading, (top, bottom) in zip(headings, itertools.pairwise([*tops, image.height]), strict=True):
        size = round(image.width / SHRINK), round((bottom - top) / SHRINK)
        small = image.resize(size, Image.Resampling.BOX, (0, top, image.width, bottom))
        parts[heading] = np.asarray(small, np.float32)
    return parts


def save(parts: Parts, path: Path) -> None:
    """Writes parts below each other, with their heights in the metadata of the PNG."""
    heights = PngInfo()
    heights.add_text("parts", json.dumps({heading: len(part) for heading, part in parts.items()}))
    levels = np.round(np.concatenate(list(parts.values())) * 63 / 255)  # 6 bits take half as much space as 8
    pixels = np.round(levels * 255 / 63).astype(np.uint8)
    Image.fromarray(pixels).save(path, optimize=True, pnginfo=heights)


def load(path: Path) -> Parts:
    with Image.open(path) as image:
        heights, pixels = json.loads(image.text["parts"]), np.asarray(image.convert("RGB"), np.float32)
    ends = np.cumsum(list(heights.values()))
    return dict(zip(heights, np.split(pixels, ends[:-1]), strict=True))


def in_blocks(part: np.ndarray) -> np.ndarray:
    height, width = (-(-side // BLOCK) for side in part.shape[:2])
    padding = [(0, height * BLOCK - part.shape[0]), (0, width * BLOCK - part.shape[1]), (0, 0)]
    return np.pad(part, padding).reshape(height, BLOCK, width, BLOCK, 3).mean(axis=(1, 3))


def differences(parts: Parts, reference: Parts) -> list[str]:
    """Returns what differs by more than the tolerance, one line for each part."""
    if list(parts) != list(reference):
        return [f"the parts are {list(parts)} instead of {list(reference)}"]
    found = []
    for heading, part in parts.items():
        expected = reference[heading]
        (height, width), (rows, columns) = part.shape[:2], expected.shape[:2]
        if width != columns or abs(height - rows) > max(1, MAX_STRETCH * rows):
            found.append(
                f"{heading}: {SHRINK * width} x {SHRINK * height} pixels, not {SHRINK * columns} x {SHRINK * rows}"
            )
            continue
        resized = Image.fromarray(part.astype(np.uint8)).resize((columns, rows), Image.Resampling.BILINEAR)
        difference = np.asarray(resized, np.float32) - expected
        mean, block = np.abs(difference).mean(), np.abs(in_blocks(difference)).max()
        if mean > MAX_MEAN or block > MAX_BLOCK:
            found.append(f"{heading}: differs by {mean:.1f} of 255 on average, and by {block:.1f} in a block")
    return found


@pytest.mark.parametrize("view", VIEWS)
def test_the_report_looks_as_in_its_screenshot(show, report, view, tmp_path):
    parts = shoot(show, report, view)
    path = SCREENSHOTS / f"{view}.png"
    if os.environ.get(UPDATE):
        path.parent.mkdir(exist_ok=True)
        save(parts, path)
    save(parts, tmp_path / path.name)
    found = "\n".join(differences(parts, load(path)))
    assert not found, f"{found}\nCompare {tmp_path / path.name} with {path}. If it is meant: {UPDATE}=1 rewrites it."


def style(rules: str) -> str:
    return f"document.head.insertAdjacentHTML('beforeend', '<style>{rules}</style>')"


@pytest.mark.parametrize(
    ("view", "part", "change"),
    [
        ("phone_light", "Training", "document.querySelectorAll('.figures figure')[3].remove()"),
        ("desktop_dark", "Training", style("figure:first-child svg { visibility: hidden }")),
        ("print", "Training", style("figure:first-child svg path { visibility: hidden }")),
        ("phone_dark", "Mistakes", style(".scroll, figure { overflow: visible }")),
        ("desktop_light", "Judgement", style(".figures { grid-template-columns: 1fr }")),
        ("print", "Mistakes", style(".matrix td { background: none !important }")),
        ("desktop_dark", "first run", style("@media (prefers-color-scheme: dark) { :root { --ink: #1c1c1c } }")),
        ("phone_dark", "Judgement", style(":root { --figure-quiet: #555; --figure-grid: #e6e6e6 }")),
    ],
    ids=["no chart", "invisible chart", "no lines", "overflow", "one column", "no colours", "dark text", "dark labels"],
)
def test_a_page_that_is_spoiled_differs(show, report, view, part, change):
    found = differences(shoot(show, report, view, change), load(SCREENSHOTS / f"{view}.png"))
    assert [line for line in found if line.startswith(f"{part}:")], found


def test_a_page_without_its_dark_theme_differs(show, report):
    expected = load(SCREENSHOTS / "phone_dark.png")
    assert len(differences(shoot(show, report, "phone_light"), expected)) == len(expected)


def test_the_screenshots_are_small():
    assert {path.stem for path in SCREENSHOTS.iterdir()} == set(VIEWS)
    assert sum(path.stat().st_size for path in SCREENSHOTS.iterdir()) < 150_000
