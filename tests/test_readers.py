"""Files of other people are read in one place each: the tree is read for a reader elsewhere."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmtune"

JSON = {
    "io/json_files.py": "the reader",
    "data/row_values.py": "the reader of rows, which refuses doubled keys",
    "evaluation/items.py": "items, which refuse NaN",
    "ops/nf4.py": "a tensor's bytes, and no file",
    "io/partial_lines.py": "what was just written",
    "checks/runtime_worker.py": "a process of our own, which imports nothing of ours",
}
TEMPLATES = {
    "models/chat_template.py": "the renderer",
    "models/template_date.py": "the same call with a date",
}
ENVIRONMENTS = {
    "evaluation/templates.py": "bounded",
    "evaluation/prompt_file.py": "parses alone",
    "data/template_proof.py": "parses alone",
    "reporting/html.py": "templates of our own",
}
ONLY_IN = {
    "json.load": JSON,
    "json.loads": JSON,
    "json.JSONDecoder": JSON,
    "apply_chat_template": TEMPLATES,
    "Environment": ENVIRONMENTS,
    "ImmutableSandboxedEnvironment": ENVIRONMENTS,
    "GGUFReader": {"exporting/gguf_writer/write.py": "a file that we wrote"},
    "torch.load": {"merging/pickled.py": "restricted, without the weights"},
}


LOADERS = ("from_pretrained", "load_file", "load_adapter")
UNBLAMED = {
    "models/build.py": "called by models/load.py, which blames config.json",
    "models/load.py": "a cache of our own, which is made anew",
    "training/checkpoint.py": "a file of our own, compared with its hash before",
    "scoring/live.py": "our own load_adapter, which blames its files",
}


def unblamed(tree: ast.AST) -> list[int]:
    """Return the lines that let a library read a file outside of `with blamed_on(...)`."""
    lines = {line for name in LOADERS for line in calls_of(tree, name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and "blamed_on(" in "".join(map(ast.unparse, node.items)):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return sorted(lines)


def test_what_a_library_says_of_a_file_is_blamed_on_the_file():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        lines = unblamed(ast.parse(path.read_text(encoding="utf-8")))
        if lines and place not in UNBLAMED:
            found[place] = lines
    assert found == {}, "use `with blamed_on(path, library):` of llmtune.io.json_files"
    assert unblamed(ast.parse("x = AutoConfig.from_pretrained(d)")) == [1]
    assert unblamed(ast.parse("with blamed_on(d, 'x'):\n    load_file(d)")) == []


def calls_of(tree: ast.AST, name: str) -> list[int]:
    """Return the lines that call `name`: a dotted name as it is, a bare one as any object's."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == name or ("." not in name and called.endswith(f".{name}")):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("name", ONLY_IN)
def test_every_reader_is_in_its_place(name):
    allowed = ONLY_IN[name]
    found: dict[str, list[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        place = path.relative_to(PACKAGE).as_posix()
        if name == "apply_chat_template" and "models.chat_template import" in ast.unparse(tree):
            lines = [line for line in calls_of(tree, name) if f".{name}(" in _line(path, line)]
        else:
            lines = calls_of(tree, name)
        if lines and place not in allowed:
            found[place] = lines
    assert found == {}, f"{name}: use the reader in {next(iter(allowed))}"


def _line(path: Path, number: int) -> str:
    return path.read_text(encoding="utf-8").splitlines()[number - 1]


def test_a_reader_elsewhere_is_found():
    tree = ast.parse("import json\nx = json.loads('1')\ny = t.apply_chat_template([])")
    assert calls_of(tree, "json.loads") == [2]
    assert calls_of(tree, "apply_chat_template") == [3]
