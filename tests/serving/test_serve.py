"""A served model is asked with OpenAI's own client, and answers as the run's model does."""

import csv
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import openai
import pytest
import torch

from llmtune.checks.runtime import is_runtime_installed
from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.write import GgufRequest, write_gguf
from llmtune.models.checkpoint import Checkpoint
from llmtune.runs.serve import find_servable
from llmtune.runs.targets import resolve_target
from llmtune.scoring.generate import Piece, TokenShare
from llmtune.scoring.live import as_arm
from llmtune.serving import llama_cpp
from llmtune.serving.engine_process import _open, _started, _wait_until_ready
from llmtune.serving.engine_requests import read_for_engine
from llmtune.serving.http_api import HttpSettings
from llmtune.serving.http_server import Server
from llmtune.serving.listening import ServeSettings, bind_socket
from llmtune.serving.live_models import LiveModels, _Teller
from llmtune.serving.names import find_models
from llmtune.serving.openai_api import (
    RefusedRequest,
    StopTexts,
    read_chat,
    read_completion,
)
from llmtune.serving.shapes import Said
from llmtune.serving.start_check import Asked, KnownQuestion, check_answers
from llmtune.serving.vllm import plan_command, refuse_dropped
from tests.conftest import write_jsonl
from tests.data.shapes import ITEM_CALLS, QWEN3
from tests.project import make_project

