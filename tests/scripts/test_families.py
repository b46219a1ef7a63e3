"""A short list of the families: they work, or say no in one line, as docs/families.md says."""

import re
import sys
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError

SCRIPTS_DIR = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS_DIR))

import families  # noqa: E402
from family_cells import trial as trials  # noqa: E402
from family_cells.trial import FAULT, REFUSED, WORKS, Trial, try_family  # noqa: E402

FEW_STAGES = ("train", "rows alone")
SHORT_LIST = {  # how rows are laid, and what they begin with alike
    # rows on both sides of the switch are kept apart, and share nothing
    "phi3+longrope": ("packed", "the first 8 rows have none"),
    # recurrent state, gated norms, routers, shared experts
    "qwen3_next": ("padded", "not computed once: rows are padded"),
    # widths that differ from layer to layer
    "gemma4_text": ("packed", "computed once"),
}


@pytest.mark.parametrize("family", SHORT_LIST)
def test_a_family_works_and_its_rows_have_the_losses_of_rows_alone(tmp_path, monkeypatch, family):
    stages = {name: trials.STAGES[name] for name in FEW_STAGES}
    monkeypatch.setattr(trials, "STAGES", stages)
    trial = try_family(family, tmp_path / "run")
    assert trial.outcome == WORKS, trial.line
    rows, shared = SHORT_LIST[family]
    assert trial.rows.startswith(rows)
    assert trial.shared.startswith(shared)
    assert ("is padding" in trial.rows) == trial.rows.startswith("padded")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("laguna", "renames tensors of this kind of model"),
        ("hrm_text", "self_attn.q_proj.weight', which transformers makes of 'model.L_module"),
    ],
)
def test_what_could_not_be_merged_or_loaded_again_is_refused_before_training(
    tmp_path, family, reason
):
    trial = try_family(family, tmp_path / "run", ("train",))
    assert trial.outcome == REFUSED
    assert reason in trial.line
    assert "target_modules" in trial.line
    assert not (tmp_path / "run" / "straight" / "metrics.jsonl").exists()


def test_a_family_that_ends_otherwise_is_a_fault(tmp_path, monkeypatch):
    def refuse(_trial, _scratch):
        raise LlmtuneError("no")

    def fail(_trial, _scratch):
        raise TypeError("of ours")

    outcomes = []
    for stage in (refuse, fail):
        monkeypatch.setattr(trials, "STAGES", {"train": stage})
        outcomes.append(try_family("llama", tmp_path / "run"))
    assert [one.outcome for one in outcomes] == [REFUSED, FAULT]
    assert outcomes[1].line.startswith("train: TypeError: of ours (test_families.py:")


def test_the_page_counts_and_lists_what_was_tried(tmp_path):
    tried = [
        Trial(
            "llama",
            stages=dict.fromkeys(trials.STAGES, "yes"),
            rows="packed: the probe found nothing",
        ),
        Trial("zaya", REFUSED, "train: no", {"train": REFUSED}),
    ]
    page = "\n".join(families.page_lines(tried))
    assert (
        "2 families were tried: 1 works (1 in every stage, 0 in those named), 1 is refused, and 0 "
        "have a fault." in page
    )
    assert "| Llama 3 | `llama` | works | packed |" in page
    assert "- zaya: train: no" in page


def test_the_committed_page_is_what_the_script_writes_of_its_tables():
    page = families.PAGE.read_text(encoding="utf-8").splitlines()
    row = re.compile(
        r"\|(?:.* \|)? `(\S+)` \| (\w+)(?:: (.*) alone were tried| \((.*)\))? \| (\w*) \|"
    )
    tried = []
    for found in filter(None, map(row.fullmatch, page)):
        family, outcome, few, last, rows = found.groups()
        stages = (few or last or ", ".join(trials.STAGES)).split(", ")
        tried.append(Trial(family, outcome, "", dict.fromkeys(stages, "yes"), rows))
    assert len(tried) > 80
    page, written = (
        [line for line in lines if "transformers " not in line]  # its version, and peft's
        for lines in (page, families.page_lines(tried))
    )
    end = page.index("## What is refused, and what has a fault")
    assert written[:end] == page[:end]
