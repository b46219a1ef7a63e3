"""Reading rows: every kind of file, every format, and only clear errors for what is broken."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtune.data import json_list
from llmtune.data.config import SourceConfig
from llmtune.data.formats import FORMATS
from llmtune.data.hub import is_hub_id
from llmtune.data.problems import RowProblem
from llmtune.data.rows import LoadedRow, find_files, open_source
from llmtune.errors import LlmtuneError
from tests.data.shapes import turns, write_jsonl

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(4)]


def load(path, **source) -> list:
    return list(open_source(SourceConfig(path=str(path), **source)).rows)


def contents(loaded) -> list[list[str]]:
    return [[message["content"] for message in row.conversation.messages] for row in loaded]


EXPECTED = [[row["prompt"], row["completion"]] for row in ROWS]


def as_csv(rows, delimiter=",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data)
    return data.getvalue()


def as_arrow(rows) -> bytes:
    data = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(data, table.schema) as writer:
        writer.write_table(table)
    return data.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()

FILES = {
    "a.jsonl": JSONL,
    "a.ndjson": b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n"),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "wrapped.json": json.dumps({"data": ROWS}).encode(),
    "lines.json": JSONL,
    "a.csv": as_csv(ROWS),
    "a.tsv": as_csv(ROWS, "\t"),
    "a.parquet": as_parquet(ROWS),
    "a.arrow": as_arrow(ROWS),
    "a.jsonl.gz": gzip.compress(JSONL, mtime=0),
    "a.jsonl.bz2": bz2.compress(JSONL),
    "a.csv.xz": lzma.compress(as_csv(ROWS)),
    "a.jsonl.zst": pa.compress(JSONL, codec="zstd", asbytes=True),
    "a.parquet.gz": gzip.compress(as_parquet(ROWS), mtime=0),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert contents(load(tmp_path / name)) == EXPECTED


def test_lines_are_those_of_the_file(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"two\nlines",x\nb,y\n')
    assert [row.line for row in load(tmp_path / "a.csv")] == [2, 4]
    (tmp_path / "a.json").write_text('[\n {"text": "a"},\n\n {"text":\n "b"}, {"text": "c"}]')
    assert [row.line for row in load(tmp_path / "a.json")] == [2, 4, 5]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}')
    assert [row.line for row in load(tmp_path / "a.jsonl")] == [1, 3]


def test_lines_of_a_wrapped_list_are_told_even_after_a_bracket_in_a_text(tmp_path):
    text = '{"note": "[x] \\"data\\": [",\n"data": [\n{"text": "a"},\n{"text": "b"}]}'
    (tmp_path / "a.json").write_text(text)
    assert [row.line for row in load(tmp_path / "a.json")] == [3, 4]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_long_json_list_is_read_piece_by_piece(size, monkeypatch):
    """Whatever the pieces cut through, the elements and their lines are those of the whole."""
    rows = [{"text": 'é "確" \\ \n 🙂', "n": 12.5e3, "a": [True, None, [-1]]}, {}, [1], "x", 12345]
    text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    data = text.encode()
    monkeypatch.setattr(json_list, "READ_BYTES", size)
    found = list(json_list.iter_json_list(data[:size], io.BytesIO(data[size:]), "a.json"))
    assert [row for _, row in found] == rows
    lines = text.splitlines()
    assert [lines[line - 1].strip()[:1] for line, _ in found] == ["{", "{", "[", '"', "1"]


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["[", "]", "{", "}", ",", ":", '"a"', "1", "true", "nul", " ", "\n", '"']),
        max_size=12,
    ).map(lambda parts: "[" + "".join(parts)),
    size=st.integers(1, 20),
)
def test_json_list_is_refused_exactly_where_json_is(text, size):
    data = text.encode()
    found: list | None = []
    try:
        found = [r for _, r in json_list.iter_json_list(data[:size], io.BytesIO(data[size:]), "x")]
    except LlmtuneError:
        found = None
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    assert found == expected


def peak_while_reading(path) -> int:
    tracemalloc.start()
    try:
        count = sum(1 for _ in open_source(SourceConfig(path=str(path))).rows)
        assert count >= 2000
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "lines.json", "a.csv", "a.parquet", "a.arrow"]
)
def test_memory_of_reading_does_not_grow_with_the_file(tmp_path, name):
    peaks = []
    for count in (2000, 8000):
        rows = [
            {"prompt": f"question {i} " * 20, "completion": "answer " * 20} for i in range(count)
        ]
        path = tmp_path / str(count) / name
        path.parent.mkdir()
        path.write_bytes(
            {
                "a.jsonl": lambda rows: "".join(json.dumps(r) + "\n" for r in rows).encode(),
                "lines.json": lambda rows: "".join(json.dumps(r) + "\n" for r in rows).encode(),
                "a.json": lambda rows: json.dumps(rows).encode(),
                "a.csv": as_csv,
                "a.parquet": as_parquet,
                "a.arrow": as_arrow,
            }[name](rows)
        )
        peaks.append(peak_while_reading(path))
    smallest = path.stat().st_size // 8
    assert peaks[1] < peaks[0] * 1.5 + smallest, peaks


def test_directories_and_globs_are_read_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "notes.pdf").write_text("x")
    texts = [row.conversation.text for row in load(tmp_path)]
    assert texts == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert len(find_files(str(tmp_path / "*.jsonl"))) == 2
    assert len(find_files(str(tmp_path / "**/*.jsonl"))) == 3


def test_text_files_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.")
    (row,) = load(tmp_path / "a.txt")
    assert row.conversation.text == "One.\n\nTwo."


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.json", b'[{"text": "a"},\n{]', "a.json:2: not JSON"),
        ("a.json", b"3", "expected a list"),
        ("a.csv", b"a,a\n1,2\n", "more than once"),
        ("a.csv", b'prompt,completion\n"open,b\n', "a.csv:2: not CSV"),
        ("a.csv", b"prompt,completion\n\xff,b\n", "not UTF-8"),
        ("a.parquet", b"PAR1 broken", "not a Parquet file"),
        ("a.arrow", b"ARROW1 broken", "not an Arrow file"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl.zst", b"not zstd", "cannot be read"),
        ("a.xlsx", b"x", "unknown kind of file"),
        ("a.jsonl", b"[1]\n2\n", "no row can be read"),
        ("a.jsonl", b'{"question": "a", "answer": "b"}\n', "no format fits"),
    ],
)
def test_file_that_cannot_be_read_is_one_clear_error(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlmtuneError, match=words) as error:
        load(tmp_path / name)
    assert name in str(error.value)


def test_missing_file_names_the_nearest(tmp_path):
    write_jsonl(tmp_path / "movies.jsonl", [])
    with pytest.raises(LlmtuneError, match=r"did you mean .*movies\.jsonl"):
        load(tmp_path / "movie.jsonl")
    with pytest.raises(LlmtuneError, match="there is no directory .*none"):
        load(tmp_path / "none" / "a.jsonl")
    with pytest.raises(LlmtuneError, match="no file matches"):
        load(tmp_path / "*.csv")


def test_hub_ids_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name") and not is_hub_id("data/rows.jsonl") and not is_hub_id("a/b/c")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    assert not is_hub_id("org/name")


def test_hub_that_cannot_be_reached_is_an_error_with_both_readings():
    with pytest.raises(LlmtuneError, match="no such file here, and as a data set of the hub"):
        load("org/name")


GOOD = {
    "messages": {"messages": turns("a", "b")},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "instruction": {"instruction": "a", "input": "", "output": "b"},
    "completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a document"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_found_in_the_rows_and_reads_them(tmp_path, name):
    opened = open_source(SourceConfig(path=write_jsonl(tmp_path / "a.jsonl", [GOOD[name]])))
    assert opened.format.format.name == name
    assert opened.format.reason.startswith(name)
    (row,) = opened.rows
    assert isinstance(row, LoadedRow)
    if name != "text":
        assert contents([row]) == [["a", "b"]]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_format_never_raises_anything_but_row_problems(tmp_path_factory, name, data):
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "role",
                        "content",
                        "from",
                        "value",
                        "train",
                        "weight",
                        "tool_calls",
                        "function",
                        "name",
                        "arguments",
                        "text",
                        "type",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
    row = {column: data.draw(values) for column in FORMATS[name].columns}
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    for loaded in load(path, format=name):
        assert isinstance(loaded, LoadedRow | RowProblem)


def test_ambiguous_rows_list_the_candidates(tmp_path):
    row = {"text": "a", "prompt": "a", "completion": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(LlmtuneError, match="completion, text"):
        load(path)
    assert contents(load(path, format="completion")) == [["a", "b"]]


def test_columns_are_mapped_and_unknown_ones_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "reply": "b"}])
    mapped = {"instruction": "question", "output": "reply"}
    assert contents(load(path, columns=mapped)) == [["a", "b"]]
    with pytest.raises(LlmtuneError, match=r"did you mean \"output\""):
        load(path, format="instruction", columns={"outptu": "reply"})
    (problem,) = load(path, format="instruction", columns={"instruction": "question"})
    assert "no column 'output'" in problem.message and "reply, question" in problem.message
    write_jsonl(tmp_path / "a.jsonl", [{"question": " ", "reply": "b"}])
    for name, columns in (
        ("completion", {"prompt": "question", "completion": "reply"}),
        ("instruction", mapped),
    ):
        (problem,) = load(path, format=name, columns=columns)
        assert problem.message.startswith(f"question (read as {next(iter(columns))}) is empty")


def test_sharegpt_variants_become_roles(tmp_path):
    rows = [
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "Human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "chatgpt", "value": "b"},
            ],
        },
        {"conversations": turns("a", "b")},
        {"conversations": [{"from": "gtp", "value": "b"}]},
    ]
    first, second, third = load(write_jsonl(tmp_path / "a.jsonl", rows))
    roles = [message["role"] for message in first.conversation.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert first.conversation.messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert contents([second]) == [["a", "b"]]
    assert 'did you mean "gpt"' in third.message


def test_instruction_input_and_history(tmp_path):
    row = {"instruction": "a", "input": "x", "output": "b", "history": [["p", "q"]]}
    (loaded,) = load(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert contents([loaded]) == [["p", "q", "a\n\nx", "b"]]
    assert loaded.conversation.trained_from == 2


def test_messages_in_a_csv_are_parsed(tmp_path):
    (tmp_path / "a.csv").write_bytes(as_csv([{"messages": json.dumps(turns("a", "b"))}]))
    assert contents(load(tmp_path / "a.csv")) == [["a", "b"]]


def test_parquet_fillers_are_not_arguments(tmp_path):
    def called(arguments):
        return {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }

    rows = [
        {"messages": [{"role": "user", "content": "a"}, called(a)]} for a in ({"x": 1}, {"y": 2})
    ]
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    loaded = load(tmp_path / "a.parquet")
    calls = [row.conversation.messages[1]["tool_calls"][0]["function"] for row in loaded]
    assert [call["arguments"] for call in calls] == [{"x": 1}, {"y": 2}]


def test_prompt_may_be_messages(tmp_path):
    row = {"prompt": turns("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    (loaded,) = load(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert loaded.conversation.trained_from == 3


def test_limit_reads_the_first_rows(tmp_path):
    assert len(load(write_jsonl(tmp_path / "a.jsonl", ROWS), limit=2)) == 2


def read_quietly(path) -> None:
    """Read a file to its end; only `LlmtuneError` and row problems are allowed."""
    try:
        for loaded in load(path):
            assert isinstance(loaded, LoadedRow | RowProblem)
            str(loaded)
    except LlmtuneError as error:
        assert str(error) and "Traceback" not in str(error)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz"]
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_files_give_only_clear_errors(tmp_path_factory, name, data):
    content = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not content:
            break
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_quietly(path)


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
    ),
    name=st.sampled_from(["f.jsonl", "f.json", "f.csv", "f.tsv", "f.txt", "f.parquet"]),
)
def test_random_bytes_give_only_clear_errors(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    read_quietly(path)


def test_deep_and_huge_json_is_a_problem_of_its_line(tmp_path):
    deep = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
    huge = '{"messages": [{"role": "user", "content": ' + "9" * 5000 + "}]}"
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}, deep, huge])
    first, *problems = load(path)
    assert isinstance(first, LoadedRow)
    assert [problem.line for problem in problems] == [2, 3]


def test_rows_of_a_list_on_one_line_are_numbered(tmp_path):
    path = tmp_path / "a.json"
    for text in ('[{"text": "a"}, {"text": ""}, 3]', '{"data": [{"text": "a"}, {"text": ""}, 3]}'):
        path.write_text(text)
        found = list(open_source(SourceConfig(path=str(path), format="text")).rows)
        assert [row.line for row in found] == [1, 2, 3]


def test_the_list_of_the_outermost_object_is_the_one_that_is_numbered(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"info": {"data": [1]},\n"data": [{"text": "one"},\n{"text": "two"}]}')
    found = list(open_source(SourceConfig(path=str(path))).rows)
    assert [(row.line, row.conversation.text) for row in found] == [(2, "one"), (3, "two")]


def test_half_a_character_in_a_column_name_is_a_problem_of_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "x\\ud83d": 1}\n')
    found = list(open_source(SourceConfig(path=str(path))).rows)
    assert "a.jsonl:2: a column's name holds half of a character pair" in str(found[1])
