"""The rooms of the house: the page lists them, and each sees only what it may."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLE = PAGE[PAGE.index("| room |") : PAGE.index("Imports point one way;")]


def test_the_table_lists_every_room_and_no_other():
    first_cells = " ".join(line.split("|")[1] for line in TABLE.splitlines() if "`" in line)
    listed = set(re.findall(r"`([\w/.]+)`", first_cells))
    package = ROOT / "llmtune"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    rooms |= {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    assert listed == rooms


def test_every_room_has_its_floor_in_the_import_contract():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    floors = {name.strip() for layer in layers for name in re.split(r"[|:]", layer)}
    rooms = {path.parent.name for path in (ROOT / "llmtune").glob("*/__init__.py")}
    rooms |= {path.stem for path in (ROOT / "llmtune").glob("*.py")}
    assert rooms - floors == {"__init__", "__main__", "version"}


def imported_modules(path: Path) -> set[str]:
    """Return the modules of llmtune that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("llmtune.")}


def room_of(path: Path) -> str:
    """Return the room of a file, or the file's own name at the root."""
    return path.relative_to(ROOT / "llmtune").parts[0]


def test_the_whole_config_is_seen_by_config_runs_experiments_and_commands_alone():
    seen_by = {
        room_of(path)
        for path in (ROOT / "llmtune").rglob("*.py")
        if "llmtune.config" in imported_modules(path)
    }
    may_see = {"runs", "experiments", "commands", "__init__.py"}
    assert seen_by <= may_see


def test_commands_call_runs_experiments_or_the_one_room_that_does_the_work():
    """What needs several rooms is put together in `runs/` or `experiments/`, not in a command."""
    together = {"runs", "experiments", "config", "reporting", "errors", "io", "commands"}
    alone = {"data", "serving", "exporting", "checks"}
    for path in (ROOT / "llmtune" / "commands").glob("*.py"):
        rooms = set()
        for name in imported_modules(path):
            _, room, *rest = name.split(".")
            # the sections that options are made of, and what a command prints
            if rest[:1] not in (["config"], ["plan"]):
                rooms.add(room)
        others = rooms - together
        assert others <= alone, f"{path.name} imports {sorted(others - alone)}"


def module_files() -> list[Path]:
    """Return every module of the package that holds code."""
    package = ROOT / "llmtune"
    return [path for path in sorted(package.rglob("*.py")) if not path.name.startswith("__")]


def test_few_modules_are_short_and_none_is_too_long_to_read():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in module_files()
    }
    assert {path: lines for path, lines in lengths.items() if lines > 450} == {}
    short = [path for path, lines in lengths.items() if lines < 60]
    assert len(short) < 0.12 * len(lengths), f"{len(short)} of {len(lengths)}: {short}"


def test_no_function_is_longer_than_a_hundred_lines():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in module_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= 100
    ]
    assert long == []


OPEN_DICTS = {
    "adapters": 2,  # adapter_config.json and the manifest beside it, of any version
    "checks": 1,  # what llama.cpp's server answers
    "data": 17,  # rows, messages and tools as the user wrote them
    "evaluation": 2,  # the messages of a question
    "exporting": 1,  # tokenizer.json
    "io": 2,  # JSON files of any shape
    "merging": 1,  # config.json of a base
    "models": 6,  # config.json, transformers' keywords and messages
    "planning": 1,  # config.json
    "reporting": 1,  # metrics.jsonl of any version
    "runs": 1,  # report.json of any version
    "serving": 1,  # tools as the user wrote them
    "training": 2,  # metrics.jsonl of any version, and the attributes of trl's objects
}
"""How many functions of a room return a dict whose keys no type knows; it may not grow."""


def test_results_and_records_have_types():
    """A dict with known keys is a frozen dataclass or a TypedDict; what is written a JsonObject."""
    pattern = re.compile(r"(dict|Mapping)\[str, (Any|object)\]")
    found = dict.fromkeys(OPEN_DICTS, 0)
    for path in module_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                is_open = pattern.search(ast.unparse(node.returns)) is not None
                found[room_of(path)] = found.get(room_of(path), 0) + is_open
    assert {room: n for room, n in found.items() if n > OPEN_DICTS.get(room, 0)} == {}


def needed_modules(path: Path) -> set[str]:
    """Return the modules of llmtune that a file needs when it runs.

    What only types need does not count. What a function imports does: a light module that starts
    an engine inside a method needs it all the same.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ignored: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            ignored |= set(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def circles(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the modules in a circle, or between two circles, with those they need of these."""
    left = {name: needed & needs.keys() - {name} for name, needed in needs.items()}
    while True:
        needed_by_some = set().union(*left.values())
        kept = {name for name, needed in left.items() if needed and name in needed_by_some}
        if len(kept) == len(left):
            return left
        left = {name: left[name] & kept for name in kept}


def test_an_import_inside_a_method_is_a_need_and_one_for_types_is_not(tmp_path):
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from llmtune.a import A\n"
        "class Member:\n    def run(self):\n        from llmtune.b import start\n"
    )
    (tmp_path / "member.py").write_text(source)
    needed = needed_modules(tmp_path / "member.py")
    assert "llmtune.b" in needed and "llmtune.a" not in needed


def test_no_modules_need_each_other():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}).keys() == {"b", "c"}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): needed_modules(path)
        for path in module_files()
    }
    # a folder's own file can be its union
    modules |= {
        ".".join(path.parent.relative_to(ROOT).parts): needed_modules(path)
        for path in (ROOT / "llmtune").glob("*/**/__init__.py")
    }
    assert circles(modules) == {}