ASKED: Any = [{"role": "user", "content": "The film is warm. positive or negative?"}]
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "Tells it."}}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A tiny run with everything in it, and a suite whose answers are written."""
    directory = tmp_path_factory.mktemp("serve")
    config = make_project(directory)
    written = {
        "task": "exact",
        "role": "target",
        "items": "items.jsonl",
        "prompt": "{{ text }} positive or negative?",
        "max_new_tokens": 6,
    }
    (directory / "written.yaml").write_text(json.dumps(written))
    values = json.loads(config.read_text())
    values["evaluate"]["suites"].append(str(directory / "written.yaml"))
    values["data"]["train"][0]["format"] = "messages"
    config.write_text(json.dumps(values))
    exact = ["model.dtype=float32", "evaluate.extent=none", "evaluate.limit=6"]
    assert run_command(["run", str(config), *exact, "--quiet"]) == 0
    run_dir = directory / "run"
    (run_dir / "exports").mkdir()
    path = run_dir / "exports" / "tiny-f32.gguf"
    write_gguf(GgufRequest(Checkpoint.open(run_dir / "merged"), path, "f32", "tiny"))
    return run_dir


class Running:
    """A server in a thread of this process."""

    def __init__(self, run_dir, *, max_waiting=16, api_key=None):
        served = find_servable(str(run_dir))
        self.models = LiveModels(find_models(served.target, served.exports))
        self.taken = bind_socket("127.0.0.1", 0)
        self.port = self.taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.server = Server(self.models, HttpSettings("127.0.0.1", api_key), max_waiting)
        self.thread = threading.Thread(target=self.server.take_requests, args=(self.taken,))
        self.thread.start()

    def client(self, key="unused"):
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def stop(self):
        self.server.handle_exit(signal.SIGINT, None)
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def running(run_dir):
    server = Running(run_dir, max_waiting=1)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(running):
    return running.client()


def test_the_models_of_a_run_are_listed_by_their_names(running, client):
    assert [one.id for one in client.models.list()] == ["tuned", "base", "merged", "original"]
    assert client.models.retrieve("merged").owned_by == "llmtune"
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/health") as answer:
        assert json.load(answer) == {"status": "ok"}


def test_a_model_alone_is_the_original_and_a_merged_one_is_merged(run_dir):
    run = resolve_target(str(run_dir))
    base, merged = (
        resolve_target(str(path)) for path in (run.dense_base.directory, run.merged_dir)
    )
    four_bit = resolve_target(base.name, ["model.quantization={method: nf4}"])
    for target, names in [
        (base, ["original"]),
        (merged, ["merged"]),
        (four_bit, ["base", "original"]),
    ]:
        assert [one.name for one in find_models(target, {})] == names
    answer = LiveModels(find_models(base, {})).answer(read_chat({"messages": ASKED, **GREEDY}, 1))
    assert "".join(part.text for part in answer if isinstance(part, Said))
    for target, name in [(base, "original"), (merged, "merged")]:
        plan = plan_command("/bin/vllm", target, ServeSettings())
        assert plan.names == (name,) and target.name in plan.command
        Path(plan.command[-1]).unlink()
    with pytest.raises(LlmtuneError, match="--model base: vLLM serves original"):
        plan_command("/bin/vllm", base, ServeSettings(names=("base",)))


def test_every_model_answers_as_it_was_evaluated(run_dir, client):
    for arm in ("tuned", "base", "merged"):
        result = json.loads((run_dir / "evaluations" / f"written.{arm}.json").read_text())
        items = map(json.loads, (run_dir.parent / "items.jsonl").read_text().splitlines())
        item = next(item for item in items if item["id"] == result["items"][0]["id"])
        asked = [{"role": "user", "content": f"{item['text']} positive or negative?"}]
        answer = client.chat.completions.create(
            model=arm, messages=asked, temperature=0, max_tokens=6
        )
        kept = result["items"][0]
        assert answer.choices[0].message.content == kept["prediction"]
        assert answer.usage.completion_tokens == kept["details"]["num_tokens"]
        ends = {True: "stop", False: "length"}
        assert answer.choices[0].finish_reason == ends[kept["details"]["stopped"]]
        assert answer.model == arm
    original = client.chat.completions.create(model="original", messages=ASKED, **GREEDY)
    base = client.chat.completions.create(model="base", messages=ASKED, **GREEDY)
    assert original.choices[0].message.content == base.choices[0].message.content


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = client.chat.completions.create(model="tuned", messages=ASKED, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            model="tuned",
            messages=ASKED,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    text = client.completions.create(model="base", prompt="The film", **GREEDY)
    parts = client.completions.create(model="base", prompt="The film", stream=True, **GREEDY)
    assert "".join(c.choices[0].text for c in parts) == text.choices[0].text
    assert text.usage.completion_tokens == 8


def test_sampling_follows_the_request(client):
    def draw(**how):
        how = {"model": "base", "messages": ASKED, "max_tokens": 8} | how
        return client.chat.completions.create(**how).choices[0].message.content

    assert draw(seed=1) == draw(seed=1)
    assert len({draw(seed=seed) for seed in range(4)}) > 1
    assert draw(temperature=2, top_p=1e-6, seed=3) == draw(temperature=0)
    text = draw(temperature=0)
    assert len(text) > 3, "the tiny model writes something"
    stop = text[1:3]
    answer = client.chat.completions.create(
        model="base", messages=ASKED, temperature=0, max_tokens=8, stop=stop
    )
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_several_answers_are_those_of_one_request_each_with_its_own_seed(client, monkeypatch):
    def draw(**how):
        how = {"model": "base", "messages": ASKED, "max_tokens": 8, "seed": 3} | how
        return client.chat.completions.create(**how)

    answers = draw(n=3)
    texts = [choice.message.content for choice in answers.choices]
    assert [choice.index for choice in answers.choices] == [0, 1, 2] and len({*texts}) > 1
    assert texts[0] == draw().choices[0].message.content
    one = draw(max_tokens=8, n=1).usage
    assert answers.usage.prompt_tokens == one.prompt_tokens
    assert one.completion_tokens < answers.usage.completion_tokens <= 24
    streamed = dict.fromkeys(range(3), "")
    ends = {}
    for chunk in draw(n=3, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason
    assert list(streamed.values()) == texts
    assert list(ends.values()) == [choice.finish_reason for choice in answers.choices]
    # a stop ends one answer, and the others are written to their end
    stop = texts[0][1:3]
    cut = draw(n=3, stop=stop).choices
    wanted = [text.partition(stop)[0] for text in texts]
    assert [choice.message.content for choice in cut] == wanted
    monkeypatch.setattr("llmtune.serving.live_models.rows_at_once", lambda *_, **__: 2)
    assert [choice.message.content for choice in draw(n=3).choices] == texts


def test_log_probabilities_are_those_of_the_model(running, client):
    asked = {"model": "base", "messages": ASKED, **GREEDY}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    tokens = choice.logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    whole = [token for token in tokens if token.bytes is not None]
    assert len(whole) > 4 and bytes(whole[0].bytes).decode() == whole[0].token
    if len(whole) == len(tokens):
        assert "".join(token.token for token in tokens) == choice.message.content
    # the model itself, asked without any of this
    live = running.models.load("base")
    prompt = live.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    with as_arm(live, "base") as arm, torch.no_grad():
        logs = arm.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    values, ids = logs.topk(3)
    first = tokens[0]
    assert first.logprob == pytest.approx(values[0].item(), abs=1e-4)
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    assert first.top_logprobs[0].token == first.token == live.tokenizer.decode(ids[:1])
    # temperature draws differently, and changes nothing of what the model finds likely
    hot = client.chat.completions.create(
        **asked | {"temperature": 2}, seed=1, logprobs=True, top_logprobs=1, n=2
    )
    for each in hot.choices:
        likely = each.logprobs.content[0].top_logprobs[0]
        assert likely.logprob == pytest.approx(values[0].item(), abs=1e-4)
    # a stop text, and a stream: the tokens of what is shown
    text = choice.message.content
    cut = client.chat.completions.create(**asked, logprobs=True, stop=text[2:4]).choices[0]
    shown = len(cut.logprobs.content)
    assert 0 < shown < len(tokens) and cut.logprobs.content[0].token == first.token
    chunks = client.chat.completions.create(**asked, logprobs=True, stream=True)
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [t.token for part in parts for t in part] == [t.token for t in tokens]
    continued = client.completions.create(model="base", prompt="The film", logprobs=2, **GREEDY)
    shares = continued.choices[0].logprobs
    assert len(shares.tokens) == len(shares.token_logprobs) == 8
    assert all(1 <= len(top) <= 3 for top in shares.top_logprobs), "two halves look the same"
    text = continued.choices[0].text
    for token, offset in zip(shares.tokens, shares.text_offset, strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)


def test_parts_of_a_character_are_where_it_is(running):
    live = running.models.load("base")
    request = read_completion({"prompt": "a", "logprobs": 0}, 1.0)
    pieces = []
    for text in ("a", "\N{GRINNING FACE}", "b"):
        ids = live.tokenizer(text, add_special_tokens=False)["input_ids"]
        shares = tuple(TokenShare(token, 0.0, ()) for token in ids)
        pieces.append(Piece(text, len(ids), False, False, 0, ids, shares))
    teller = _Teller(request, live, live.tokenizer("a")["input_ids"])
    told = [token for piece in pieces for token in teller.tell(piece).tokens]
    assert [told[0].offset, told[1].offset, told[-1].offset] == [0, 1, 2]
    assert len(told) > 3 and {token.offset for token in told[1:-1]} == {1}


def test_tools_reach_the_template_and_calls_are_read_back(run_dir, tmp_path, monkeypatch, caplog):
    base = tmp_path / "base"
    shutil.copytree(run_dir / "merged", base)
    (base / "chat_template.jinja").write_text(QWEN3)
    server = Running(base)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom\\u00e9"}}\n</tool_call>'
    written: list[str] = []

    def write(model, rows, decoding, rooms, *, refill=None, watch=None):
        """What a model would write that has learned to call."""
        live = server.models.load()
        ids = live.tokenizer(written[0], add_special_tokens=False)["input_ids"]
        for token in (*ids, live.stop_token_ids[0])[: decoding.max_new_tokens]:
            if watch is not None:
                watch(rows.places, rows.logits.float(), [token] * len(rows.places))
            yield from ((place, token) for place in rows.places)

    monkeypatch.setattr("llmtune.scoring.generate.write_rows", write)
    client = server.client()

    def ask(text, **more):
        written[:] = [text]
        how = {"model": "original", "messages": ASKED, "tools": TOOLS, "temperature": 0} | more
        return client.chat.completions.create(**how)

    try:
        answer = ask(f"Let me see.\n{call}\n{call}", logprobs=True, n=2)
        for choice in answer.choices:
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
            one, two = choice.message.tool_calls
            assert (one.function.name, one.id != two.id) == ("weather", True)
            assert json.loads(one.function.arguments) == {"city": "Romé"}
            assert len(choice.logprobs.content) * 2 == answer.usage.completion_tokens
        asked = [*ASKED, answer.choices[0].message.model_dump(exclude_none=True)]
        asked += [{"role": "tool", "tool_call_id": one.id, "content": "Warm."}] * 2
        more = ask("It is warm.", messages=asked)
        assert more.choices[0].message.content == "It is warm."
        assert more.usage.prompt_tokens > answer.usage.prompt_tokens
        chunks = [c.choices[0] for c in ask(f"Let me see.\n{call}", stream=True)]
        said = "".join(c.delta.content or "" for c in chunks)
        (found,) = [c.delta.tool_calls for c in chunks if c.delta.tool_calls]
        assert said == "Let me see." and found[0].function.name == "weather"
        assert chunks[-1].finish_reason == "tool_calls"
        alone = ask(call).choices[0].message
        assert alone.content is None and len(alone.tool_calls) == 1
        torn = [c.choices[0] for c in ask(f"See: {call[:-20]}", stream=True)]
        assert "".join(c.delta.content or "" for c in torn) == f"See: {call[:-20]}"
        assert torn[-1].finish_reason == "stop"
        begun = f"{call}\n<tool_call>"
        tokens = server.models.load().tokenizer(begun, add_special_tokens=False)["input_ids"]
        endless = ask(f"{begun} Rome", max_tokens=len(tokens)).choices[0]
        assert endless.finish_reason == "length", "what was cut off is not told as whole"
        plain = ask(call, tool_choice="none")
        assert plain.choices[0].message.tool_calls is None
        assert plain.usage.prompt_tokens < answer.usage.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="tools holds"):
            ask(call, tools=[{"type": "function"}])
        assert not caplog.records
    finally:
        server.stop()
    (base / "chat_template.jinja").write_text(ITEM_CALLS)
    text = "<tool_call>weather\n</tool_call>"
    models = LiveModels(find_models(resolve_target(str(base)), {}))
    monkeypatch.setattr(server, "models", models)
    written[:] = [text]
    request = read_chat({"messages": ASKED, "tools": TOOLS}, 0)
    parts = [part for part in models.answer(request) if isinstance(part, Said)]
    assert "".join(part.text for part in parts) == text and parts[-1].finish == "stop"
    assert "writes calls in a form that is not read back" in caplog.text


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 0}, "n", "n is 0"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "take it out"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not constrained"),
        ({"tools": [{"type": "function"}]}, "tools", "tools holds"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "nothing makes the model"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "nothing keeps"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"temprature": 0}, "temprature", 'did you mean "temperature"'),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "template_arguments"),
        ({"temperature": 3}, "temperature", "temperature is 3"),
        ({"temperature": float("nan")}, "temperature", "temperature is NaN"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"seed": "x"}, "seed", "seed is"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "is empty; expected at least one of the user"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", 'role "robot"'),
        ({"stream_options": {}}, "stream_options", "stream: true"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(change, param, words):
    with pytest.raises(RefusedRequest, match=words) as caught:
        read_chat({"model": "tuned", "messages": ASKED, **change}, 1.0)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_asks_for_nothing_is_taken():
    neutral = {"n": 1, "logprobs": False, "frequency_penalty": 0.0, "user": "me", "tools": [],
               "response_format": {"type": "text"}, "top_p": None, "store": True}  # fmt: skip
    asked = read_chat({"messages": ASKED, **neutral}, 0.25)
    assert (asked.temperature, asked.top_p, asked.max_tokens) == (0.25, 1.0, None)
    assert read_completion({"prompt": [[1, 2]]}, 1.0).prompt == (1, 2)
    assert read_completion({"prompt": ["a"]}, 1.0).max_tokens == 16
    assert read_completion({"prompt": "a", "logprobs": False}, 1.0).num_likeliest is None
    for prompt in ("", [], ["a", "b"], [["a"]]):
        with pytest.raises(RefusedRequest, match="prompt"):
            read_completion({"prompt": prompt}, 1.0)


def test_errors_have_the_shape_that_the_client_knows(running, client):
    with pytest.raises(openai.NotFoundError, match="there is: tuned, base, merged, original"):
        client.chat.completions.create(model="gpt-4", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported"):
        client.chat.completions.create(model="base", messages=ASKED, logit_bias={"1": 1})
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="base", prompt="word " * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        client.embeddings.create(model="base", input="x")
    request = urllib.request.Request(f"{running.url}/chat/completions", b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="415"):
        urllib.request.urlopen(request)
    request = urllib.request.Request(f"{running.url}/models", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_one_request_at_a_time_a_short_queue_and_a_client_that_leaves(running, client):
    endless = {"model": "base", "messages": ASKED, "temperature": 2, "seed": 1, "stream": True}
    written = []
    plain = running.models.answer

    def counted(request, is_cancelled=lambda: False):
        for part in plain(request, is_cancelled):
            written.append(part)
            time.sleep(0.05)
            yield part

    running.models.answer = counted
    try:
        first = client.chat.completions.create(**endless)
        next(iter(first))
        answers = []

        def wait_for_answer():
            answers.append(client.chat.completions.create(model="base", messages=ASKED, **GREEDY))

        waiting = threading.Thread(target=wait_for_answer)
        waiting.start()
        deadline = time.monotonic() + 10
        while running.server.worker._unfinished < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(openai.InternalServerError, match="1 requests are waiting"):
            client.chat.completions.create(model="base", messages=ASKED, **GREEDY)
        assert not answers, "the second waits for the first"
        first.close()
        waiting.join(20)
        assert len(answers) == 1
        left = len(written)
        time.sleep(0.3)
        assert len(written) == left, "nothing is written for the one who left"
    finally:
        running.models.answer = plain


def test_a_server_leaves_the_logging_of_the_process_alone(running):
    """absl, for one, closes the output that it was imported with when its handler is closed."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.close = stream.close
    try:
        Server(running.models, HttpSettings("127.0.0.1"))
        assert not stream.closed
    finally:
        del handler.close


