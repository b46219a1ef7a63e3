"""A template that prints the date prints one date for a run, whatever day it is."""

import copy
import json

import pytest

from llmtune import evaluate, load_config, merge, train
from llmtune.data.render import render_text
from llmtune.data.template import require_same_template, template_fingerprint
from llmtune.models import template_date
from llmtune.models.template_date import fix_template_date, template_date_of
from llmtune.runs.rows import open_rows
from llmtune.runs.targets import resolve_target
from llmtune.scoring.live import load_target
from tests.project import make_project
from tests.tiny import CHATML, make_tokenizer

DATED = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\n' }}" + CHATML
ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def dated():
    return make_tokenizer(chat_template=DATED)


def test_a_fixed_date_is_printed_by_every_renderer(dated):
    fix_template_date(dated, "2024-02-29")
    fix_template_date(dated, "2026-11-28")
    assert "Today: 28 November 2026" in render_text(dated, ASKED)
    assert "28 November 2026" in dated.apply_chat_template(ASKED, tokenize=False)
    assert "28 November 2026" in copy.deepcopy(dated).apply_chat_template(ASKED, tokenize=False)
    assert template_date_of(dated) == "2026-11-28"


def test_a_template_without_a_date_is_left_alone():
    tokenizer = make_tokenizer()
    fix_template_date(tokenizer, "2026-11-28")
    assert "apply_chat_template" not in vars(tokenizer)
    assert template_date_of(tokenizer) is None


def test_the_identity_of_a_template_is_the_same_every_day(dated):
    recorded = template_fingerprint(dated)
    fix_template_date(dated, "2031-01-02")
    assert template_fingerprint(dated) == recorded
    require_same_template(dated, recorded)


def test_a_run_goes_on_the_next_day_with_its_own_date(tmp_path, monkeypatch):
    config = make_project(tmp_path / "project")
    base = tmp_path / "project/base"
    (base / "chat_template.jinja").write_text(DATED)
    monkeypatch.setattr(template_date, "today", lambda: "2026-11-28")
    monkeypatch.setattr("llmtune.runs.stage.today", lambda: "2026-11-28")
    train(load_config(config))
    run_dir = tmp_path / "project/run"
    adapter = json.loads((run_dir / "adapter/llmtune_adapter.json").read_text())
    assert adapter["template"]["date"] == "2026-11-28"

    monkeypatch.setattr(template_date, "today", lambda: "2026-12-01")
    monkeypatch.setattr("llmtune.runs.stage.today", lambda: "2026-12-01")
    before = (run_dir / "metrics.jsonl").read_text()
    train(load_config(config))  # finds the same rows, and has nothing to do
    assert (run_dir / "metrics.jsonl").read_text() == before
    merge(load_config(config))
    evaluate(load_config(config, ["evaluate.limit=2"]))
    for name in (run_dir, run_dir / "adapter"):
        live = load_target(resolve_target(str(name)))
        assert "28 November 2026" in render_text(live.tokenizer, ASKED)
    assert "28 November 2026" in render_text(open_rows(str(run_dir)).tokenizer, ASKED)
