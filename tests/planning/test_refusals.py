"""What a plan cannot be made for is one line that says what was given and what to do."""

import json

import pytest

from llmtune.cli import run_command
from llmtune.config import load_config
from llmtune.errors import LlmtuneError
from llmtune.io.sizes import GIB
from llmtune.models.config import ModelConfig
from llmtune.planning.base import read_base
from llmtune.planning.devices import given_gpu
from llmtune.planning.shape import read_shape
from llmtune.runs.pipeline import plan
from tests.planning.shapes import small_config


def make_base(directory, **changes):
    """Write a config.json of a small Llama; a change to None takes a key away."""
    config = {**small_config("llama"), "model_type": "llama", **changes}
    directory.mkdir(exist_ok=True)
    left = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(left))
    return str(directory)


def write_config(directory, base, **data):
    path = directory / "plan.yaml"
    values = {
        "run_dir": str(directory / "run"),
        "model": {"base": base, "device": "cpu"},
        "data": {"train": [{"path": str(directory / "to_come.jsonl")}], **data},
    }
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", ["norm", "embed_out", "lm_head", "embed_tokens"])
def test_a_module_that_is_trained_whole_vetoes_no_plan(name, tmp_path):
    """Only a loaded model knows the names of its modules; the known tables are counted."""
    path = write_config(tmp_path, make_base(tmp_path / "base"))
    without = plan(load_config(path))
    asked = ["adapter.method=lora", f"adapter.modules_to_save=[{name}]"]
    found = plan(load_config(path, asked))
    assert (found.adapter_parameters > without.adapter_parameters) == (name != "norm")


def test_a_directory_without_config_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LlmtuneError, match="not a model checkpoint: there is no config.json"):
        read_base(ModelConfig(base=str(tmp_path / "empty")))


@pytest.mark.parametrize("name", ["llama-8b", "./no/such/path/", "models/absent.gguf"])
def test_a_name_that_is_no_path_and_no_hub_id_says_so(name):
    with pytest.raises(LlmtuneError, match="no such local path .*, and it does not read as a hub"):
        read_base(ModelConfig(base=name))


def test_a_file_that_is_no_gguf_file_says_so(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(LlmtuneError, match="a file, but not a .gguf file"):
        read_base(ModelConfig(base=str(tmp_path / "weights.bin")))


def test_a_hub_that_is_not_reached_is_an_error_that_names_both_readings():
    with pytest.raises(LlmtuneError, match="no such local path; and read as a hub id"):
        read_base(ModelConfig(base="org/absent"))


def test_a_base_that_is_quantized_in_an_unknown_way_is_refused_as_training_refuses_it(tmp_path):
    base = make_base(tmp_path / "base", quantization_config={"quant_method": "aqlm"})
    with pytest.raises(LlmtuneError, match="stored quantized by 'aqlm', which is not read"):
        read_base(ModelConfig(base=base))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: expected a divisor of"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads=2: expected a divisor of"),
        ({"num_attention_heads": 6, "head_dim": None}, "expected a divisor of hidden_size=64"),
        ({"num_hidden_layers": 0}, "whole numbers for num_hidden_layers"),
        ({"vocab_size": -5}, "whole numbers for vocab_size"),
    ],
)
def test_numbers_that_make_no_model_are_refused(changes, message):
    with pytest.raises(LlmtuneError, match=message):
        read_shape({**small_config("llama"), "model_type": "llama", **changes}, "here")


@pytest.mark.parametrize("text", ["0GB", "0.001GB", "-5GB", "1e9GB", "24MB", "24 TB", "9" * 30, ""])
def test_a_size_that_no_gpu_has_is_an_error_that_says_what_is_expected(text):
    with pytest.raises(LlmtuneError, match=r"expected a size from 1GB to 2048GB"):
        given_gpu(text)


@pytest.mark.parametrize("text", ["24GB", "24gib", " 24 g ", "24.0GB"])
def test_a_size_may_be_written_in_several_ways(text):
    assert given_gpu(text).memory_bytes == 24 * GIB


def test_rows_longer_than_the_base_was_made_for_are_named(tmp_path, capsys):
    base = make_base(tmp_path / "base", max_position_embeddings=1024)
    path = write_config(tmp_path, base, max_length=4096)
    (notice,) = plan(load_config(path)).notices
    assert "4096 tokens, and the base was made for 1024" in notice
    assert "data.max_length=1024" in notice
    assert plan(load_config(path, ["data.max_length=1024"])).notices == ()
    run_command(["plan", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["notices"] == [notice]