def test_a_key_is_asked_for_and_ctrl_c_ends_what_is_written(run_dir):
    server = Running(run_dir, api_key="secret")
    try:
        with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
            server.client("wrong").models.list()
        client = server.client("secret")
        assert client.models.list().data
        stream = client.chat.completions.create(
            model="base", messages=ASKED, temperature=2, stream=True, seed=1
        )
        next(iter(stream))
    finally:
        server.stop()
    with pytest.raises(openai.APIError):
        list(stream)


def test_stop_texts_hold_back_what_may_become_one():
    stops = StopTexts(["END", "\n\n"])
    assert [stops.feed(text) for text in ("a", "E", "x", "\n", "EN", "D b")] == [
        "a", "", "Ex", "", "\n", "",
    ]  # fmt: skip
    assert stops.found
    held = StopTexts(["END"])
    assert held.feed("xEN") + held.feed("", is_last=True) == "xEN"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt"], "--model gpt: {run} has no such model; there is: tuned, base, merged"),
        (["--api-key-env", "NOT_SET_HERE"], "--api-key-env NOT_SET_HERE: the environment variable"),
        (["--port", "{taken}"], "--host 127.0.0.1 --port {taken}: cannot be listened on"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_what_cannot_be_served_is_one_line(run_dir, capsys, arguments, words):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        names = {"run": str(run_dir), "taken": str(other.getsockname()[1])}
        arguments = [each.format(**names) for each in arguments]
        assert run_command(["serve", str(run_dir), *arguments]) == 2
    err = capsys.readouterr().err
    assert words.format(**names) in err and err.count("error:") == 1


@contextmanager
def serving(*arguments, env=None):
    """The command in a process of its own: what it prints, a client, and how it ended."""
    command = [sys.executable, "-m", "llmtune", "serve", *map(str, arguments), "--json"]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    ended: dict[str, Any] = {}
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield json.loads(line), ended
        process.send_signal(signal.SIGINT)
        ended["err"] = process.communicate(timeout=30)[1]
        ended["code"] = process.returncode
    finally:
        process.kill()


@pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")
def test_llama_cpp_serves_an_exported_file_with_its_own_server(run_dir, running):
    arguments = [run_dir, "--engine", "llama.cpp", "--api-key-env", "KEY_HERE"]
    with serving(*arguments, env={"KEY_HERE": "secret"}) as (facts, ended):
        client = openai.OpenAI(base_url=facts["url"], api_key="secret", max_retries=0)
        assert [one.id for one in client.models.list()] == ["tiny-f32"] == facts["models"]

        def ask(**more):
            how: dict[str, Any] = {"model": "tiny-f32", "messages": ASKED, **GREEDY, **more}
            return client.chat.completions.create(**how)

        answer = ask()
        merged = running.client().chat.completions.create(model="merged", messages=ASKED, **GREEDY)
        assert answer.usage.prompt_tokens == merged.usage.prompt_tokens
        chunks = list(ask(stream=True, stream_options={"include_usage": True}))
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert said == answer.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        _check_parameters(client, ask)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=facts["url"], api_key="x").models.list()
        endless = ask(stream=True, temperature=2, max_tokens=4000, logit_bias={"2": -100})
        next(iter(endless))
    assert ended["code"] == 0, ended["err"]
    assert facts["check"]["asked"] == 3 and facts["check"]["rounding"] is None
    assert "secret" not in ended["err"] and "Traceback" not in ended["err"]


