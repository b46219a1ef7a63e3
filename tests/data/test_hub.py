"""Data sets of the hub, read from a stand-in on this machine: which rows, and which errors."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from llmtune.data import hub
from llmtune.data.config import SourceConfig
from llmtune.data.hub import look_up_commit
from llmtune.data.rows import open_source
from llmtune.errors import LlmtuneError
from tests.data.loopback_hub import LoopbackHub

README = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train.jsonl}
  - {split: test, path: data/test.jsonl}
- config_name: easy
  data_files:
  - {split: train, path: easy/train.jsonl}
---
"""

# The endpoint is read when the library is imported, so a process of its own does the reading.
PROGRAM = """
import json, os, sys, time
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.hub import iter_hub_rows
from llmtune.data.prepare import prepare_examples
from llmtune.errors import LlmtuneError
from tests.data.shapes import make_shape

for line in sys.stdin:
    request, started = json.loads(line), time.perf_counter()
    try:
        if request.pop("prepare", False):
            config = DataConfig(train=[SourceConfig(**request)])
            data = prepare_examples(config, make_shape("chatml"), split="train", seed=0)
            answer = [make_shape("chatml").decode(e.input_ids) for e in data.examples]
        else:
            answer = [[number, row["prompt"]] for number, row in
                      iter_hub_rows(SourceConfig(**request))]
    except LlmtuneError as error:
        answer = str(error)
    print(json.dumps([answer, time.perf_counter() - started]), flush=True)
"""


def rows(count: int, prefix: str) -> bytes:
    lines = [
        json.dumps({"prompt": f"{prefix} {i}", "completion": f"answer {i}"}) for i in range(count)
    ]
    return "\n".join(lines).encode() + b"\n"


def files(prefix: str) -> dict[str, bytes]:
    return {
        "README.md": README,
        "data/train.jsonl": rows(3, prefix),
        "data/test.jsonl": rows(2, f"{prefix} test"),
        "easy/train.jsonl": rows(1, f"{prefix} easy"),
    }


class Reader:
    """A process that reads data sets from a stand-in hub, one request a line."""

    def __init__(self, process: subprocess.Popen, stand_in: LoopbackHub) -> None:
        self.process, self.hub = process, stand_in

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def read(self, **request):
        return self.ask(**request)[0]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    stand_in = LoopbackHub()
    stand_in.add("org/name", "v1", files("old"))
    stand_in.add("org/name", "main", files("new"))
    stand_in.add("org/broken", "main", {"train.jsonl": b'{"prompt": "a", "comp'})
    stand_in.add("org/empty", "main", {"README.md": b"nothing here"})
    home = tmp_path_factory.mktemp("hub")
    with stand_in.serve() as address:
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **settings, "LLMTUNE_CACHE": str(home / "cache")},
        )
        yield Reader(process, stand_in)
        process.stdin.close()
        process.wait(timeout=300)


def test_rows_come_in_order_with_their_numbers(reader):
    assert reader.read(path="org/name") == [[1, "new 0"], [2, "new 1"], [3, "new 2"]]


HUB_KNOBS = {
    "revision": ("v1", "old 0"),
    "split": ("test", "new test 0"),
    "subset": ("easy", "new easy 0"),
}


@pytest.mark.parametrize("knob", HUB_KNOBS)
def test_revision_split_and_subset_choose_the_rows(reader, knob):
    value, first = HUB_KNOBS[knob]
    assert reader.read(path="org/name", **{knob: value})[0] == [1, first]


def test_a_split_that_is_cut_is_refused_and_not_ignored(reader):
    answer = reader.read(path="org/name", split="train[1:]")
    assert "split 'train[1:]'" in answer and "cannot be read" in answer


@pytest.mark.parametrize("knob", HUB_KNOBS)
def test_a_file_has_no_revision_split_or_subset(tmp_path, knob):
    (tmp_path / "rows.jsonl").write_bytes(rows(2, "q"))
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), **{knob: HUB_KNOBS[knob][0]})
    with pytest.raises(LlmtuneError, match=f"rows.jsonl: {knob} .* only for a data set of the hub"):
        open_source(source)


def test_a_commit_is_a_revision_too(reader):
    commit = reader.hub.revisions["org/name"]["v1"]
    assert reader.read(path="org/name", revision=commit)[0] == [1, "old 0"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "org/none"}, ["org/none: no such file", "no such data set"]),
        ({"path": "org/name", "revision": "v9"}, ["revision 'v9'"]),
        ({"path": "org/name", "split": "nope"}, ["split 'nope'", "['train', 'test']"]),
        ({"path": "org/name", "subset": "nope"}, ["subset 'nope'", "['default', 'easy']"]),
        ({"path": "org/broken"}, ["org/broken: the hub's data set cannot be read"]),
        ({"path": "org/empty"}, ["org/empty: the hub's data set cannot be read"]),
    ],
)
def test_what_is_not_there_is_one_clear_error_at_once(reader, source, words):
    answer, seconds = reader.ask(**source)
    assert isinstance(answer, str) and "\n" not in answer
    assert all(word in answer for word in words), answer
    assert seconds < 60  # far less, but for a busy machine; reading again and again takes longer


def test_prepared_rows_follow_the_branch(reader):
    stand_in = reader.hub
    stand_in.add("org/moving", "main", {"train.jsonl": rows(2, "before")})
    request = {"path": "org/moving", "prepare": True}
    assert sorted(text.split("\n")[1] for text in reader.read(**request)) == [
        "before 0<|im_end|>",
        "before 1<|im_end|>",
    ]
    stand_in.add("org/moving", "main", {"train.jsonl": rows(1, "after")})
    (text,) = reader.read(**request)
    assert "after 0" in text


def test_a_commit_is_prepared_once_and_its_rows_are_not_read_again(reader):
    stand_in = reader.hub
    stand_in.add("org/kept", "main", {"train.jsonl": rows(2, "kept")})
    request = {"path": "org/kept", "prepare": True}
    first = reader.read(**request)
    commit = stand_in.revisions["org/kept"]["main"]
    stand_in.revisions["org/kept"].clear()  # nothing could be read now
    assert reader.read(**request, revision=commit) == first
    assert "org/kept" in reader.read(path="org/kept", revision=commit)


def test_a_hub_that_never_answers_is_given_up_within_five_seconds(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert hub.LOOKUP_SECONDS < 5
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(60))
    monkeypatch.setattr(hub, "LOOKUP_SECONDS", 0.3)
    started = time.perf_counter()
    with pytest.raises(LlmtuneError, match="cannot be reached: no answer within"):
        look_up_commit(SourceConfig(path="org/name"))
    assert time.perf_counter() - started < 50  # far less, but for a machine that has other work
