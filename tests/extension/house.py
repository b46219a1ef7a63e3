"""A copy of the package in which a test adds one more of a kind, as a contributor would."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


IN_TURN = """
import contextlib, io, json, sys
from llmtune.cli import run_command

printed = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(arguments)
    if code:
        sys.exit(f"{arguments}\\n{out.getvalue()}\\n{err.getvalue()}")
    printed.append((out.getvalue(), err.getvalue()))
print(json.dumps(printed))
"""


class Printed(NamedTuple):
    """What a command printed."""

    stdout: str
    stderr: str


class House:
    """A copy of `llmtune/` to add to; its commands run from the copy."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ignored = shutil.ignore_patterns("__pycache__")
        for folder in ("llmtune", "configs", "evals"):
            shutil.copytree(ROOT / folder, directory / folder, ignore=ignored)

    def add(self, file: str, text: str) -> None:
        """Write the one new file of the kind."""
        path = self.directory / "llmtune" / file
        assert not path.exists(), f"{file} is there already"
        path.write_text(text, encoding="utf-8")

    def enter(self, file: str, changes: dict[str, str]) -> None:
        """Make the entry in the union: each text of `changes` stands once in `file`."""
        path = self.directory / "llmtune" / file
        text = path.read_text(encoding="utf-8")
        for old, new in changes.items():
            assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run `llmtune ARGUMENTS` of the copy and require that it succeeds."""
        return self._call([sys.executable, "-m", "llmtune", *arguments], cwd)

    def run_in_turn(self, *commands: Sequence[str], cwd: Path) -> list[Printed]:
        """Run several commands in one process, which imports the libraries once; all succeed."""
        answer = self._call([sys.executable, "-c", IN_TURN, json.dumps(commands)], cwd).stdout
        return [Printed(*each) for each in json.loads(answer.splitlines()[-1])]

    def execute(self, program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a Python program that imports the copy and require that it succeeds."""
        return self._call([sys.executable, "-c", program], cwd)

    def _call(self, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(self.directory)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done
