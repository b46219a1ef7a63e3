"""A new diagnosis is one file and one entry.

It is measured, kept and shown, or listed as not measured; what it finds reaches verdict, headline
and caveats.
"""

import json

from tests.extension.house import House
from tests.project import make_project

ANSWER_LENGTH = '''
"""How long the answers of base and tuned model are."""

import contextlib
from dataclasses import dataclass
from typing import ClassVar

from llmtune.evaluation.diagnosis.base import (Alternative, Diagnosis, Diagnostic, Leak, Planned,)
from llmtune.evaluation.diagnosis.shown import Paragraph, Section


@dataclass(frozen=True, kw_only=True)
class AnswerLengthResult(Diagnostic):
    """The mean tokens of an answer."""

    FILE_NAME: ClassVar[str] = "answer_length.json"
    base: float
    tuned: float


class AnswerLength(Diagnosis[AnswerLengthResult]):
    """How long the answers of base and tuned model are."""

    name = "answer_length"
    what = "length of the answers"
    help = "How long answers are"
    extent = "full"
    result = AnswerLengthResult
    alternative = Alternative(
        arm="length_rule",
        label="A rule on the length",
        words="a rule on the length",
        verdict="USE-RULE",
        meaning="A rule on the length is as good.",
        reason="A rule needs no model: use it.",
        to_do="Use the rule.",
    )

    def plan(self, given):
        from llmtune.evaluation.diagnosis.subject import hash_ids, model_inputs, target_prompts

        prompts = target_prompts(given.subject, limit=4, seed=0)
        inputs = model_inputs(given.scored, with_adapter=True) | {"items": hash_ids(prompts)}

        def measure():
            from llmtune.scoring.batches import adapter_disabled
            from llmtune.scoring.generate import Decoding, generate_texts

            scored, lengths = given.scored, {}
            for arm in ("base", "tuned"):
                off = adapter_disabled(scored.model)
                with off if arm == "base" else contextlib.nullcontext():
                    written = generate_texts(
                        scored.model,
                        scored.tokenizer,
                        prompts,
                        Decoding(8, scored.stop_token_ids),
                        token_budget=given.diagnosis_settings.budget(scored),
                    )
                lengths[arm] = sum(len(each.token_ids) for each in written) / len(written)
            return AnswerLengthResult(inputs=inputs, **lengths)

        return Planned(AnswerLengthResult, inputs, 16 * len(prompts), measure)

    def leaks(self, found):
        ways = "2 of the very length of an answer"
        return {"sentiment": Leak(("item-0", "item-1"), 200, ways, {"same_length": 2})}

    def section(self, found, facts):
        text = f"An answer has {found.tuned:.1f} tokens, {found.base:.1f} before."
        return Section("How long are the answers?", (Paragraph(text),))
'''


PROGRAM = """
import shutil
from llmtune import evaluate, load_config, report, train

plain = ["evaluate.arms=[base,tuned]", "evaluate.strengths=[]", "evaluate.few_shot.measure=false"]
without = ["probe", "shift", "memorization", "divergence", "stops", "contamination"]
plain += [f"evaluate.{{name}}=false" for name in without]
config = load_config({config!r}, [*plain, "evaluate.extent=none"])
train(config)
evaluate(config)
report(config.run_dir)
shutil.copy(config.run_dir / "report.json", "before.json")
evaluate(load_config({config!r}, [*plain, "evaluate.extent=full"]))
report(config.run_dir)
"""


VERDICTS = """
from llmtune.reporting.suites import ArmScore, Change, Rival, SuiteReport
from llmtune.reporting.verdict.evidence import Evidence
from llmtune.reporting.verdict.rules import decide

gain = Change(0.2, 0.15, 0.25, 0.001)
suite = dict(
    name="s", role="target", task="choice", metric="accuracy", higher_is_better=True, n=200,
    chance=0.5, compared=("base", "tuned"), change=gain,
)
arms = {"base": ArmScore(0.6), "tuned": ArmScore(0.8)}
print(decide(Evidence((SuiteReport(**suite, arms=arms),))).headline)
rivals = {"length_rule": Rival(200, gain, Change(0.0, -0.01, 0.01, 1.0), 0.02)}
arms["length_rule"] = ArmScore(0.8)
verdict = decide(Evidence((SuiteReport(**suite, arms=arms, rivals=rivals),)))
print(verdict.name, verdict.meaning, *verdict.reasons, verdict.to_do)
"""


def test_a_new_diagnosis_is_measured_at_its_extent_and_shown(tmp_path):
    house = House(tmp_path / "house")
    house.add("evaluation/diagnosis/answer_length.py", ANSWER_LENGTH)
    house.enter(
        "evaluation/diagnosis/config.py",
        {
            "from llmtune.evaluation.diagnosis.base import Alternative, Diagnosis\n": (
                "from llmtune.evaluation.diagnosis.answer_length import AnswerLength\n"
                "from llmtune.evaluation.diagnosis.base import Alternative, Diagnosis\n"
            ),
            "    Probe(),\n": "    Probe(),\n    AnswerLength(),\n",
        },
    )
    config, run = make_project(tmp_path / "project"), tmp_path / "project" / "run"
    house.execute(PROGRAM.format(config=str(config)), cwd=tmp_path)
    before = json.loads((tmp_path / "before.json").read_text())
    assert "length of the answers" in before["missing"]
    found = json.loads((run / "diagnostics" / "answer_length.json").read_text())
    assert found["tuned"] > 0
    report = json.loads((run / "report.json").read_text())
    assert report["diagnostics"]["answer_length"]["tuned"] == found["tuned"]
    assert "length of the answers" not in report["missing"]
    assert "How long are the answers?" in (run / "report.html").read_text()
    ways = "2 of the very length of an answer"
    assert any(ways in said for said in [*report["caveats"], *report["decided_by"]["reasons"]])

    headline, used = house.execute(VERDICTS, cwd=tmp_path).stdout.splitlines()
    assert "a rule on the length were not measured" in headline
    assert used.startswith("USE-RULE A rule on the length is as good.")
    assert "A rule on the length 80.0 %" in used
    assert used.endswith("A rule needs no model: use it. Use the rule.")
