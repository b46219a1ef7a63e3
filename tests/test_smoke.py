"""The smoke recipe on the real small model: slow, and in a file of its own to run beside others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_smoke_recipe_runs_with_the_network_blocked(tmp_path):
    program = (
        "import sys, socket, tests.conftest as c\n"
        "socket.socket.connect = c._connect_locally\n"
        "from llmtune.cli import run_command\n"
        f"sys.exit(run_command(['run', 'configs/smoke.yaml', 'run_dir={tmp_path / 'smoke'}']))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "LLMTUNE_CACHE"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
