"""The prompt of training is the prompt of every later command, or the command refuses."""

import io
import json
import shutil

import pytest
from transformers import PreTrainedTokenizerFast

from llmtune.adapters.manifest import read_adapter_manifest
from llmtune.cli import run_command
from llmtune.config import load_config
from llmtune.data.prepare import prepare_examples
from llmtune.data.render import render_messages
from llmtune.data.template import template_fingerprint
from llmtune.evaluation.requests import encode_prompts
from llmtune.evaluation.suite import load_suite
from llmtune.models.checkpoint import Checkpoint
from llmtune.runs.targets import resolve_target
from llmtune.scoring.live import load_target
from llmtune.serving.chat import Chat, ChatSettings
from tests.conftest import write_jsonl
from tests.project import make_project
from tests.tiny import CHATML

SHORT = ["train.max_steps=2", "evaluate.limit=2", "--quiet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run whose template is a file of the user's, with an argument; tests copy it."""
    directory = tmp_path_factory.mktemp("renderer")
    model = {
        "base": str(directory / "base"),
        "chat_template": str(directory / "mine.jinja"),
        "template_arguments": {"style": "brief"},
    }
    config = make_project(directory, model=model)
    (directory / "mine.jinja").write_text("{{ 'Chat: ' + (style or 'long') + ' ' }}" + CHATML)
    assert run_command(["run", str(config), *SHORT]) == 0
    write_jsonl(directory / "prompts.jsonl", [{"prompt": "The film is warm."}])
    return directory


COMMANDS = {
    "chat": ["chat", "{run}"],
    "chat-merged": ["chat", "{run}", "--arm", "merged"],
    "predict": ["predict", "{run}", "--input", "{dir}/prompts.jsonl", "--output", "{out}"],
    "predict-merged": [
        *["predict", "{run}", "--arm", "merged"],
        *["--input", "{dir}/prompts.jsonl", "--output", "{out}"],
    ],
    "eval": ["eval", "{run}", "--force"],
    "merge": ["merge", "{run}", "--out", "{out}"],
    "export": ["export", "{run}", "--to", "gguf", "--type", "f16", "--out", "{out}.gguf"],
    "ollama": ["export", "{run}", "--to", "ollama", "--type", "f16", "--out", "{out}"],
    "verify": ["verify", "{run}/merged", "--against", "{run}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_edited_template_is_refused_by_every_later_command(
    finished, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    run = finished / "run"
    places = {"run": str(run), "dir": str(finished), "out": str(tmp_path / "out")}
    command = [part.format(**places) for part in COMMANDS[name]]
    template = finished / "mine.jinja"
    original = template.read_text()
    template.write_text(original.replace("Chat", "Talk"))
    try:
        assert run_command([*command, "--quiet"]) == 2
    finally:
        template.write_text(original)
    said = capsys.readouterr().err
    assert "chat template" in said and "changed since this adapter was trained" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.gguf").exists()


def test_special_tokens_that_changed_are_refused_too(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    base = finished / "base"
    kept = shutil.copytree(base, tmp_path / "kept")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["bos_token"] = "<|unk|>"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        assert run_command(["chat", str(finished / "run"), "--quiet"]) == 2
    finally:
        shutil.copytree(kept, base, dirs_exist_ok=True)
    assert "changed since this adapter was trained" in capsys.readouterr().err


def test_the_golden_prompt_is_the_same_for_everything_that_is_saved(finished):
    run = finished / "run"
    recorded = read_adapter_manifest(run / "adapter")["template"]
    for directory in (run / "adapter", run / "merged"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        assert template_fingerprint(tokenizer).to_json() == recorded
        chat = [{"role": "user", "content": "Hello"}]
        for style, knobs in {"brief": {}, "wordy": {"style": "wordy"}}.items():
            text = tokenizer.apply_chat_template(chat, tokenize=False, **knobs)
            assert text.startswith(f"Chat: {style} ")


def test_training_evaluation_and_chat_give_the_model_the_same_ids(finished, monkeypatch):
    """One question as a training row, as a suite's item and as a chat's first turn."""
    config = load_config(finished / "config.yaml")
    tokenizer = Checkpoint.open(finished / "base", template=config.model.template).tokenizer
    question = "The film is funny. positive or negative?"
    messages = [{"role": "user", "content": question}]
    prompt = render_messages(tokenizer, messages, add_generation_prompt=True)

    data = prepare_examples(config.data, tokenizer, split="train", seed=0).examples
    asked = tokenizer.decode(prompt)
    (example,) = [e for e in data if tokenizer.decode(e.input_ids).startswith(asked)]
    first = next(i for i, label in enumerate(example.labels) if label != -100)
    assert example.input_ids[:first] == prompt

    write_jsonl(
        finished / "one.jsonl", [{"id": "a", "text": "The film is funny.", "answer": "positive"}]
    )
    suite = json.loads((finished / "sentiment.yaml").read_text()) | {"items": "one.jsonl"}
    (finished / "one.yaml").write_text(json.dumps(suite))
    (ids,) = encode_prompts(tokenizer, load_suite(str(finished / "one.yaml")))
    assert list(ids) == prompt

    given = []

    def watched(model, tokenizer, prompt, decoding):
        given.append(list(prompt))
        yield from ()

    monkeypatch.setattr("llmtune.serving.chat.stream_text", watched)
    settings = ChatSettings(arm=None, max_new_tokens=4, temperature=0.0, system=None, as_json=True)
    Chat(load_target(resolve_target(str(finished / "run"), [])), settings).answer(question)
    assert given == [prompt]
