"""The docs site builds without a warning: each link, anchor and page is there."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_site_builds_without_a_warning_and_holds_the_python_api(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="llmtune.run"' in api and 'id="llmtune.load_config"' in api
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "scripts/quickstart.sh" in start
