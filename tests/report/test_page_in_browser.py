"""The page in a real browser: headless Chromium, in both themes, on a phone and on a desktop.

Chromium comes from npm, once, into the cache folder that tests share.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from bad_input import TIMEOUT, save_model
from measured_report import measured, save
from npm import npm_packages

from popcompile.conversion import convert
from popcompile.report.page import html_report

PACKAGES = ("@sparticuz/chromium@153.0.0", "puppeteer-core@24.43.1")
LOOK = Path(__file__).parent.parent / "support/browser/look.mjs"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not shutil.which("npm") or platform.system() != "Linux" or platform.machine() != "x86_64",
        reason="needs Node.js, and Chromium as npm has it, for Linux on x86-64",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Path:
    """A folder with the packages."""
    return npm_packages("browser", *PACKAGES)


@pytest.fixture(scope="module")
def seen(browser: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """What it makes of a page with every section, by theme and width."""
    folder = tmp_path_factory.mktemp("page")
    package = folder / "out"
    convert(save_model(folder / "model", num_hidden_layers=4), package, layers="2-3", kv_projection="layer")
    page = folder / "page.html"
    page.write_text(html_report(save(package, measured())), encoding="utf-8")
    environment = os.environ | {"HOME": str(folder), "TMPDIR": str(folder)}
    command = ["node", str(LOOK), str(page), str(folder)]
    done = subprocess.run(command, cwd=browser, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return {(entry["theme"], entry["width"]): entry for entry in json.loads(done.stdout)}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page(seen: dict[tuple[str, int], Any], theme: str, width: int) -> None:
    found = seen[theme, width]
    assert found["problems"] == []
    assert len(found["requests"]) == 1, "the page is one file"
    assert found["page"] == [width, width] and found["beyond"] == [], "wider than the screen"
    assert found["stuck"] == 0
    assert width < 1000 or found["cut"] == [], "tables and plots fit a desktop's screen, and scroll on a phone's"
    assert found["faint"] == [], "text whose contrast is below 4.5 (WCAG AA)"
    plot = matplotlib.image.imread(found["picture"])[..., :3].mean()
    assert (found["background"] > 0.9 and plot > 0.8) if theme == "light" else (found["background"] < 0.1 > plot - 0.15)
