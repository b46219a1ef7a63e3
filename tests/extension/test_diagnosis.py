"""A new diagnosis is one file and one entry: measured, kept, shown, or listed as not measured."""

import json

from tests.extension.house import House
from tests.project import make_project

ANSWER_LENGTH = '''
"""How long the answers of base and tuned model are."""

import contextlib
from dataclasses import dataclass
from typing import ClassVar

from llmtune.evaluation.diagnosis.base import Diagnosis, Diagnostic, Paragraph, Planned, Section


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


def test_a_new_diagnosis_is_measured_at_its_extent_and_shown(tmp_path):
    house = House(tmp_path / "house")
    house.add("evaluation/diagnosis/answer_length.py", ANSWER_LENGTH)
    house.enter(
        "evaluation/diagnosis/config.py",
        {
            "from llmtune.evaluation.diagnosis.base import Diagnosis\n": (
                "from llmtune.evaluation.diagnosis.answer_length import AnswerLength\n"
                "from llmtune.evaluation.diagnosis.base import Diagnosis\n"
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