def _check_parameters(client: openai.OpenAI, ask: Any) -> None:
    """What is asked of llama.cpp is done, or refused in the protocol's shape."""
    assert ask(temperature=2, seed=1).choices[0].message.content == (
        ask(temperature=2, seed=1).choices[0].message.content
    )
    assert ask(temperature=2, top_p=1e-6, seed=3).choices[0].message.content == (
        ask().choices[0].message.content
    )
    shares = ask(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(shares[0].top_logprobs) == 3
    text = ask().choices[0].message.content
    stop = re.findall("[a-z]", text[1:])[0]
    assert ask(stop=stop).choices[0].message.content == text[: text.index(stop)]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x", "y"]}}}
    assert json.loads(ask(response_format=form).choices[0].message.content) in ("x", "y")
    assert ask(max_tokens=openai.omit, max_completion_tokens=2).usage.completion_tokens == 2
    changes: list[tuple[dict[str, Any], str]] = [
        ({"extra_body": {"temprature": 1}}, 'unknown parameter temprature .did you mean "temp'),
        ({"extra_body": {"seed": "x"}}, 'seed is "x"'),
        ({"model": "gpt-4"}, "there is: tiny-f32"),
        ({"n": 2}, "n is not supported here"),
        ({"functions": [{"name": "f"}]}, "functions is not supported here"),
        ({"reasoning_effort": "low"}, "unknown parameter reasoning_effort"),
        ({"response_format": {"type": "tea"}}, 'type is "tea"; expected text, json_object'),
        ({"response_format": {"type": "json_schema"}}, "holds no schema"),
        ({"tools": [{"type": "function"}]}, "the template of tiny-f32.gguf has no place for them"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'role "robot" is not known'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text parts only"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "text parts only"),
        ({"tool_choice": "required"}, "tool_choice is not supported here"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "llama.cpp: "),
    ]
    for change, words in changes:
        with pytest.raises(openai.APIStatusError, match=words) as caught:
            ask(**change)
        assert caught.value.status_code in (400, 404), change
        assert caught.value.body["type"] == "invalid_request_error"
    whole = client.completions.create(model="tiny-f32", prompt="The film", temperature=0)
    assert whole.usage.completion_tokens <= 16
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        client.completions.create(model="tiny-f32", prompt="The film", logprobs=1)
    with pytest.raises(openai.BadRequestError, match="echo is not supported"):
        client.completions.create(model="tiny-f32", prompt="The film", echo=True)


def test_a_choice_among_tools_needs_tools():
    body = {"messages": ASKED, "tool_choice": "required"}
    follows = llama_cpp.FOLLOWS
    with pytest.raises(RefusedRequest, match="tool_choice needs tools"):
        read_for_engine(body, follows, ("a", "b"), 0.5, is_chat=True)
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = read_for_engine({**body, "tools": tools}, follows, ("a", "b"), 0.5, is_chat=True)
    assert asked.body["temperature"] == 0.5 and asked.model == "a"
    assert "cache_prompt" not in asked.body
    seeded = read_for_engine({**body, "tools": tools, "seed": 1}, follows, ("a",), 1, is_chat=True)
    assert seeded.body["cache_prompt"] is False


@pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")
def test_llama_cpp_prints_the_date_of_the_run(run_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(run_dir / "merged", base)
    dated = "\n{{ strftime_now('%d %B %Y') }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    (base / "chat_template.jinja").write_text(dated)
    path = tmp_path / "tiny.gguf"
    write_gguf(GgufRequest(Checkpoint.open(base), path, "f32", "tiny"))
    target = replace(resolve_target(str(run_dir)), name=str(path), template_date="2024-02-29")
    plan = llama_cpp.plan_llama_cpp(target, {}, ServeSettings())
    with _started(plan) as process:
        _wait_until_ready(process)
        body = json.dumps({"messages": ASKED}).encode()
        with _open(f"{process.url}/apply-template", process.key, body) as answer:
            prompt = json.load(answer)["prompt"]
    checkpoint = replace(Checkpoint.open(base), template_date="2024-02-29")
    assert prompt == checkpoint.tokenizer.apply_chat_template(ASKED, tokenize=False)
    assert prompt.lstrip().startswith("29 February 2024|The film")


@pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")
def test_a_file_that_llama_cpp_cannot_serve_is_one_line(run_dir, tmp_path, capsys):
    assert run_command(["serve", str(run_dir / "merged"), "--engine", "llama.cpp"]) == 2
    assert "no GGUF file, which is what llama.cpp reads" in capsys.readouterr().err
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert run_command(["serve", str(tmp_path / "lora.gguf")]) == 2
    assert "holds an adapter, not a whole model" in capsys.readouterr().err
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert run_command(["serve", str(tmp_path / "empty.gguf"), "--port", "0"]) == 2
    assert "llama.cpp ended by itself" in capsys.readouterr().err


def test_a_rounded_file_is_not_called_a_fault(run_dir, caplog):
    served = find_servable(str(run_dir))
    fault = "so what it says of the model may not hold here"
    for rounding, same, words in [
        ("q8_0", 1, "whose weights this file holds in q8_0: some answers"),
        ("other", 1, "whose weights this file holds in numbers of an unknown type: some answers"),
        ("q8_0", 0, fault),  # rounding alone leaves some as they are
        (None, 1, fault),
    ]:
        asked = Asked("tiny", "merged", rounding=rounding)
        right = iter([True] * same + [False] * 2)

        def answer(one: KnownQuestion, right: Iterator[bool] = right) -> str:
            return one.kept.text if next(right) else "something else"

        checked = check_answers(asked, served.known, 2, answer)
        checked.say()
        said = f"WARNING: tiny gives only {same} of 2 answers of the report's merged model, {words}"
        assert said in caplog.text
        caplog.clear()


def test_the_command_checks_serves_and_ends_with_zero(run_dir):
    result = run_dir / "evaluations" / "written.tuned.json"
    kept = result.read_text()
    values = json.loads(kept)
    values["items"][0]["prediction"] = "something else"
    result.write_text(json.dumps(values))
    try:
        with serving(run_dir, "--host", "0.0.0.0") as (facts, ended):
            url = facts["url"].replace("0.0.0.0", "127.0.0.1")
            client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
            answer = client.chat.completions.create(model="tuned", messages=ASKED, **GREEDY)
            assert answer.choices[0].message.content
    finally:
        result.write_text(kept)
    err = ended["err"]
    assert ended["code"] == 0, err
    assert (facts["engine"], facts["models"][0]) == ("transformers", "tuned")
    assert facts["check"]["asked"] == 3
    (difference,) = facts["check"]["differences"]
    assert difference["reported"] == "something else"
    assert "WARNING: tuned gives only 2 of 3 answers of the report" in err
    assert "WARNING: --host 0.0.0.0 without --api-key-env" in err
    assert "Traceback" not in err


def test_the_commands_and_the_client_of_the_docs_work(run_dir, running, monkeypatch, capsys):
    docs = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", docs, re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("SERVE_KEY", "secret")
    monkeypatch.setattr("llmtune.serving.http_server.Server.take_requests", lambda *_: None)
    monkeypatch.setattr("llmtune.serving.serve.run_engine", lambda *_: None)
    lines = [line for kind, block in blocks if kind in ("", "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("llmtune serve")]
    assert len(commands) >= 3
    for command in commands:
        arguments = shlex.split(command.replace("runs/quickstart", str(run_dir)))[1:]
        assert run_command([*arguments, "--port", "0", "--check", "1"]) == 0, command
    (script,) = [block for kind, block in blocks if kind == "python"]
    exec(script.replace("http://127.0.0.1:8000/v1", running.url), {})
    assert capsys.readouterr().out.count("(transformers); Ctrl-C ends it") >= 2


def test_predict_labels_rows_as_the_report_scores_them(run_dir, tmp_path, capsys):
    result = json.loads((run_dir / "evaluations" / "sentiment.tuned.json").read_text())
    scores = {item["id"]: item for item in result["items"]}
    items = run_dir.parent / "items.jsonl"
    table, named = tmp_path / "labels.csv", ["--answer-column", "label", "--quiet"]
    command = ["predict", str(run_dir), "--input", str(items), "--output", str(table), *named]
    assert run_command([*command, "--suite", str(run_dir.parent / "sentiment.yaml")]) == 0
    with table.open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert set(scores) < set(rows) and len(rows) == 12
    for name, score in scores.items():
        shares = [float(rows[name][f"label_probabilities: {c}"]) for c in ("positive", "negative")]
        assert shares == pytest.approx(score["details"]["probabilities"], abs=1e-5)
        assert rows[name]["label"] == score["prediction"]

    asked = [
        {"id": row["id"], "prompt": f"{row['text']} positive or negative?"} for row in rows.values()
    ]
    prompts, labels = write_jsonl(tmp_path / "asked.jsonl", asked), tmp_path / "labels.jsonl"
    command = ["predict", str(run_dir), "--input", str(prompts), "--output", str(labels)]
    assert run_command([*command, "--choices", "positive, negative", "--quiet"]) == 0
    for line in labels.read_text().splitlines():
        row = json.loads(line)
        assert row["answer"] == rows[row["id"]]["label"]
        assert row["probabilities"]["positive"] == pytest.approx(
            float(rows[row["id"]]["label_probabilities: positive"]), abs=1e-6
        )
    # `init` writes suites over `prompt`: rows as they were trained on are asked by them, too
    own = {"task": "choice", "prompt": "{{ prompt }}", "choices": ["positive", "negative"]}
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "?", "answer": "positive"}])
    (tmp_path / "own.yaml").write_text(json.dumps({**own, "items": "one.jsonl"}))
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in asked]
    trained, same = write_jsonl(tmp_path / "chats.jsonl", chats), tmp_path / "same.jsonl"
    again = ["predict", str(run_dir), "--input", str(trained), "--output", str(same), "--quiet"]
    assert run_command([*again, "--suite", str(tmp_path / "own.yaml")]) == 0
    answers = [json.loads(path.read_text().splitlines()[3])["answer"] for path in (same, labels)]
    assert answers[0] == answers[1]
    capsys.readouterr()
    elsewhere = [*command[:-1], str(tmp_path / "more.jsonl")]
    for more, words in [
        (["--choices", "one"], "expected at least two different labels"),
        (["--choices", "a,a"], "expected at least two different labels"),
        (["--choices", "[1]"], "expected a list of texts"),
        (["--suite", str(run_dir.parent / "prose.yaml")], "has no labels that are the same"),
        (["--suite", str(run_dir.parent / "sentiment.yaml")], "asked.jsonl:1: "),
        (["--choices", "a,b", "--suite", "x"], "--choices and --suite both"),
        (["--model", "x"], "--model and --api-key-env are for --server"),
        (["--server", "http://127.0.0.1:1/v1", "--model", "x"], "take out TARGET"),
    ]:
        assert run_command([*elsewhere, *more]) == 2
        assert words in capsys.readouterr().err, more
    assert not (tmp_path / "more.jsonl").exists()


def test_predict_asks_a_server_and_continues(run_dir, running, tmp_path, capsys):
    asked = [{"prompt": f"The {thing} is warm."} for thing in ("film", "plot")]
    prompts = write_jsonl(tmp_path / "asked.jsonl", asked)
    own, remote = tmp_path / "own.jsonl", tmp_path / "remote.jsonl"
    how = ["--input", str(prompts), "--max-new-tokens", "6", "--quiet", "--output"]
    assert run_command(["predict", str(run_dir), *how, str(own)]) == 0
    ask = ["predict", "--server", running.url, "--model"]
    assert run_command([*ask, "gpt", *how, str(remote)]) == 2
    assert "404 no model 'gpt' here; there is: tuned, base" in capsys.readouterr().err
    assert not [*tmp_path.glob("remote*")], "a command that failed at once leaves nothing"
    assert run_command([*ask, "tuned", *how, str(remote)]) == 0
    assert remote.read_text() == own.read_text()
    assert run_command(["predict", *how, str(tmp_path / "x.jsonl")]) == 2
    assert "nobody to answer" in capsys.readouterr().err
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "Once"}])
    how[1] = str(texts)
    assert run_command([*ask, "tuned", *how, str(tmp_path / "x.jsonl")]) == 2
    assert "texts.jsonl:1: is continued as it is" in capsys.readouterr().err


