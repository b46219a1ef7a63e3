"""A short list of the merge matrix: right, or refused in one line, as docs/merge-matrix.md says."""

import sys
from pathlib import Path

import pytest

SCRIPTS_DIR = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS_DIR))

import merge_matrix  # noqa: E402
from merge_cells.adapters import ADAPTERS  # noqa: E402
from merge_cells.cell import ABSENT, BLOCKED, REFUSED, RIGHT, Cell, try_architecture  # noqa: E402

CELLS = {
    ("qwen3_5+published", "lora"): RIGHT,  # model.language_model.*
    ("qwen3_5_moe+published", "experts"): RIGHT,  # and experts stored one by one
    ("llama4+published", "experts"): RIGHT,  # language_model.model.*, beside a vision model
    ("nemotron_h", "experts"): RIGHT,  # backbone.*, square, two parameters of one module
    ("deepseek_v4", "experts"): RIGHT,  # ffn.experts.*.w1
    ("jetmoe", "experts"): RIGHT,  # a stack that is called weight
    ("gptj", "lora on both"): RIGHT,  # a head with a bias, which peft saves along
    ("granitemoe", "experts"): RIGHT,
    ("inkling2_text", "experts"): RIGHT,  # gate and up take turns in the file
    ("ctrl", "tokens"): REFUSED,  # peft leaves out the tied head's bias
    ("laguna", "lora"): REFUSED,  # peft loses names
    ("jamba", "lora"): BLOCKED,  # reads dt_proj past the adapter
    ("inkling_text", "lora on embedding"): REFUSED,  # normalizes what it looks up
    ("youtu", "tokens and head"): REFUSED,  # its padding row is zero, whatever the file holds
    ("youtu", "lora on head"): RIGHT,
}


@pytest.mark.parametrize(("architecture", "adapter"), CELLS)
def test_a_cell_is_right_or_refused_in_one_line(tmp_path, architecture, adapter):
    assert adapter in ADAPTERS
    (cell,) = try_architecture(architecture, (adapter,), tmp_path)
    assert cell.outcome == CELLS[architecture, adapter], cell.detail


def read_table() -> list[Cell]:
    """Return the cells of the committed page that were tried."""
    page = merge_matrix.PAGE.read_text(encoding="utf-8").splitlines()
    outcomes = {mark: outcome for outcome, mark in merge_matrix.MARKS.items()}
    header, _, *rows = (
        [one.strip() for one in line.split("|")[1:-1]] for line in page if line.startswith("|")
    )
    columns = header[1:]
    assert columns == list(ADAPTERS)
    return [
        Cell(architecture, adapter, outcomes.get(mark, mark))
        for architecture, *marks in rows
        for adapter, mark in zip(columns, marks, strict=True)
        if mark
    ]


def test_the_committed_page_is_what_the_script_writes_of_its_table():
    page, written = (
        [line for line in lines if "transformers " not in line]  # its version, and peft's
        for lines in (
            merge_matrix.PAGE.read_text(encoding="utf-8").splitlines(),
            merge_matrix.page_lines(read_table(), list(ADAPTERS)),
        )
    )
    end = page.index("## What is refused")
    assert written[:end] == page[:end]


def test_at_least_thirty_families_merge_as_peft_does_or_are_refused():
    cells = read_table()
    assert {cell.outcome for cell in cells} <= {RIGHT, REFUSED, BLOCKED, ABSENT}
    right, refused = (
        {cell.architecture.partition("+")[0] for cell in cells if cell.outcome in outcomes}
        for outcomes in ({RIGHT}, {REFUSED, BLOCKED})
    )
    assert len(right) >= 30
    page = merge_matrix.PAGE.read_text(encoding="utf-8")
    reasons = page.partition("## What is refused")[2]
    assert all(name in reasons for name in refused - right)
