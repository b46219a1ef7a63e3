"""JSON of other people is read in one way, within limits, and what is wrong is said in one line."""

import json

import pytest
import torch

from llmtune import cli
from llmtune.errors import LlmtuneError
from llmtune.io import json_files
from llmtune.io.json_files import blamed_on, parse_json, read_json_object, read_weight_map
from llmtune.io.safetensors import INDEX_FILE, CheckpointIndex
from tests.merging.adapters import make_adapter, make_base


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("null", "holds null; expected an object"),
        ("[1]", "holds a list; expected an object"),
        ("{", "is not JSON"),
        ("[" * 10**5, "is not JSON .it is nested too deeply"),
        ('{"a": "\xff"}', "is not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
        ("[" + "[]," * 1000 + "[]]", "holds more than 1,000 values"),
        ("[" + "1" * 30_000 + "]", "has 30,002 bytes; expected 20,000 at most"),
    ],
    ids=["null", "list", "cut", "deep", "latin", "number", "many", "large"],
)
def test_a_damaged_json_file_is_one_clear_error(tmp_path, monkeypatch, text, words):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    if len(text) < 10**5:
        monkeypatch.setattr(json_files, "MOST_BYTES", 20_000)
        monkeypatch.setattr(json_files, "MOST_VALUES", 1000)
    with pytest.raises(LlmtuneError, match=words) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(LlmtuneError, match=r"none.json: cannot be read .No such file"):
        read_json_object(tmp_path / "none.json")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 10**5)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "", 5, None, "a\0b"]
)
def test_an_index_names_only_files_beside_it(tmp_path, name):
    path = tmp_path / INDEX_FILE
    path.write_text(json.dumps({"weight_map": {"a.weight": name}}))
    (tmp_path.parent / "secret.safetensors").write_bytes(b"")
    for read in (lambda: read_weight_map(path), lambda: CheckpointIndex.open(tmp_path)):
        with pytest.raises(LlmtuneError, match="expected the name of a file beside it"):
            read()


def test_merge_reads_no_pickles_from_elsewhere(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    (base / "model.safetensors").unlink()
    torch.save({}, tmp_path / "elsewhere.bin")
    index = {"weight_map": {"a.weight": "../elsewhere.bin"}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    out = tmp_path / "out"
    for more in ((), ("model.weights=any",)):
        assert cli.run_command(["merge", str(tmp_path / "adapter"), *more, "--out", str(out)]) == 2
        assert "names the shard '../elsewhere.bin'" in capsys.readouterr().err


def test_a_library_s_complaint_about_a_file_is_one_line_with_its_name(tmp_path):
    path = tmp_path / "tokenizer.json"
    with (
        pytest.raises(LlmtuneError, match="tokenizer.json: tokenizers cannot read it .Exception"),
        blamed_on(path, "tokenizers"),
    ):
        raise Exception("data did not match any variant\nof untagged enum")
    for error in (KeyboardInterrupt(), MemoryError(), OSError(28, "no space"), LlmtuneError("x")):
        with pytest.raises(type(error)) as caught, blamed_on(path, "tokenizers"):
            raise error
        assert caught.value is error
