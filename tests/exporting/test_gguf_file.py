"""A GGUF file holds the checkpoint's tensors, tokenizer and template, or is refused."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer import tiles, write
from llmtune.exporting.gguf_writer.types import FILE_TYPES, GGUF_TYPES
from llmtune.exporting.gguf_writer.write import GgufRequest, runtime_name, write_gguf
from llmtune.io.unfinished import unfinished_file
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import TemplateChoice
from tests.checkpoints import FAMILIES
from tests.exporting.exports import export_model


def export(directory, path, type="f32", *, chat_template=None, **keywords):
    source = Checkpoint.open(directory, template=TemplateChoice(chat_template))
    with unfinished_file(path) as unfinished:
        return write_gguf(GgufRequest(source, unfinished, type, "tiny", **keywords))


def read_tensors(path):
    return {
        tensor.name: quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(int(size) for size in reversed(tensor.shape))
        )
        for tensor in GGUFReader(path).tensors
    }


def field(path, key):
    found = GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_the_checkpoint_is_in_the_file(family, make_checkpoint, tmp_path):
    source = make_checkpoint(family)
    export(source, tmp_path / "model.gguf")
    stored = [tensor.numpy() for tensor in load_file(source / "model.safetensors").values()]
    written = read_tensors(tmp_path / "model.gguf")
    is_gemma = family.startswith("gemma")
    found = np.sort(
        np.concatenate(
            [
                (values - 1 if is_gemma and "norm" in name else values).ravel()
                for name, values in written.items()
            ]
        )
    )
    expected = np.sort(np.concatenate([values.ravel() for values in stored]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 if is_gemma else 0)


def test_query_rows_are_paired_for_llama_and_the_rest_is_in_place(llama_dir, tmp_path):
    export(llama_dir, tmp_path / "model.gguf")
    stored = load_file(llama_dir / "model.safetensors")
    written = read_tensors(tmp_path / "model.gguf")
    query = stored["model.layers.1.self_attn.q_proj.weight"].numpy()
    head = 32
    pairs = [row + half * head // 2 for row in range(head // 2) for half in (0, 1)]
    rows = [start + row for start in range(0, len(query), head) for row in pairs]
    np.testing.assert_array_equal(written["blk.1.attn_q.weight"], query[rows])
    for name, target in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        np.testing.assert_array_equal(
            written[f"blk.1.{target}.weight"], stored[f"model.layers.1.{name}.weight"].numpy()
        )
    assert "output.weight" not in written  # tied


def test_the_numbers_of_file_types_are_llama_cpps():
    official = {name: gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] for name in GGUF_TYPES[1:]}
    assert {"f32": gguf.LlamaFileType.ALL_F32, **official} == FILE_TYPES


def test_small_tiles_give_the_same_file(llama_dir, tmp_path, monkeypatch):
    export(llama_dir, tmp_path / "one.gguf", "q8_0")
    monkeypatch.setattr(tiles, "TILE_NUMBERS", 64)
    export(llama_dir, tmp_path / "two.gguf", "q8_0")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize(
    ("type", "bits"), [("bf16", 8), ("f16", 11), ("q8_0", 8), ("q5_1", 5), ("q4_0", 4)]
)
def test_types_round_as_finely_as_their_bits(type, bits, llama_dir, tmp_path):
    result = export(llama_dir, tmp_path / "model.gguf", type)
    exact = load_file(llama_dir / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    rounded = read_tensors(tmp_path / "model.gguf")["blk.0.ffn_up.weight"]
    error = np.abs(rounded - exact).max()
    assert 0 < error < np.abs(exact).max() * 2.0 ** (1 - bits)
    assert result.tensor_types[type] > 0
    assert result.num_bytes == (tmp_path / "model.gguf").stat().st_size


def test_embedding_is_kept_finer_than_four_bits(llama_dir, tmp_path):
    export(llama_dir, tmp_path / "model.gguf", "q4_1")
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in GGUFReader(tmp_path / "model.gguf").tensors
    }
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "Q4_1"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_bfloat16_is_widened_exactly(llama_dir, tmp_path):
    stored = {
        name: tensor.bfloat16()
        for name, tensor in load_file(llama_dir / "model.safetensors").items()
    }
    source = tmp_path / "bf16"
    shutil.copytree(llama_dir, source)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    export(source, tmp_path / "model.gguf")
    np.testing.assert_array_equal(
        read_tensors(tmp_path / "model.gguf")["blk.0.ffn_up.weight"],
        stored["model.layers.0.mlp.up_proj.weight"].float().numpy(),
    )


def test_tokens_ids_and_template_are_those_of_the_tokenizer(llama_dir, tmp_path):
    path = tmp_path / "model.gguf"
    export(llama_dir, path, provenance={"llmtune.base": "tiny"})
    tokenizer = Checkpoint.open(llama_dir).tokenizer
    keys = gguf.Keys.Tokenizer
    tokens = field(path, keys.LIST)
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = field(path, keys.TOKEN_TYPE)
    assert [kinds[id] for id in range(5)] == [3, 3, 3, 3, 1]
    assert field(path, keys.PRE) == "gpt-2"
    assert field(path, keys.MODEL) == "gpt2"
    assert field(path, keys.BOS_ID) == tokenizer.bos_token_id
    assert field(path, keys.EOS_ID) == tokenizer.eos_token_id
    assert field(path, keys.PAD_ID) == tokenizer.pad_token_id
    assert field(path, keys.ADD_BOS) is False
    assert field(path, keys.CHAT_TEMPLATE) == tokenizer.chat_template
    merges = json.loads((llama_dir / "tokenizer.json").read_text())["model"]["merges"]
    assert field(path, keys.MERGES) == [" ".join(pair) for pair in merges]
    assert field(path, "llmtune.base") == "tiny"


def test_a_template_given_apart_is_the_one_in_the_file(llama_dir, tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    export(llama_dir, tmp_path / "model.gguf", chat_template=template)
    found = field(tmp_path / "model.gguf", gguf.Keys.Tokenizer.CHAT_TEMPLATE)
    assert found == template.read_text()


def test_stop_tokens_of_the_generation_config_are_in_the_file(llama_dir, tmp_path):
    source = tmp_path / "stops"
    shutil.copytree(llama_dir, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    export(source, tmp_path / "model.gguf")
    assert field(tmp_path / "model.gguf", gguf.Keys.Tokenizer.EOS_ID) == 3
    assert field(tmp_path / "model.gguf", gguf.Keys.Tokenizer.EOT_ID) == 1


def test_rows_without_a_token_are_unused(make_checkpoint, tmp_path):
    source = make_checkpoint("qwen2", vocab_size=576)
    export(source, tmp_path / "model.gguf")
    kinds = field(tmp_path / "model.gguf", gguf.Keys.Tokenizer.TOKEN_TYPE)
    assert len(kinds) == 576
    used = len(Checkpoint.open(source).tokenizer.get_vocab())
    assert {int(kind) for kind in kinds[used + 1 :]} == {5}
    assert read_tensors(tmp_path / "model.gguf")["token_embd.weight"].shape[0] == 576


def test_an_existing_file_stays_unless_forced(llama_dir, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF of another day")
    with pytest.raises(LlmtuneError, match="exists already"):
        export_model(llama_dir, "gguf", path)
    assert path.read_bytes() == b"GGUF of another day"
    export_model(llama_dir, "gguf", path, force=True, runtime=False)
    assert GGUFReader(path).tensors
    path.write_text("no export at all")
    with pytest.raises(LlmtuneError, match="so it is not replaced"):
        export_model(llama_dir, "gguf", path, force=True, runtime=False)


def test_a_failed_export_leaves_nothing_and_a_killed_ones_file_goes(llama_dir, tmp_path):
    source = tmp_path / "broken"
    shutil.copytree(llama_dir, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    (out / ".model.gguf.tmp-dead").mkdir()
    (out / ".model.gguf.tmp-dead" / "model.gguf").write_text("left by a kill")
    with pytest.raises(LlmtuneError, match="not finite"):
        export(source, out / "model.gguf")
    assert list(out.iterdir()) == []


def test_numbers_too_large_for_float16_are_refused_by_name(llama_dir, tmp_path):
    source = tmp_path / "large"
    shutil.copytree(llama_dir, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmtuneError, match=r"blk\.1\.ffn_up.*--type bf16"):
        export(source, tmp_path / "model.gguf", "f16")
    export(source, tmp_path / "model.gguf", "bf16")


def test_a_tensor_without_a_place_is_refused_by_name(llama_dir, tmp_path):
    source = tmp_path / "odd"
    shutil.copytree(llama_dir, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmtuneError, match="self_attn.sinks"):
        export(source, tmp_path / "model.gguf")


def test_a_missing_layer_is_refused(llama_dir, tmp_path):
    source = tmp_path / "cut"
    shutil.copytree(llama_dir, source)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmtuneError, match=r"layers \[1\] have no ffn_up"):
        export(source, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "trims", "expected"),
    [
        ("my-phi3-run", False, "my-Phi 3-run"),
        ("my-run", True, "my-run (Phi-3)"),
        ("Phi-3-mini", True, "Phi-3-mini"),
        ("smol", False, "smol"),
    ],
)
def test_the_name_never_changes_how_llama_cpp_cuts_text(name, trims, expected):
    assert runtime_name(name, trims_as_phi3=trims) == expected


def test_a_file_that_another_process_is_writing_is_left_alone(llama_dir, tmp_path):
    other = tmp_path / ".model.gguf.tmp-other"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    export(llama_dir, tmp_path / "model.gguf")
    assert other.exists()
    os.close(lock)


def test_killed_at_any_moment_leaves_no_file_and_the_next_export_is_whole(llama_dir, tmp_path):
    path = tmp_path / "model.gguf"
    code = (
        "import sys; from pathlib import Path;"
        "from llmtune.exporting.gguf_writer import tiles, write;"
        "from llmtune.models.checkpoint import Checkpoint;"
        "from llmtune.io.unfinished import unfinished_file;"
        "tiles.TILE_NUMBERS = 64;"
        "print('ready', flush=True);"
        f"place = unfinished_file(Path({str(path)!r})); path = place.__enter__();"
        f"source = Checkpoint.open(Path({str(llama_dir)!r}));"
        "write.write_gguf(write.GgufRequest(source, path, 'q4_0', 'tiny'));"
        "place.__exit__(None, None, None)"
    )
    for delay in (0.02, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        if path.exists():
            GGUFReader(path)
            path.unlink()
    export(llama_dir, path, "q4_0")
    assert [found.name for found in tmp_path.iterdir()] == ["model.gguf"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    llama_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(write, "HEAD_BYTES", 1 << 60)
    with pytest.raises(LlmtuneError, match="its disk has"):
        export(llama_dir, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
