"""A GGUF file becomes a dense checkpoint, once, with the same outputs."""

import fcntl
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_file
from llmtune.io.gguf_head import GgufHead, GgufTensor
from llmtune.models import gguf as gguf_room
from llmtune.models.config import ModelConfig
from llmtune.models.gguf_conversion import _check_sizes
from llmtune.models.load import load_model
from llmtune.models.resolve import resolve_base
from llmtune.planning.base import read_base
from tests.tiny import CHATML, VOCAB_SIZE, make_model, make_tokenizer

TENSOR_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """A Llama of random weights in a GGUF file, and the same model as transformers has it."""
    model = make_model("llama", dtype=torch.bfloat16).float()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model)
    return path, model


def write_gguf(path: Path, model) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _gguf_layout(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer) -> None:
    tokenizer = make_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary += [f"<unused{i}>" for i in range(VOCAB_SIZE - len(vocabulary))]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHATML)


def _gguf_name(name: str) -> str:
    if name in TENSOR_NAMES:
        return TENSOR_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{TENSOR_NAMES[rest.removesuffix('.weight')]}.weight"


def _gguf_layout(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """llama.cpp keeps the two halves of each rotary head interleaved."""
    for part, heads in (
        ("q_proj", config.num_attention_heads),
        ("k_proj", config.num_key_value_heads),
    ):
        if part in name:
            rows, columns = tensor.shape
            halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
            return halves.swapaxes(1, 2).reshape(rows, columns).contiguous()
    return tensor


def test_converted_model_computes_what_the_file_holds(tiny_gguf, cache):
    path, model = tiny_gguf
    source = resolve_base(ModelConfig(base=str(path)))
    converted = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    ids = torch.arange(4, 40)[None]

    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits)


def test_source_and_its_hash_are_recorded(tiny_gguf, cache):
    path, _ = tiny_gguf
    source = resolve_base(ModelConfig(base=str(path)))

    assert source.gguf_sha256 == hash_file(path)
    assert source.origin == str(path)
    assert source.directory == cache / "bases" / source.gguf_sha256[:16]
    assert source.adapter_base == str(source.directory)
    assert "quantization_config" not in (source.directory / "config.json").read_text()


def test_second_use_converts_nothing(tiny_gguf, cache, monkeypatch):
    path, _ = tiny_gguf
    first = resolve_base(ModelConfig(base=str(path)))
    monkeypatch.setattr(gguf_room, "_convert", lambda *args: pytest.fail("converted again"))

    assert resolve_base(ModelConfig(base=str(path))) == first


def test_plan_finds_the_checkpoint_of_a_copy_of_the_file(tiny_gguf, cache, tmp_path, monkeypatch):
    # Made under a relative path, from a directory that is not the one the plan is asked in.
    copied = tmp_path / "copied.gguf"
    shutil.copy(tiny_gguf[0], copied)
    assert read_base(ModelConfig(base=str(copied))).tokenizer_dir is None
    monkeypatch.chdir(tiny_gguf[0].parent)
    made = resolve_base(ModelConfig(base=tiny_gguf[0].name)).directory
    monkeypatch.chdir(tmp_path)

    assert read_base(ModelConfig(base="copied.gguf")).tokenizer_dir == made
    with copied.open("ab") as file:
        file.write(b"more")
    assert read_base(ModelConfig(base="copied.gguf")).tokenizer_dir is None


def test_converted_base_loads_with_a_pad_token_that_is_not_eos(tiny_gguf, cache):
    config = ModelConfig(base=str(tiny_gguf[0]))
    loaded = load_model(config, resolve_base(config))

    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert loaded.tokenizer.pad_token_id not in loaded.stop_token_ids
    assert loaded.tokenizer.chat_template == CHATML


def test_failed_conversion_leaves_nothing_behind(tiny_gguf, cache, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf[0].read_bytes()[:2000])
    with pytest.raises(LlmtuneError, match="cut.gguf"):
        resolve_base(ModelConfig(base=str(cut)))

    assert list((cache / "bases").iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next(tiny_gguf, cache):
    code = (
        "import os, signal; from pathlib import Path;"
        "from llmtune.models import gguf;"
        "gguf._convert = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        f"gguf.dense_checkpoint(Path({str(tiny_gguf[0])!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode < 0
    other = cache / "bases" / ".0123456789abcdef.tmp-left"
    other.mkdir()
    assert len(list((cache / "bases").iterdir())) == 2

    resolve_base(ModelConfig(base=str(tiny_gguf[0])))

    assert [path.name for path in (cache / "bases").iterdir()] == [hash_file(tiny_gguf[0])[:16]]


def test_full_disk_is_one_message_and_leaves_nothing_behind(tiny_gguf, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(LlmtuneError, match="Set LLMTUNE_CACHE"):
            resolve_base(ModelConfig(base=str(tiny_gguf[0])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert list((cache / "bases").iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next_command(tiny_gguf, cache):
    resolve_base(ModelConfig(base=str(tiny_gguf[0])))
    left, written = (cache / "bases" / f".{name}.tmp-abc" for name in ("left", "written"))
    for directory in (left, written):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(bytes(100))
    lock = os.open(written, os.O_RDONLY)  # of a process that runs
    fcntl.flock(lock, fcntl.LOCK_EX)
    resolve_base(ModelConfig(base=str(tiny_gguf[0])))
    assert not left.exists() and written.exists()
    os.close(lock)


def test_sizes_that_the_tensors_do_not_have_are_refused(tmp_path):
    values: dict[str, int | str] = {"general.architecture": "llama", "llama.block_count": 10**7}
    tensors = (GgufTensor("blk.0.attn_q.weight", (64, 64), 0),)
    with pytest.raises(LlmtuneError, match="block_count is '10000000', and its tensors have 1"):
        _check_sizes(GgufHead(values, {}, tensors), tmp_path / "a.gguf")


def test_file_without_the_gguf_magic_is_refused(tmp_path, cache):
    (tmp_path / "model.gguf").write_bytes(b"no magic")
    with pytest.raises(LlmtuneError, match="not a GGUF file"):
        resolve_base(ModelConfig(base=str(tmp_path / "model.gguf")))


def test_conversion_shows_no_progress_bars(tiny_gguf, cache, capfd, caplog):
    with caplog.at_level(logging.INFO):
        resolve_base(ModelConfig(base=str(tiny_gguf[0])))

    assert capfd.readouterr().err == ""
    assert "making a dense checkpoint" in caplog.text
