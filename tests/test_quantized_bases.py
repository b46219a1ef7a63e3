"""A base that is stored quantized goes through the commands as the dense one made from it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from llmtune.cli import cli
from llmtune.errors import LlmtuneError
from tests.project import make_project
from tests.quantized import store_quantized


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def project(tmp_path):
    """A project whose base is stored by GPTQ, in which little is trained."""
    config = make_project(tmp_path, train={"max_steps": 1, "batch_size": 4})
    store_quantized(tmp_path / "base", "gptq")
    return config


def test_quantized_base_is_planned_trained_merged_and_named(project, tmp_path):
    planned = run("plan", project, "--json")
    assert planned.exit_code == 0, planned.output
    notice = json.loads(planned.stdout)["notices"][0]
    assert notice.startswith("base: gptq 4-bit, dequantized to bfloat16: ")
    assert not (tmp_path / "cache" / "bases").exists()

    trained = run("train", project)
    assert trained.exit_code == 0, trained.output
    assert "base: gptq 4-bit, dequantized to bfloat16" in trained.output
    merged = run("merge", project)
    assert merged.exit_code == 0, merged.output

    (dense,) = (tmp_path / "cache" / "bases").iterdir()
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())["base"]
    assert record["path"] == str(dense) and record["origin"] == str(tmp_path / "base")
    assert record["stored"] == "gptq 4-bit, dequantized to bfloat16"
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(dense)
    assert load_file(tmp_path / "run" / "merged" / "model.safetensors").keys() == (
        load_file(dense / "model.safetensors").keys()
    )
    assert "quantization_config" not in (tmp_path / "run/merged/config.json").read_text()

    dense.rename(tmp_path / "gone")  # as a cleared cache: it is made again
    again = run("merge", tmp_path / "run" / "adapter", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    weights = [tmp_path / name / "model.safetensors" for name in ("again", "run/merged")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    answered = run("report", tmp_path / "run")
    assert answered.exit_code == 0, answered.output
    assert "gptq 4-bit, dequantized to bfloat16" in (tmp_path / "run" / "report.html").read_text()


def test_unknown_quantization_is_one_line_before_anything_is_made(project, tmp_path):
    path = Path(tmp_path / "base" / "config.json")
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "vptq"}}
    path.write_text(json.dumps(config))
    for command in ("plan", "train"):
        refused = run(command, project)
        assert "stored quantized by 'vptq', which is not read" in str(refused.exception)
        assert isinstance(refused.exception, LlmtuneError)
    assert not (tmp_path / "run").exists()
