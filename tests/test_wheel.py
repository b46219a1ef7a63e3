"""What a pip user gets: every package, the recipes, and the suite that needs no download."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    for folder in ("llmtune", "configs", "evals"):
        shutil.copytree(ROOT / folder, source / folder)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--no-cache-dir", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("llmtune-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_in_the_wheel(wheel_names):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "llmtune").rglob("*.py")}
    assert modules <= wheel_names


def test_recipes_templates_and_the_suites_of_init_are_in_the_wheel(wheel_names):
    recipes = {f"llmtune/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes and recipes <= wheel_names
    for suite in ("general", "knowledge_hard", "chat"):
        assert {f"llmtune/evals/{suite}.yaml", f"llmtune/evals/{suite}.jsonl"} <= wheel_names
    assert any(name.endswith(".html.j2") for name in wheel_names)
    assert not any(name.startswith("tests/") for name in wheel_names)
