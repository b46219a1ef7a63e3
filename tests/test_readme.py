"""Every command and the script in the README are run, in a directory laid out like a clone."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llmtune.cli import run_command
from tests.conftest import write_jsonl
from tests.project import chat_row, make_project, sentences

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == ""
    for line in block.splitlines()
    if line.startswith("llmtune ")
]
SCRIPTS = [
    line.split()[1]
    for language, block in BLOCKS
    if language == ""
    for line in block.splitlines()
    if line.startswith("bash ")
]
SCRIPT = next(block for language, block in BLOCKS if language == "python")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A directory where the README's paths exist, with a tiny model behind them."""
    directory = tmp_path_factory.mktemp("clone")
    config = json.loads(make_project(directory / "tiny").read_text())
    config["run_dir"] = "runs/quickstart"
    (directory / "configs").mkdir()
    (directory / "configs" / "quickstart.yaml").write_text(json.dumps(config))
    rows = [chat_row(f"{text[:-1]} {i}.", label) for i in (1, 2) for text, label in sentences()]
    write_jsonl(directory / "train.jsonl", rows)
    write_jsonl(directory / "prompts.jsonl", [{"prompt": "The film is warm."}])
    shutil.copytree(ROOT / "evals" / "tasks", directory / "evals" / "tasks")
    (directory / "data" / "quickstart").mkdir(parents=True)
    write_jsonl(
        directory / "data" / "quickstart" / "movies_test.jsonl",
        [{"prompt": text, "answer": label} for text, label in sentences()[::8]],
    )
    return directory


def test_the_readme_holds_commands_a_script_and_the_two_commands():
    assert len(COMMANDS) >= 15
    assert README.index("source .venv/bin/activate") < README.index("llmtune init")
    assert SCRIPTS == ["scripts/quickstart.sh", "scripts/test.sh"]
    assert len(SCRIPT.strip().splitlines()) <= 12


def test_what_the_docs_install_by_an_extra_is_one_of_ours():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for listed in re.findall(
            r"pip install -e '?\.\[([^\]]*)\]", page.read_text(encoding="utf-8")
        ):
            assert set(listed.split(",")) <= set(extras), f"{page}: {listed}"


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/check.sh", "scripts/setup.sh", ".ci/run"])
def test_the_scripts_exist_can_be_run_and_parse(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_command_of_the_readme_works(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115, PTH123 (chat ends at once)
    monkeypatch.setattr("llmtune.serving.http_server.Server.take_requests", lambda *_: None)
    assert run_command(["run", "configs/quickstart.yaml", "--quiet"]) == 0
    for command in COMMANDS:
        arguments = shlex.split(command, comments=True)[1:]
        arguments = [each for each in arguments if not each.startswith("train.max_steps")]
        arguments = [_stand_in(each) for each in arguments]
        if arguments == ["run", "mine.yaml"]:
            arguments.append("train.max_steps=8")  # init asks for enough steps to learn
        code = run_command(arguments)
        assert code == 0, f"{command}\n{capsys.readouterr().err}"
    mine = json.loads((clone / "runs" / "mine" / "report.json").read_text())
    assert mine["suites"]["mine"]["n"] >= 20, "init's suite asks the task of held-out rows"


def _stand_in(argument: str) -> str:
    """Return the tiny base in place of a GGUF file that is not one we exported."""
    is_absent = argument.endswith(".gguf") and not Path(argument).exists()
    return "tiny/base" if is_absent else argument


def test_the_script_of_the_readme_works(clone):
    program = SCRIPT.replace("train.max_steps=20", "train.max_steps=2")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=clone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 steps" in done.stdout and "KL of merged" in done.stdout


def test_every_recipe_is_a_valid_config():
    from llmtune.config import load_config
    from llmtune.io.yaml_source import shipped_files

    recipes = shipped_files("configs")
    assert {"quickstart", "smoke", "lora-8b-24gb", "qlora-8b-24gb"} <= set(recipes)
    for path in recipes.values():
        load_config(path)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git to list the files")
def test_nothing_in_the_repository_names_a_machine_or_a_registry():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    # The package called llmtune on the index that pip asks is somebody else's.
    by_name = "pip install [^`\\n]*" + r"\bllmtune\b"
    forbidden = re.compile(
        by_name + "|/" + "work/|/" + "root/|pypi" + r"\.org|files\.python" + "hosted"
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".sh", ".toml", ".yaml", ".txt"} and path.is_file():
            found = forbidden.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found.group() if found else ''}"
