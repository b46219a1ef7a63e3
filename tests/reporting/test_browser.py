"""The page in a real browser, light, dark, on a phone and on paper: no error, no request."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmtune.reporting.build import build_report, write_report
from tests.reporting.full import plant_full_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
REQUIRED = "LLMTUNE_REQUIRE_BROWSER"
CHARTS = 5
"""Gain against forgetting, probabilities, loss, KL to the base, learning curve."""
MEASURE = """
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument;
  const resources = frame.contentWindow.performance.getEntriesByType("resource").length;
  const word = page.querySelector(".word").getBoundingClientRect();
  document.title = [page.documentElement.scrollWidth, resources, word.height > 0,
    page.querySelectorAll("svg.chart").length,
    frame.contentWindow.getComputedStyle(page.body).backgroundColor].join(" ");
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run with every section, and a word that is too long for any screen."""
    run = plant_full_run(tmp_path_factory.mktemp("run"), name="unbroken" * 20)
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


@pytest.mark.parametrize(
    ("width", "scheme", "paper"),
    [(360, "light", "rgb(252, 251, 248)"), (1100, "dark", "rgb(22, 23, 26)")],
)
def test_page_fits_its_window_in_both_themes_and_requests_nothing(
    page, tmp_path, width, scheme, paper
):
    framed = html.escape(page.read_text(), quote=True)
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<title>-</title><meta name="color-scheme" content="light dark">'
        f'<iframe style="border:0;width:{width}px;height:900px" '
        f'srcdoc="{framed}"></iframe>{MEASURE}'
    )
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    document, console = show(wrapper, tmp_path / "profile", "--window-size=1300,1000", preferred)
    assert console == []
    title = re.search(r"<title>(.*?)</title>", document).group(1)
    assert title == f"{width} 0 true {CHARTS} {paper}"


def test_page_prints(page, tmp_path):
    printed = tmp_path / "report.pdf"
    _, console = show(
        page, tmp_path / "profile", "--no-pdf-header-footer", f"--print-to-pdf={printed}"
    )
    assert console == []
    assert printed.read_bytes().startswith(b"%PDF") and printed.stat().st_size > 20_000