def test_predict_names_rows_that_a_server_refuses_and_keeps_the_rest(running, tmp_path, capsys):
    asked = [{"prompt": f"The film {i} is warm."} for i in range(6)]
    asked[1], asked[4] = {"prompt": "word " * 5000}, {"prompt": "a <|im_end|> b"}
    prompts, out = write_jsonl(tmp_path / "asked.jsonl", asked), tmp_path / "out.jsonl"
    files = ["--input", str(prompts), "--output", str(out), "--max-new-tokens", "2", "--quiet"]
    ask = ["predict", "--server", running.url, "--model", "tuned", *files]
    running.server.worker._max_waiting, before = 16, running.server.worker._max_waiting
    try:
        assert run_command(ask) == 2
        err = capsys.readouterr().err
        assert "asked.jsonl:2: " in err and "positions; shorten it" in err
        assert "asked.jsonl:5: " in err and "holds the control token" in err
        assert "4 answers are kept; the same command with --too-long skip" in err
        assert not out.exists()
        assert run_command([*ask, "--too-long", "skip"]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["answer"] is None for row in rows] == [i in (1, 4) for i in range(6)]
        assert "positions" in rows[1]["skipped"] and not out.with_name("out.jsonl.partial").exists()
        out.unlink()
        write_jsonl(prompts, [asked[1]] * 12)
        assert run_command([*ask, "--too-long", "skip"]) == 2
        assert not [*tmp_path.glob("out*")] and "positions; shorten it" in capsys.readouterr().err
    finally:
        running.server.worker._max_waiting = before
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        ask[2] = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        assert run_command(ask) == 2
    assert "nothing listens there (connection refused)" in capsys.readouterr().err
    ask[2] = running.url.removesuffix("/v1")
    assert run_command(ask) == 2
    assert "an address usually ends in /v1" in capsys.readouterr().err
    assert run_command([*ask, "--api-key-env", "NOT_SET_HERE"]) == 2
    assert "--api-key-env: the environment variable NOT_SET_HERE" in capsys.readouterr().err


