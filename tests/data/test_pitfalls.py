"""What other trainers accept in silence stops here, by file and line, before torch is loaded."""

import json
import subprocess
import sys

import pytest

from llmtune.data.config import DataConfig
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.prepare import prepare_examples
from llmtune.models.turns import stop_token_ids
from tests.data.shapes import SHAPES, make_shape, turns, write_jsonl
from tests.project import make_project
from tests.versions import IS_CURRENT

GOOD = [{"messages": turns(f"question {i}", f"answer {i}")} for i in range(17)]
LONG = [{"messages": turns(f"long {i}" + " word" * 60, "answer" + " again" * 8)} for i in range(4)]
BAD_LAST_ROW = {
    "role usr": (
        {"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]},
        'role "usr"',
    ),
    "role asistant": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]},
        'role "asistant"',
    ),
    "text for content": (
        {"messages": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]},
        'no "content"',
    ),
    "assistant None": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        "content is null",
    ),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
    "wrong column": ({"text": "a"}, "no column 'messages'"),
}
FILES = {
    **{name: ([*GOOD, row], [":18", said]) for name, (row, said) in BAD_LAST_ROW.items()},
    "empty completion": (
        [
            *({"prompt": "a", "completion": f"b {i}"} for i in range(17)),
            {"prompt": "a", "completion": ""},
        ],
        [":18: completion is empty"],
    ),
    "four of eight too long": (
        GOOD[:4] + LONG,
        ["would be lost (length_policy: error): 4", ":5: 293 tokens", ":8: 293 tokens"],
    ),
    "all too long": (LONG, ["100.0% of the trained tokens would be lost"]),
    "healthy": (GOOD, []),
}
PROGRAM = """
import contextlib, io, json, sys
from llmtune.cli import run_command
for line in sys.stdin:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run_command(["data", "check", *json.loads(line), "--quiet"])
    heavy = sorted({"torch", "datasets", "peft", "trl"} & set(sys.modules))
    print(json.dumps([code, out.getvalue(), heavy]), flush=True)
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What `data check` says of every file, all in one process that never needs torch."""
    directory = tmp_path_factory.mktemp("pitfalls")
    config = str(make_project(directory))
    requests = []
    for name, (rows, _) in FILES.items():
        path = write_jsonl(directory / f"{name.replace(' ', '-')}.jsonl", rows)
        requests.append(
            json.dumps([config, f"data.train=[{{path: {path}}}]", "data.max_length=64"])
        )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(requests) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(FILES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_what_others_accept_is_refused_by_file_and_line_without_torch(checked, name):
    code, said, heavy = checked[name]
    words = FILES[name][1]
    assert code == (1 if words else 0), said
    assert all(word in said for word in words), said
    assert heavy == ([] if IS_CURRENT else ["torch"])


@pytest.mark.parametrize("policy", ["drop", "truncate-prompt"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_kept_row_trains_a_stop_token_whatever_is_cut(tmp_path, name, policy):
    """Also where padding is the end of text, and where the next turn holds the terminator."""
    tokenizer = make_shape(name)
    pad = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    path = write_jsonl(tmp_path / "rows.jsonl", [*GOOD, *LONG])
    config = DataConfig(train=[{"path": path}], max_length=90, length_policy=policy, cache=False)
    try:
        data = prepare_examples(config, tokenizer, split="train", seed=0)
    finally:
        tokenizer.pad_token = pad
    assert data.report.rows_too_long == len(LONG)
    assert data.report.stop_row_ratio == 1.0
    stops = set(stop_token_ids(tokenizer))
    for example in data.examples:
        trained = [label for label in example.labels if label != IGNORE_INDEX]
        assert trained[-1] in stops
        assert 0 < len(trained) < len(example.labels)  # never all of it, never none
