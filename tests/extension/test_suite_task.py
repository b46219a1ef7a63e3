"""A new task of suites is one file and one entry: it is read, scored and shown in the report."""

import json

from tests.conftest import write_jsonl
from tests.extension.house import House
from tests.project import make_project

CONTAINS_ALL = '''
"""A generated answer that should hold all of several words."""

from dataclasses import replace
from typing import ClassVar, Literal

from llmtune.evaluation.tasks.base import Metric, PromptedSuite, read_field

NEW_TOKENS = 8


class ContainsAllSuite(PromptedSuite):
    """A generated answer that should hold all of several words."""

    METRICS: ClassVar[tuple[Metric, ...]] = (Metric("share_held", True, "share of words"),)

    task: Literal["contains-all"]
    metric: Literal["share_held"] = "share_held"

    @classmethod
    def draft(cls, rows):
        if not rows.asks or not all(" " in row["answer"] for row in rows.items):
            return None
        return cls.draft_prompt(rows)

    def read_answer(self, fields, item):
        return replace(item, references=tuple(read_field(fields, self.answer).split()))

    def score(self, scored, suite, scoring):
        from llmtune.evaluation.requests import encode_prompts
        from llmtune.scoring.generate import Decoding, generate_texts

        written = generate_texts(
            scored.model,
            scored.tokenizer,
            encode_prompts(scored.tokenizer, suite, scoring.demonstrations),
            Decoding(NEW_TOKENS, scored.stop_token_ids),
            token_budget=scoring.token_budget,
            on_progress=scoring.on_items,
        )
        return [self.score_text(i, w.text) for i, w in zip(suite.items, written, strict=True)]

    def score_text(self, item, text):
        held = sum(word in text.split() for word in item.references) / len(item.references)
        return item.scored(held, prediction=text, answer=" ".join(item.references))

    def count_tokens(self, tokenizer, suite):
        from llmtune.evaluation.requests import encode_prompts

        return sum(len(ids) + NEW_TOKENS for ids in encode_prompts(tokenizer, suite))

    def answer_tokens(self, tokenizer, suite):
        return NEW_TOKENS
'''


def test_a_suite_of_a_new_task_is_scored_in_a_run_and_shown_in_its_report(tmp_path):
    house = House(tmp_path / "house")
    house.add("evaluation/tasks/contains_all.py", CONTAINS_ALL)
    house.enter(
        "evaluation/tasks/config.py",
        {
            "from llmtune.evaluation.tasks.exact": (
                "from llmtune.evaluation.tasks.contains_all import ContainsAllSuite\n"
                "from llmtune.evaluation.tasks.exact"
            ),
            '    "exact": ExactSuite,': (
                '    "contains-all": ContainsAllSuite,\n    "exact": ExactSuite,'
            ),
        },
    )
    config = make_project(tmp_path / "project")
    items = [{"text": f"Name {n} colors.", "answer": "red blue"} for n in range(4)]
    write_jsonl(tmp_path / "project" / "colors.jsonl", items)
    suite = {"task": "contains-all", "items": "colors.jsonl", "prompt": "{{ text }}"}
    (tmp_path / "project" / "colors.yaml").write_text(json.dumps(suite))
    suites = [str(tmp_path / "project" / f"{name}.yaml") for name in ("colors", "prose")]
    house.run(
        "run",
        str(config),
        f"evaluate.suites={json.dumps(suites)}",
        "evaluate.extent=none",
        "export.to=[]",
        cwd=tmp_path,
    )
    report = json.loads((tmp_path / "project" / "run" / "report.json").read_text())
    assert report["suites"]["colors"]["task"] == "contains-all"
    assert report["suites"]["colors"]["arms"]["tuned"]["n"] == 4
    assert "colors" in (tmp_path / "project" / "run" / "report.html").read_text()

    rows = [{"prompt": f"Name {n} colors.", "completion": f"red blue {n}"} for n in range(200)]
    write_jsonl(tmp_path / "colors.jsonl", rows)
    house.run("init", "colors.jsonl", "--out", "mine.yaml", cwd=tmp_path)
    assert "task: contains-all" in (tmp_path / "mine_suite.yaml").read_text()
