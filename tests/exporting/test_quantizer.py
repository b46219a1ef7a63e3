"""llama.cpp's own quantizer and converter make what is theirs to make, and nothing else does."""

import json
import shutil
from pathlib import Path

import pytest

from llmtune.checks.runtime import is_runtime_installed
from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.exporting.base import ExportSettings
from llmtune.exporting.config import check_exportable, find_route
from llmtune.exporting.gguf_writer.types import read_file_type
from llmtune.models.checkpoint import Checkpoint
from tests.exporting.exports import export_model
from tests.project import make_project
from tests.tiny import make_model

needs_quantizer = pytest.mark.skipif(
    shutil.which("llama-quantize") is None, reason="needs llama-quantize on the PATH"
)


def program(directory: Path, text: str) -> Path:
    """Write a shell script that stands where the quantizer would."""
    path = directory / "llama-quantize"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def export(source: Path, out: Path):
    return export_model(source, "gguf", out, "q4_k_m", runtime=False)


def test_without_a_quantizer_a_k_quant_is_refused_before_training(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LlmtuneError, match="llama-quantize, which is not on the PATH"):
        check_exportable(Checkpoint.open(llama_dir), "gguf", "q4_k_m")


def test_a_quantizer_that_fails_is_quoted_and_leaves_nothing(llama_dir, tmp_path, monkeypatch):
    program(tmp_path, 'echo "loading $1" >&2; echo "cannot do $3" >&2; exit 7')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "out").mkdir()
    with pytest.raises(LlmtuneError, match=r"failed \(exit 7\): loading .* \| cannot do Q4_K_M"):
        export(llama_dir, tmp_path / "out" / "m.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_it_reads_a_file_that_holds_the_models_numbers_exactly(llama_dir, tmp_path, monkeypatch):
    program(tmp_path, f'cp "$1" {tmp_path}/seen.gguf; cp "$1" "$2"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    export(llama_dir, tmp_path / "m.gguf")
    assert read_file_type(tmp_path / "seen.gguf") == "f32"  # as the tiny model is stored
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "llama-quantize",
        "m.gguf",
        "seen.gguf",
    ]


CONVERTER = """
import json, pathlib, shutil, sys
model, _, out, _, type, *options = sys.argv[1:]
print("reading", model, file=sys.stderr)
config = json.loads((pathlib.Path(model) / "config.json").read_text())
assert (pathlib.Path(model) / "tokenizer.json").is_file()
if "fails" in {kind!r}:
    sys.exit("NotImplementedError: Architecture not supported!")
config["rotary_pct"] * config["rotary_emb_base"]
if options != ["--dry-run"]:
    shutil.copy({made!r}, out)
"""


def write_converter(directory: Path, made: Path, kind: str = "") -> Path:
    """Write what stands where llama.cpp's converter would, and leaves the file `made`."""
    directory.mkdir()
    script = directory / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(made=str(made), kind=kind))
    return script


def convert(source: Path, out: Path, *options: str) -> int:
    return run_command(
        ["export", str(source), "--to", "gguf", "--out", str(out), "--quiet", *options]
    )


def test_a_family_of_llama_cpps_own_is_left_to_its_converter(llama_dir, tmp_path, capsys):
    """It is the script that is named, or in the directory that is; its words are passed on.

    It reads config.json as transformers 4 wrote it, whatever the version that saved the model.
    """
    made = tmp_path / "made.gguf"
    export_model(llama_dir, "gguf", made, "f32", runtime=False)
    checkout = write_converter(tmp_path / "checkout", made).parent
    failing = write_converter(tmp_path / "failing", made, kind="fails")
    make_model("gpt_neox", tmp_path / "base")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "m.gguf"
    unchecked = ["--no-runtime", "--type", "f32", "--converter"]

    assert convert(tmp_path / "base", out) == 2
    assert "llmtune export RUN --to gguf --converter" in capsys.readouterr().err
    assert convert(tmp_path / "base", out, "--converter", str(tmp_path)) == 2
    assert "there is no convert_hf_to_gguf.py" in capsys.readouterr().err
    assert convert(tmp_path / "base", out, *unchecked, str(failing)) == 2
    assert "Architecture not supported" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    assert convert(tmp_path / "base", out, *unchecked, str(checkout)) == 0, capsys.readouterr().err
    assert out.read_bytes() == made.read_bytes()

    # what llmtune covers it writes itself
    assert convert(llama_dir, tmp_path / "own.gguf", *unchecked, str(failing)) == 0
    assert (tmp_path / "own.gguf").read_bytes() == made.read_bytes()


@pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")
def test_a_config_names_the_converter_and_hears_before_training_which_way_it_goes(tmp_path, capsys):
    working = write_converter(tmp_path / "checkout", tmp_path / "none").parent
    failing = write_converter(tmp_path / "failing", tmp_path / "none", kind="fails")
    config = str(make_project(tmp_path / "project", "gpt_neox", export={"to": ["gguf"]}))

    assert run_command(["plan", config]) == 2
    assert "export.converter in the config" in capsys.readouterr().err
    assert run_command(["plan", config, f"export.converter={working}", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["exports"]
    script = working / "convert_hf_to_gguf.py"
    how = f"llama.cpp's converter {script}, then compared in llama.cpp; tried on the base"
    assert planned == [f"gguf (q8_0): by {how}"]
    assert run_command(["run", config, f"export.converter={failing}", "--quiet"]) == 2
    assert "Architecture not supported" in capsys.readouterr().err
    assert not (tmp_path / "project" / "run").exists()

    elsewhere = [f"export.converter={working}", "export.to=[nf4]"]
    assert run_command(["plan", config, *elsewhere]) == 2
    assert "export: converter is for exports to gguf or ollama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("gpt2", {"n_inner": 128}, "n_inner 128, expected 256, four times n_embd"),
        ("gpt2", {"n_inner": None, "activation_function": "relu"}, "activation 'relu'"),
        ("gpt2", {"n_inner": None, "scale_attn_weights": False}, "scaled differently"),
        ("gpt_neox", {"hidden_act": "relu"}, "activation 'relu', expected 'gelu'"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias is off"),
        # llmtune's own families: what it refuses of them is not the converter's
        ("phi", {"qk_layernorm": True}, "qk_layernorm is on"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu', expected silu"),
    ],
)
def test_what_the_converter_would_drop_without_a_word_is_refused(
    family, setting, message, tmp_path
):
    script = write_converter(tmp_path / "checkout", tmp_path / "none")
    make_model(family, tmp_path / "base", **setting)
    options = {"converter": str(script), "runtime": False}
    with pytest.raises(LlmtuneError, match=message):
        find_route(Checkpoint.open(tmp_path / "base"), ExportSettings("gguf", options=options))


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_more_stops_than_a_file_can_name_are_refused_with_a_converter_too(family, tmp_path):
    script = write_converter(tmp_path / "checkout", tmp_path / "none")
    make_model(family, tmp_path / "base")
    stops = json.dumps({"eos_token_id": [0, 1, 2, 3]})
    (tmp_path / "base/generation_config.json").write_text(stops)
    options = {"converter": str(script), "runtime": False}
    with pytest.raises(LlmtuneError, match="tokens end an answer"):
        find_route(Checkpoint.open(tmp_path / "base"), ExportSettings("gguf", options=options))


def test_a_base_without_safetensors_is_not_tried(tmp_path):
    script = write_converter(tmp_path / "checkout", tmp_path / "none")
    make_model("gpt_neox", tmp_path / "base")
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/pytorch_model.bin")
    options = {"converter": str(script), "runtime": False}
    route = find_route(Checkpoint.open(tmp_path / "base"), ExportSettings("gguf", options=options))
    assert route.endswith("not tried, because the base's weights are not here as safetensors")


@needs_quantizer
def test_the_real_quantizer_makes_a_k_quant(tmp_path):
    make_model("llama", tmp_path / "model", hidden_size=256, intermediate_size=256)
    result = export(tmp_path / "model", tmp_path / "m.gguf")
    assert read_file_type(tmp_path / "m.gguf") == "q4_k_m"
    assert result["tensor_types"]["q4_k"] > result["tensor_types"]["q6_k"] > 0