def test_vllm_is_started_with_what_was_trained(run_dir, capsys):
    target = resolve_target(str(run_dir))
    settings = ServeSettings(port=0, temperature=0.0)
    plan = plan_command("/bin/vllm", target, settings)
    command = [str(part) for part in plan.command]
    options = dict(zip(command[3::2], command[4::2], strict=False))
    assert command[:3] == ["/bin/vllm", "serve", str(target.dense_base.directory)]
    assert options["--port"] == "{port}" and options["--dtype"] == "float32"
    assert options["--generation-config"] == "vllm"
    assert json.loads(options["--override-generation-config"]) == {"temperature": 0.0}
    assert options["--served-model-name"] == "base" and plan.names == ("tuned", "base")
    assert "--enable-lora" in command
    assert command[command.index("--max-lora-rank") + 1] == "8", "rank 4 fits"
    module = json.loads(command[command.index("--lora-modules") + 1])
    assert module == {"name": "tuned", "path": str((run_dir / "adapter").absolute())}
    template = Path(command[command.index("--chat-template") + 1])
    assert template.read_text() == target.dense_base.tokenizer.chat_template
    assert plan.key_variable == "VLLM_API_KEY" and not any("KEY" in part for part in command)
    template.unlink()

    merged = plan_command("/bin/vllm", target, ServeSettings(names=("merged",)))
    assert str(run_dir / "merged") in merged.command and "--enable-lora" not in merged.command
    assert (merged.names, merged.arm) == (("merged",), "merged")
    Path(merged.command[-1]).unlink()
    with pytest.raises(LlmtuneError, match="serve merged alone"):
        plan_command("/bin/vllm", target, ServeSettings(names=("tuned", "merged")))
    four_bit = resolve_target(str(run_dir), ["model.quantization={method: nf4}"])
    with pytest.raises(LlmtuneError, match="does not compute the nf4 base"):
        plan_command("/bin/vllm", four_bit, settings)
    if importlib.util.find_spec("vllm") is None:
        assert run_command(["serve", str(run_dir), "--engine", "vllm"]) == 2
        assert "needs vLLM, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"peft_type": "ADALORA"},
        {"something_new": 1},
    ],
)
def test_what_vllm_would_drop_of_an_adapter_is_refused_by_name(run_dir, change):
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    refuse_dropped(config, "adapter")
    (name,) = change
    with pytest.raises(LlmtuneError, match=f"vLLM does not apply {name} of an adapter"):
        refuse_dropped(config | change, "adapter")
