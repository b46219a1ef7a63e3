"""The page in a real browser: no console error, no request, and no sideways scrolling."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmtune.reporting.transfer import build_report, write_report
from tests.reporting.planted import (
    PlantedSuite,
    improve,
    plant_generations,
    plant_log,
    plant_run,
    right_wrong,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
REQUIRED = "LLMTUNE_REQUIRE_BROWSER"
MEASURE = """
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument;
  const resources = frame.contentWindow.performance.getEntriesByType("resource").length;
  const word = page.querySelector(".word").getBoundingClientRect();
  document.title = [page.documentElement.scrollWidth, resources, word.height > 0,
    page.querySelectorAll("svg").length].join(" ");
};
</script>
"""


def find_browser() -> str:
    """Return the browser's path; where there is none the test is skipped, or fails if required."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"no browser ({', '.join(BROWSERS)}) on this machine"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{reason}, and {REQUIRED} is set")
        pytest.skip(reason)
    return found


def show(page: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """Open a page; return its document after loading and what it wrote to the console."""
    command = [
        find_browser(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--dump-dom",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def page(tmp_path):
    """The page of a run with every section that draws or holds long text."""
    base = right_wrong(120, 0.5, seed=0)
    run = plant_run(
        tmp_path / "run",
        [
            PlantedSuite(
                "movies",
                "target",
                {"base": base, "tuned": improve(base, 0.3, seed=1)},
                slices=[{"source": f"source-{index % 3}"} for index in range(120)],
            ),
            PlantedSuite(
                "prose",
                "general",
                {"base": [3.0] * 30, "tuned": [3.1] * 30},
                metric="nats_per_token",
            ),
        ],
    )
    plant_log(run, [2.0, 1.5, 1.0], {2: 1.4})
    long_word = "unbroken" * 40
    plant_generations(run, [{"prompt": long_word, "base": long_word, "tuned": "short"}])
    write_report(build_report(run), run)
    return run.report_html_path


def test_a_console_error_would_be_seen(tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<script>missing()</script>")
    _, console = show(broken, tmp_path / "profile")
    assert "missing is not defined" in "".join(console)


def test_page_renders_without_console_errors(page, tmp_path):
    document, console = show(page, tmp_path / "profile")
    assert console == []
    assert '<p class="word">' in document


@pytest.mark.parametrize("width", [360, 1100])
def test_page_fits_its_window_and_requests_nothing(page, tmp_path, width):
    framed = html.escape(page.read_text(), quote=True)
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<title>-</title><iframe style="border:0;width:{width}px;height:900px" '
        f'srcdoc="{framed}"></iframe>{MEASURE}'
    )
    document, console = show(wrapper, tmp_path / "profile", "--window-size=1300,1000")
    assert console == []
    title = re.search(r"<title>(.*?)</title>", document).group(1)
    assert title == f"{width} 0 true 6"
