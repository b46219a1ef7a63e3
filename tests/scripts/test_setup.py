"""setup.sh: what is missing is one line and exit code 2, and a second call goes on."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "cksum", "dirname", "env")


@pytest.fixture
def clone(tmp_path):
    """A directory with what setup.sh reads."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(clone: Path, path: str, *extras: str) -> subprocess.CompletedProcess[str]:
    command = [str(shutil.which("bash")), str(clone / "scripts" / "setup.sh"), *extras]
    environment = {"PATH": path, "HOME": str(clone)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def write_python(path: Path, *, has_pip: bool, installs: bool) -> None:
    """Write a stand-in for an environment's Python that knows only what setup.sh asks of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'  *"pip --version"*) exit {0 if has_pip else 1} ;;\n'
        f'  *"pip install"*) echo called >>"${{0%/*}}/installs"; exit {0 if installs else 1} ;;\n'
        '  *"venv --clear .venv") rm -r .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;\n'
        "esac\n"
    )
    path.chmod(0o755)


def test_without_python_it_says_what_to_install(clone, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in TOOLS:
        (bare / name).symlink_to(shutil.which(name))
    done = setup(clone, str(bare))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.11 or newer") and done.stderr.count("\n") == 1
    assert not (clone / ".venv").exists()


def test_without_a_network_it_says_so_and_a_second_call_tries_again(clone):
    write_python(clone / ".venv" / "bin" / "python", has_pip=True, installs=False)
    for calls in (1, 2):
        done = setup(clone, os.environ["PATH"])
        assert done.returncode == 2
        assert "error: the packages could not be installed; check the network" in done.stderr
        assert (clone / ".venv" / "bin" / "installs").read_text().count("called") == calls


def test_a_second_call_after_a_good_one_does_nothing(clone):
    write_python(clone / ".venv" / "bin" / "python", has_pip=True, installs=True)
    assert setup(clone, os.environ["PATH"]).returncode == 0
    assert setup(clone, os.environ["PATH"]).stderr == ""
    assert (clone / ".venv" / "bin" / "installs").read_text() == "called\n"


def test_what_development_needs_has_what_a_run_needs(clone):
    write_python(clone / ".venv" / "bin" / "python", has_pip=True, installs=True)
    assert setup(clone, os.environ["PATH"], "dev").returncode == 0
    assert setup(clone, os.environ["PATH"]).stderr == ""
    assert (clone / ".venv" / "bin" / "installs").read_text() == "called\n"
    (clone / "constraints.txt").write_text("torch==2.13.0\n")
    assert "Installing llmtune by" in setup(clone, os.environ["PATH"]).stderr


def test_an_environment_whose_making_was_interrupted_is_made_again(clone, tmp_path):
    write_python(clone / ".venv" / "bin" / "python", has_pip=False, installs=False)
    (clone / ".venv" / "half").write_text("")
    tools = tmp_path / "tools"
    write_python(tools / "python3.13", has_pip=True, installs=True)
    done = setup(clone, f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "Making .venv" in done.stderr and not (clone / ".venv" / "half").exists()
