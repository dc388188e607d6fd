"""The report as a browser shows it: pictures decoded, nothing fetched, nothing cut off, dark text on white."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from hf_rotational.monitor.report import SECTIONS, write_report
from hf_rotational.monitor.runs import read_run
from tests.monitored import write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
WIDE, NARROW = 1400, 500  # a desktop browser's window cannot be narrower

# What the page looks like from inside. It has no scripts of its own: the test puts this one into a copy.
PROBE = """<script>addEventListener("load", () => {
  const box = element => element.getBoundingClientRect();
  const images = [...document.images];
  document.title = JSON.stringify({
    decoded: images.filter(image => image.complete && image.naturalWidth > 0).length,
    lefts: images.map(image => Math.round(box(image).left)),
    widths: images.map(image => Math.round(box(image).width)),
    content: document.documentElement.scrollWidth, window: innerWidth,
    fetched: performance.getEntriesByType("resource").map(entry => entry.name).filter(url => !url.startsWith("data:")),
    color: getComputedStyle(document.body).color, background: getComputedStyle(document.body).backgroundColor,
    font: Math.min(...[...document.querySelectorAll("p, td, th")].map(e => parseFloat(getComputedStyle(e).fontSize))),
  });
})</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on the PATH")


def browse(page: Path, folder: Path, *options: str, width: int) -> str:
    """What a headless browser that cannot reach any host prints about the page."""
    command = [
        str(BROWSER),
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},3000",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    long_name = "a_name_that_is_longer_than_the_window_of_a_telephone_is_wide"
    runs = [write_run(folder / long_name, rotational=False, depth=6), write_run(folder / "b", depth=6)]
    return write_report([read_run(run, run.name) for run in runs], folder / "report")[0]


def look(report: Path, folder: Path, width: int) -> dict[str, Any]:
    copy = folder / "probed.html"
    copy.write_text(report.read_text().replace("</body>", PROBE + "</body>"))
    title = re.search("<title>(.*?)</title>", browse(copy, folder, "--dump-dom", width=width), re.DOTALL)
    assert title is not None
    seen: dict[str, Any] = json.loads(unescape(title[1]))
    return seen


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_fits_the_window_and_fetches_nothing(report: Path, tmp_path: Path, width: int) -> None:
    seen = look(report, tmp_path, width)
    pictures = len(list(report.parent.glob("*.png")))
    assert seen["decoded"] == pictures == sum(2 if section.each else 1 for section in SECTIONS)
    assert seen["fetched"] == []
    assert seen["content"] <= seen["window"]
    assert min(seen["widths"]) > 400
    assert seen["font"] >= 14
    assert (seen["color"], seen["background"]) == ("rgb(26, 26, 26)", "rgb(255, 255, 255)")
    columns = len(set(seen["lefts"]))
    assert columns == (2 if width == WIDE else 1)


def test_what_is_painted(report: Path, tmp_path: Path) -> None:
    file = tmp_path / "screenshot.png"
    browse(report, tmp_path, f"--screenshot={file}", width=WIDE)
    pixels = np.asarray(imread(file))[..., :3]
    assert pixels.shape[:2] == (3000, WIDE)
    darkness = 1 - pixels.max(axis=2)
    assert pixels[2, 2].tolist() == [1, 1, 1]
    assert (pixels.min(axis=2) == 1).mean() > 0.5  # mostly white paper
    assert (darkness > 0.8).mean() > 0.005  # with text on it
    saturation = pixels.max(axis=2) - pixels.min(axis=2)
    for side in (saturation[:, : WIDE // 2], saturation[:, WIDE // 2 :]):  # and colored pictures in both columns
        assert (side > 0.3).mean() > 0.002
