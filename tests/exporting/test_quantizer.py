"""llama.cpp's own quantizer and converter make what is theirs to make, and nothing else does."""

import shutil
from pathlib import Path

import pytest

from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.exporting.config import check_exportable
from llmtune.exporting.gguf_writer.types import read_file_type
from llmtune.models.checkpoint import Checkpoint
from tests.exporting.exports import export_model
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
import shutil, sys
model, _, out, _, type = sys.argv[1:]
print("reading", model, file=sys.stderr)
if type == "bf16":
    sys.exit("KeyError: 'rotary_pct'")
shutil.copy({made!r}, out)
"""


def convert(source: Path, out: Path, *options: str) -> int:
    return run_command(
        ["export", str(source), "--to", "gguf", "--out", str(out), "--quiet", *options]
    )


def test_a_family_of_llama_cpps_own_is_left_to_its_converter(llama_dir, tmp_path, capsys):
    """It is the script that is named, or in the directory that is; its words are passed on."""
    export_model(llama_dir, "gguf", tmp_path / "made.gguf", "f32", runtime=False)
    script = tmp_path / "checkout" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(CONVERTER.format(made=str(tmp_path / "made.gguf")))
    make_model("gpt_neox", tmp_path / "base")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "m.gguf"
    checkout = ["--converter", str(script.parent), "--no-runtime", "--type"]

    assert convert(tmp_path / "base", out) == 2
    assert "llmtune export RUN --to gguf --converter" in capsys.readouterr().err
    assert convert(tmp_path / "base", out, "--converter", str(tmp_path)) == 2
    assert "there is no convert_hf_to_gguf.py" in capsys.readouterr().err
    assert convert(tmp_path / "base", out, *checkout, "bf16") == 2
    assert "KeyError: 'rotary_pct'" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    assert convert(tmp_path / "base", out, *checkout, "f32") == 0, capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "made.gguf").read_bytes()


@needs_quantizer
def test_the_real_quantizer_makes_a_k_quant(tmp_path):
    make_model("llama", tmp_path / "model", hidden_size=256, intermediate_size=256)
    result = export(tmp_path / "model", tmp_path / "m.gguf")
    assert read_file_type(tmp_path / "m.gguf") == "q4_k_m"
    assert result["tensor_types"]["q4_k"] > result["tensor_types"]["q6_k"] > 0
