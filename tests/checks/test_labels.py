"""The file in llama.cpp labels items as the model does; a run exports what its config names."""

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune import export, load_config, verify
from llmtune.checks.labels import (
    compare_labels,
    file_labels,
    first_token_questions,
    label_in_model,
)
from llmtune.checks.runtime import RuntimeRequest, ask_runtime, is_runtime_installed
from llmtune.checks.verification import Tolerances
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.exporting.gguf_writer.write import GgufRequest, write_gguf
from llmtune.models.checkpoint import Checkpoint
from llmtune.runs import pipeline
from llmtune.runs.verify import verify_target
from tests.project import make_project
from tests.tiny import make_model

needs_runtime = pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")


def test_choices_that_begin_alike_are_not_asked():
    questions = first_token_questions([[5], [6]], [[[1, 2], [1, 3]], [[1, 2], [4]]], [0, 1])
    assert [(q.prompt_ids, q.first_ids, q.answer) for q in questions] == [((6,), (1, 4), 1)]


@needs_runtime
def test_labels_in_llama_cpp_are_those_of_transformers(llama_dir, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(GgufRequest(Checkpoint.open(llama_dir), path, "f32", "tiny"))
    model = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 480, (12,), generator=draw).tolist() for _ in range(12)]
    # Some candidates are likely, some are far down the vocabulary.
    choices = [[[number], [number + 1], [300 + number]] for number in range(10, 22)]
    questions = first_token_questions(prompts, choices, [0] * 12)
    candidates = [(question.prompt_ids, question.first_ids) for question in questions]
    asked = ask_runtime(path, RuntimeRequest(candidates=candidates))
    labels = label_in_model(model, questions), file_labels(asked)
    found = compare_labels("tiny", questions, *labels)
    assert (found.n, found.num_same) == (12, 12)
    assert found.model_accuracy == found.file_accuracy
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
    right = [
        int(max(range(3), key=lambda c: float(one[q.first_ids[c]]))) == 0
        for one, q in zip(logits, questions, strict=True)
    ]
    assert found.model_accuracy == pytest.approx(sum(right) / 12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    section = {"to": ["gguf", "adapter-gguf"], "type": "f16"}
    path = make_project(tmp_path_factory.mktemp("exports"), export=section)
    config = load_config(path)
    pipeline.run(config)
    return config


def test_a_run_ends_with_the_exports_that_its_config_names(finished):
    made = {path.name for path in (finished.run.path / "exports").iterdir()}
    assert made == {"run-f16.gguf", "run-f16-adapter.gguf"}


def test_a_finished_export_is_skipped_and_one_that_is_gone_is_made_again(finished):
    paths = {kind: result["out"] for kind, result in export(finished).items()}
    stamps = {kind: open(path, "rb").read() for kind, path in paths.items()}  # noqa: SIM115, PTH123
    (finished.run.path / "exports" / "run-f16.gguf").unlink()
    assert {kind: result["out"] for kind, result in export(finished).items()} == paths
    assert (finished.run.path / "exports" / "run-f16.gguf").read_bytes() == stamps["gguf"]


@needs_runtime
def test_verify_compares_the_labels_of_the_target_suite(finished, tmp_path):
    path = finished.run.path / "exports" / "run-f16.gguf"
    verified = verify_target(path, str(finished.run.path), [], Tolerances())
    verified.require_passed()
    result: Any = verified.to_dict()
    for compared, against, max_kl in (
        (result["file"], "merged model", 0.01),
        (result["chain"], "live adapter", 0.06),
    ):
        assert compared["against"] == against
        assert compared["max_kl"] == pytest.approx(max_kl)
        [labels] = compared["labels"]
        assert (labels["suite"], labels["n"], labels["num_same"]) == ("sentiment", 12, 12)
        assert compared["num_same_prompts"] == compared["num_prompts"] == 20
    shown = verified.describe()
    assert "label accuracy, sentiment" in shown
    assert "is the file right?" in shown
    json.dumps(result)

    other = tmp_path / "other.gguf"
    make_model("llama", tmp_path / "other", seed=5)
    write_gguf(GgufRequest(Checkpoint.open(tmp_path / "other"), other, "f16", "other"))
    with pytest.raises(CheckFailed, match="KL to the merged model"):
        verify(other, finished.run.path)


def test_a_base_that_cannot_be_exported_is_refused_before_training(tmp_path):
    path = make_project(tmp_path, "gpt_neox", export={"to": ["gguf"]})
    config = load_config(path)
    with pytest.raises(LlmtuneError, match="gpt_neox|GPTNeoX"):
        pipeline.run(config)
    assert not config.run.adapter_dir.exists()


def test_kinds_and_types_of_the_section_are_checked(tmp_path):
    path = make_project(tmp_path)
    with pytest.raises(LlmtuneError, match="adapter-gguf"):
        load_config(path, ["export.to=[ggfu]"])
    with pytest.raises(LlmtuneError, match="q8_0"):
        load_config(path, ["export.type=q4_9"])


@needs_runtime
def test_an_export_of_an_earlier_adapter_is_told_apart_and_does_not_stay(finished, tmp_path):
    kept = tmp_path / "kept.gguf"
    shutil.copy(finished.run.path / "exports" / "run-f16.gguf", kept)
    again = load_config(finished.run.path.parent / "config.yaml", ["seed=3"])
    pipeline.train(again, force=True)
    assert not (finished.run.path / "exports").exists()
    verified = verify_target(kept, str(finished.run.path), [], Tolerances())
    assert any("made from a different adapter" in one for one in verified.found.problems)
