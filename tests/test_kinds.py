"""Contract: a kind is named in its own folder and nowhere else in the package.

The members of a union carry their behaviour. A room that asks which member it holds, by its name
or by its class, has to be changed with every new member; so no room may. What a room needs of a
kind it asks the member itself.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmtune"


@dataclass(frozen=True)
class Kind:
    """One kind: the folder of its members, and the names that only this folder may hold."""

    folder: str
    names: frozenset[str]
    classes: str
    """What the classes of its members end in."""
    unions: frozenset[str] = frozenset()
    """Files of the folder that other rooms may import: the union and what is shared."""


KINDS: dict[str, Kind] = {
    "dataset format": Kind(
        folder="data/formats",
        # the other formats are called by the column that they read
        names=frozenset({"sharegpt"}),
        classes="Format",
        unions=frozenset({"base"}),
    ),
    "objective": Kind(
        folder="training/objectives",
        names=frozenset({"sft"}),
        classes="Objective",
        unions=frozenset({"base"}),
    ),
    "exporter": Kind(
        folder="exporting",
        # an export in 4 bits is called by its quantization, which is a kind of its own
        names=frozenset({"gguf", "ollama", "adapter-gguf", "hub"}),
        classes="Exporter",
        unions=frozenset({"base", "config", "export"}),
    ),
    "adapter method": Kind(
        folder="adapters",
        # llama.cpp calls its own adapters lora too
        names=frozenset({"rslora", "dora", "LORA", "use_rslora", "use_dora", "lora_alpha"}),
        classes="Adapter",
        unions=frozenset(
            {
                "base",
                "config",
                "inject",
                "low_rank",
                "low_rank_saved",
                "low_rank_update",
                "manifest",
                "module_selection",
                "saved",
                "live",
                "update",
            }
        ),
    ),
    "diagnosis": Kind(
        "evaluation/diagnosis",
        # contamination and the learning curve are also what rules and an experiment are named after
        frozenset({"divergence", "stops", "memorisation", "shift"}),
        "",
        # the results that the verdict's rules look at, and what experiments and checks share
        frozenset(
            {
                "base",
                "config",
                "contamination",
                "learning_curve",
                "curve",
                "parts",
                "prepare",
                "rows",
                "subject",
            }
        ),
    ),
    "quantization": Kind(
        folder="models/quantization",
        names=frozenset({"nf4", "fp4", "int8"}),
        classes="Quantization",
        unions=frozenset({"base", "config", "describe", "bnb"}),
    ),
    "suite task": Kind("evaluation/tasks", frozenset(), "Suite", frozenset({"base", "config"})),
}
"""Each kind that the contract holds for."""


def modules(kind: Kind) -> list[Path]:
    """Every module of the package that is outside the kind's folder."""
    own = PACKAGE / kind.folder
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not path.is_relative_to(own)]


def docstrings(tree: ast.Module) -> set[ast.AST]:
    """The constants of a module that stand alone as statements: docstrings of every sort."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def offences(kind: Kind, source: str) -> list[str]:
    """Return each place in `source` that names a member of the kind."""
    tree = ast.parse(source)
    ignored = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in ignored and node.value in kind.names:
            found.append(f"line {node.lineno}: the literal {node.value!r}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.removeprefix("llmtune.").replace(".", "/")
            if module == kind.folder:  # from llmtune.<folder> import <module>
                members = [alias.name for alias in node.names]
            elif module.startswith(kind.folder + "/"):
                members = [module.removeprefix(kind.folder + "/").split("/")[0]]
            else:
                continue
            found += [
                f"line {node.lineno}: imports {module}/{member}"
                for member in members
                if member not in kind.unions and (PACKAGE / kind.folder / f"{member}.py").exists()
            ]
    return found


@pytest.mark.parametrize("name", sorted(KINDS))
def test_no_room_names_a_member_of_a_kind_that_it_does_not_own(name):
    kind = KINDS[name]
    found = {
        str(path.relative_to(ROOT)): offences(kind, path.read_text(encoding="utf-8"))
        for path in modules(kind)
    }
    found = {path: places for path, places in found.items() if places}
    assert not found, f"{name}: {found}"


def test_the_contract_sees_a_literal_and_an_import_and_no_docstring():
    kind = Kind("data/formats", frozenset({"sharegpt"}), "Format", frozenset({"base"}))
    seen = offences(
        kind,
        '"""sharegpt"""\n'
        "from llmtune.data.formats import sharegpt\n"
        "from llmtune.data.formats.base import Row\n"
        'if name == "sharegpt": pass\n',
    )
    assert [line.split(":")[0] for line in seen] == ["line 2", "line 4"]
