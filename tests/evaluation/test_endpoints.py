"""A model behind an endpoint is asked once per item, from a key that is written nowhere."""

import json
import socket
import struct
import threading
import time
from typing import Any

import pytest

from llmtune.cli import run_command
from llmtune.data.prompts import PromptChoice, read_prompt_rows
from llmtune.errors import LlmtuneError
from llmtune.evaluation.endpoint import (
    Endpoint,
    EndpointConfig,
    Question,
    Reply,
    ask_all,
    describe_cost,
)
from llmtune.evaluation.endpoints import _question
from llmtune.evaluation.suite import load_suite
from llmtune.serving.answerers import Asker
from tests.conftest import write_jsonl
from tests.project import make_project
from tests.stand_in import KEY, StandIn


def label(messages):
    good = ("warm", "funny", "bright", "moving", "clever", "lovely", "brisk", "tender")
    return (
        "It is positive." if any(word in messages[-1]["content"] for word in good) else "negative"
    )


def test_an_endpoint_is_an_arm_with_its_price(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_KEY", KEY)
    path = make_project(tmp_path)
    stand_in = StandIn(label, statuses=[503])
    with stand_in.serve() as url:
        api = f"{{url: {url}, model: big, key_env: STAND_IN_KEY, input_price: 2, output_price: 10}}"
        command = [
            *("judge", str(tmp_path / "base"), "--base", str(tmp_path / "base")),
            *("--out", str(tmp_path / "out"), "--suites", str(tmp_path / "sentiment.yaml")),
            *(f"evaluate.endpoints={{api: {api}}}", "evaluate.bootstrap_samples=1000", "-q"),
        ]
        assert run_command(command) == 0
        assert len(stand_in.asked) == 12 + 1  # one was refused at first
        assert {auth for _, auth, _ in stand_in.asked} == {f"Bearer {KEY}"}
        assert run_command([*command, "evaluate.confidence=0.9"]) == 0
        assert len(stand_in.asked) == 13  # what was answered is not asked, nor paid, again
    out = tmp_path / "out"
    arm = json.loads((out / "report.json").read_text())["suites"]["sentiment"]["arms"]["other-api"]
    assert arm["mean"] == 1.0
    assert arm["about"]["price_per_1000"] == pytest.approx((100 * 2 + 10 * 10) / 1000)
    assert "0.3 per 1,000 requests" in (out / "report.html").read_text()
    capsys.readouterr()
    assert path.is_file()
    for file in out.rglob("*"):
        if file.is_file() and not file.is_symlink():
            assert KEY.encode() not in file.read_bytes()


def test_what_is_wrong_is_said_before_anything_is_sent_and_never_the_key(monkeypatch):
    for settings, said in (
        ({"url": "ftp://x/v1"}, "expected http"),
        ({"url": "https://x/v1", "key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
        ({"url": "http://192.0.2.1/v1", "key_env": "STAND_IN_KEY"}, "unencrypted"),
    ):
        monkeypatch.setenv("STAND_IN_KEY", KEY)
        with pytest.raises(LlmtuneError, match=said):
            Endpoint("api", EndpointConfig(model="big", **settings))
    stand_in = StandIn(label, statuses=[401])
    with stand_in.serve() as url:
        endpoint = Endpoint("api", EndpointConfig(url=url, model="big", key_env="STAND_IN_KEY"))
        with pytest.raises(LlmtuneError, match="401") as raised:
            endpoint.ask([{"role": "user", "content": "Hi"}], 8)
    assert KEY not in str(raised.value) and "***" in str(raised.value)
    assert "it refuses the key in $STAND_IN_KEY" in str(raised.value)
    stand_in.statuses = [403, 403]
    with stand_in.serve() as url:
        for key, said in (("STAND_IN_KEY", "may refuse the key in"), (None, "may ask for a key")):
            endpoint = Endpoint("api", EndpointConfig(url=url, model="big", key_env=key))
            with pytest.raises(LlmtuneError, match=said):
                endpoint.ask([{"role": "user", "content": "Hi"}], 8)


def test_the_request_holds_what_was_asked_for_and_a_redirect_is_not_followed():
    config = {"model": "big", "extra": {"max_completion_tokens": 5, "temperature": None}}
    stand_in = StandIn(label)
    with stand_in.serve() as url:
        reply = Endpoint("api", EndpointConfig(url=url, **config)).ask(
            [{"role": "user", "content": "warm?"}], 8
        )
        stand_in.statuses = [302]
        with pytest.raises(LlmtuneError, match="302"):
            Endpoint("api", EndpointConfig(url=url, **config)).ask(
                [{"role": "user", "content": "warm?"}], 8
            )
    assert (reply.text, reply.input_tokens, reply.output_tokens) == ("It is positive.", 100, 10)
    where, key, body = stand_in.asked[0]
    assert where == "/v1/chat/completions" and key is None
    assert body == {
        "model": "big",
        "messages": [{"role": "user", "content": "warm?"}],
        "max_completion_tokens": 5,
    }
    uncounted = describe_cost(EndpointConfig(url=url, model="big"), [Reply("a", None, 1, 2.0)])
    assert uncounted.price_per_1000 is None and uncounted.input_tokens is None


def test_an_items_tools_and_calls_are_sent_as_the_protocol_has_them():
    call = {"id": "1", "function": {"name": "look", "arguments": {"at": "é"}}}
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": "warm?"},
        {"role": "assistant", "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "look"}}]
    stand_in = StandIn(lambda _: "yes")
    with stand_in.serve() as url:
        endpoint = Endpoint("api", EndpointConfig(url=url, model="big"))
        endpoint.ask(asked, 8, tools)
    body = stand_in.asked[0][2]
    assert body["tools"] == tools
    assert body["messages"][0] == asked[0]
    (sent,) = body["messages"][1]["tool_calls"]
    assert sent["type"] == "function" and json.loads(sent["function"]["arguments"]) == {"at": "é"}


def test_an_answer_behind_a_line_that_was_cut_off_is_kept(tmp_path, monkeypatch):
    suite = load_suite(make_project(tmp_path).parent / "sentiment.yaml")
    stand_in, kept = StandIn(label), tmp_path / "kept.jsonl"
    with stand_in.serve() as url:
        endpoint = Endpoint("api", EndpointConfig(url=url, model="big"))
        questions = {item.id: _question(suite, item) for item in suite.items}
        ask_all(endpoint, questions, kept, what=suite.name)
        lines = kept.read_text().splitlines()
        kept.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
        ask_all(endpoint, questions, kept, what=suite.name)
        ask_all(endpoint, questions, kept, what=suite.name)
    assert len(stand_in.asked) == len(suite.items) + 1


@pytest.mark.parametrize(("content", "before"), [(None, ""), ("Let me see.", "Let me see.\n")])
def test_calls_that_an_endpoint_answers_with_are_its_text(content, before):
    function = {"name": "look", "arguments": '{"at": "é"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    stand_in = StandIn(lambda _: {"content": content, "tool_calls": [call]})
    with stand_in.serve() as url:
        endpoint = Endpoint("api", EndpointConfig(url=url, model="big"))
        text = endpoint.ask([{"role": "user", "content": "Hi"}], 8).text
    assert text.startswith(before)
    assert json.loads(text[len(before) :]) == [{"type": "function", "function": function}]


def test_answers_that_are_written_while_one_is_refused_are_kept(tmp_path):
    together = threading.Barrier(4)

    def answer(messages):
        together.wait(5)
        time.sleep(0 if messages[0]["content"] == "0" else 0.2)
        return "yes"

    stand_in, kept = StandIn(answer), tmp_path / "kept.jsonl"
    stand_in.refused = [{"role": "user", "content": "0"}]
    with stand_in.serve() as url:
        endpoint = Endpoint("api", EndpointConfig(url=url, model="big"))
        asked = {str(i): Question([{"role": "user", "content": str(i)}], 8) for i in range(4)}
        with pytest.raises(LlmtuneError, match="400 .*answers so far are kept"):
            ask_all(endpoint, asked, kept, what="tests")
    assert len(kept.read_text().splitlines()) == 3


def test_an_error_whose_body_is_cut_off_is_asked_again(monkeypatch):
    monkeypatch.setattr("llmtune.evaluation.endpoint.TRIES", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reset():
            connection, _ = server.accept()
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 400 no\r\nContent-Length: 99\r\n\r\n{")
            time.sleep(0.1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        thread = threading.Thread(target=reset)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        endpoint = Endpoint("api", EndpointConfig(url=url, model="big"))
        with pytest.raises(LlmtuneError, match=r"api: .*no answer \(.*reset.*the same command"):
            endpoint.ask([{"role": "user", "content": "Hi"}], 8)
        thread.join()


def test_refused_rows_that_are_to_be_skipped_keep_no_other_from_being_asked(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"warm {i}"} for i in range(12)])
    rows = read_prompt_rows(path, PromptChoice())
    for is_strict, number in ((False, 12), (True, 8)):
        stand_in = StandIn(label, statuses=[400] * 9)
        with stand_in.serve() as url:
            config = EndpointConfig(url=url, model="big", parallel_requests=1)
            asker = Asker(Endpoint("api", config), rows, path, 8, is_strict=is_strict)
            if is_strict:
                with pytest.raises(LlmtuneError, match="400"):
                    list(asker.answer(()))
            else:
                assert len(list(asker.answer(()))) == 3 and len(asker.skipped) == 9
        assert number <= len(stand_in.asked) <= number + 1
