"""docs/architecture.md names every room of the house, and none that is not there."""

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
