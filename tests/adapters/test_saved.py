"""An adapter on disk: any peft loads it, and what does not belong together does not load."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llmtune.adapters.dora import DoraAdapter
from llmtune.adapters.inject import inject_adapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.manifest import check_adapter, has_effect, read_adapter_manifest
from llmtune.adapters.rslora import RsLoraAdapter
from llmtune.adapters.saved import load_adapter, save_adapter
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_file
from tests.adapters.conftest import load, logits, manifest_of, stock, train_a_little
from tests.tiny import FAMILIES, make_model

PATTERNS = {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 5}}


@pytest.fixture
def saved(checkpoint, tmp_path):
    """Return a function that saves a trained adapter: (directory, base, the live model)."""

    def make(family: str = "llama", config=None, **knobs):
        loaded = load(checkpoint(family), **knobs)
        model, _ = inject_adapter(loaded.model, config or LoraAdapter(rank=4))
        train_a_little(model)
        return save_adapter(model, tmp_path / "adapter", manifest_of(loaded)), loaded, model

    return make


def change_weights(directory: Path, change) -> None:
    """Change the weights as if they had been saved so."""
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    record_hash(path)


def record_hash(path: Path) -> None:
    manifest = read_adapter_manifest(path.parent)
    manifest["files"][path.name] = hash_file(path)
    (path.parent / "llmtune_adapter.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [LoraAdapter, RsLoraAdapter, DoraAdapter])
def test_stock_peft_and_llmtune_load_what_was_saved(checkpoint, saved, family, make):
    directory, loaded, live = saved(family, make(rank=4, **PATTERNS))
    by_peft = PeftModel.from_pretrained(stock(checkpoint(family), loaded.attention), str(directory))
    by_llmtune = load_adapter(
        stock(checkpoint(family), loaded.attention), directory, base_fingerprint=loaded.fingerprint
    )

    expected = logits(live)
    torch.testing.assert_close(logits(by_peft), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(by_llmtune), expected, rtol=0, atol=1e-6)
    with live.disable_adapter():
        assert (logits(live) - expected).abs().max() > 0.01


SAVED_IN_A_PROCESS = """
import sys
from pathlib import Path
import torch
from llmtune.adapters.inject import inject_adapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.saved import save_adapter
from llmtune.training.checkpoint import save_weights
from tests.tiny import make_model, make_tokenizer
torch.manual_seed(0)
model, _ = inject_adapter(make_model("llama"), LoraAdapter(rank=2, modules_to_save=["norm"]))
target = Path(sys.argv[1])
save_adapter(model, target / "adapter", {"base": {"path": "/base"}}, tokenizer=make_tokenizer())
(target / "checkpoint").mkdir()
save_weights(model, target / "checkpoint")
"""


def test_two_processes_save_the_same_adapter_byte_for_byte(tmp_path):
    for seed in ("1", "2"):
        command = [sys.executable, "-c", SAVED_IN_A_PROCESS, str(tmp_path / seed)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    one, other = (files_of(tmp_path / seed) for seed in ("1", "2"))
    config = json.loads(one["adapter/adapter_config.json"])
    assert one == other
    assert config["target_modules"] == sorted(config["target_modules"])


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_tokenizer_is_saved_with_its_template_and_every_file_is_in_the_manifest(
    checkpoint, saved
):
    directory, loaded, live = saved()
    loaded.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    save_adapter(live, directory, manifest_of(loaded), tokenizer=loaded.tokenizer)
    again = AutoTokenizer.from_pretrained(directory)
    files = read_adapter_manifest(directory)["files"]
    by_peft = PeftModel.from_pretrained(stock(checkpoint()), str(directory))

    assert again.chat_template == loaded.tokenizer.chat_template
    assert again("A warm film.")["input_ids"] == loaded.tokenizer("A warm film.")["input_ids"]
    assert (directory / "chat_template.jinja").is_file()
    assert set(files) == {path.name for path in directory.iterdir()} - {"llmtune_adapter.json"}
    assert all(hash_file(directory / name) == sha256 for name, sha256 in files.items())
    torch.testing.assert_close(logits(by_peft), logits(live), rtol=0, atol=1e-6)


def test_more_than_one_template_is_saved_and_readable(saved):
    directory, loaded, live = saved()
    loaded.tokenizer.chat_template = {"default": "one", "tool_use": "two"}
    save_adapter(live, directory, manifest_of(loaded), tokenizer=loaded.tokenizer)

    assert AutoTokenizer.from_pretrained(directory).chat_template["tool_use"] == "two"
    assert "additional_chat_templates/tool_use.jinja" in read_adapter_manifest(directory)["files"]


def test_no_template_card_stands_where_the_one_with_the_numbers_belongs(saved):
    directory, _, _ = saved()

    assert not (directory / "README.md").exists()
    assert "README.md" not in read_adapter_manifest(directory)["files"]


def test_adapter_of_a_four_bit_base_loads_on_it_again(checkpoint, saved):
    knobs = {"quantization": {"method": "nf4"}, "dtype": "bfloat16"}
    directory, loaded, live = saved(**knobs)
    again = load_adapter(
        load(checkpoint(), **knobs).model, directory, base_fingerprint=loaded.fingerprint
    )

    torch.testing.assert_close(logits(again), logits(live), rtol=0, atol=0)


def test_whole_saved_modules_come_back(checkpoint, saved):
    config = LoraAdapter(rank=4, modules_to_save=["lm_head"])
    directory, loaded, live = saved(config=config)
    with torch.no_grad():
        live.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    save_adapter(live, directory, manifest_of(loaded))
    again = load_adapter(stock(checkpoint()), directory, base_fingerprint=loaded.fingerprint)

    torch.testing.assert_close(logits(again), logits(live), rtol=0, atol=1e-6)


def test_loaded_adapter_is_frozen_unless_asked_otherwise(checkpoint, saved):
    directory, loaded, _ = saved()
    frozen = load_adapter(stock(checkpoint()), directory, base_fingerprint=loaded.fingerprint)
    trainable = load_adapter(
        stock(checkpoint()), directory, base_fingerprint=loaded.fingerprint, trainable=True
    )

    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, _ in trainable.named_parameters() if "lora_" in n
    }


def test_manifest_is_kept_beside_the_adapter(saved):
    directory, loaded, _ = saved()
    manifest = read_adapter_manifest(directory)

    assert manifest["template_hash"] == "abc"
    assert manifest["base"]["fingerprint"] == loaded.fingerprint


def test_base_is_recorded_as_absolute_path_or_as_hub_id_with_commit(saved, tmp_path):
    directory, loaded, model = saved()
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(loaded.source.directory)
    assert config["revision"] is None

    manifest = manifest_of(loaded)
    manifest["base"] |= {"origin": "org/tiny", "revision": "c0ffee"}
    save_adapter(model, tmp_path / "other", manifest)
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", "c0ffee")


def test_adapter_on_another_base_is_refused_with_both_names(checkpoint, saved):
    directory, loaded, _ = saved()
    other = load(checkpoint(seed=1))
    with pytest.raises(LlmtuneError) as caught:
        load_adapter(other.model, directory, base_fingerprint=other.fingerprint)

    for part in (loaded.source.origin, loaded.fingerprint[:16], other.fingerprint[:16]):
        assert part in str(caught.value)


def test_renamed_tensor_is_named_as_missing_and_unexpected(checkpoint, saved):
    directory, loaded, _ = saved()
    change_weights(directory, lambda w: {k.replace("q_proj", "query"): v for k, v in w.items()})
    with pytest.raises(LlmtuneError) as caught:
        load_adapter(stock(checkpoint()), directory, base_fingerprint=loaded.fingerprint)

    assert "4 tensors missing: base_model.model.model.layers.0.self_attn.q_proj" in str(
        caught.value
    )
    assert "4 tensors unexpected" in str(caught.value)


def test_tensor_of_another_shape_is_named(checkpoint, saved):
    directory, loaded, _ = saved()
    change_weights(
        directory, lambda w: {k: v[:2] if "0.mlp.up_proj.lora_A" in k else v for k, v in w.items()}
    )
    with pytest.raises(LlmtuneError, match=r"up_proj.lora_A.weight \(2, 64\).*needs \(4, 64\)"):
        load_adapter(stock(checkpoint()), directory, base_fingerprint=loaded.fingerprint)


def test_cut_file_is_one_clear_error(checkpoint, saved):
    directory, loaded, _ = saved()
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LlmtuneError, match="changed since the adapter was saved"):
        load_adapter(stock(checkpoint()), directory, base_fingerprint=loaded.fingerprint)
    record_hash(path)
    with pytest.raises(LlmtuneError, match="cannot read it"):
        load_adapter(stock(checkpoint()), directory, base_fingerprint=loaded.fingerprint)


def test_one_changed_byte_of_the_weights_is_seen_by_the_hash_that_was_saved(checkpoint, saved):
    directory, loaded, _ = saved()
    content = bytearray((directory / "adapter_model.safetensors").read_bytes())
    content[-2] ^= 1
    (directory / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(LlmtuneError, match="adapter_model.safetensors changed since"):
        check_adapter(directory, base_fingerprint=loaded.fingerprint)


def test_an_edited_alpha_is_seen_by_the_hash_that_was_saved(checkpoint, saved):
    directory, loaded, _ = saved()
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(LlmtuneError, match="adapter_config.json changed since"):
        check_adapter(directory, base_fingerprint=loaded.fingerprint)


def test_stock_adapter_loads_with_a_notice(checkpoint, tmp_path, caplog):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(stock(checkpoint()), config)
    train_a_little(model)
    model.save_pretrained(str(tmp_path / "stock"))
    again = load_adapter(stock(checkpoint()), tmp_path / "stock", base_fingerprint="0" * 64)

    assert "not written by llmtune" in caplog.text
    assert check_adapter(tmp_path / "stock", base_fingerprint="0" * 64)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_stock_adapter_of_another_shape_is_refused(checkpoint, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    get_peft_model(stock(checkpoint()), config).save_pretrained(str(tmp_path / "stock"))
    with pytest.raises(LlmtuneError, match="does not fit this model"):
        load_adapter(
            make_model("llama", num_hidden_layers=3), tmp_path / "stock", base_fingerprint="0" * 64
        )
    with pytest.raises(LlmtuneError, match="does not fit this model"):
        load_adapter(make_model("gpt2"), tmp_path / "stock", base_fingerprint="0" * 64)


def test_fresh_adapter_has_no_effect_and_a_trained_one_has(checkpoint, saved, tmp_path):
    trained, loaded, _ = saved()
    fresh, _ = inject_adapter(load(checkpoint()).model, LoraAdapter(rank=4))

    assert has_effect(trained)
    assert not has_effect(save_adapter(fresh, tmp_path / "fresh", manifest_of(loaded)))


def test_saving_again_replaces_the_adapter_and_leaves_nothing_else(saved, tmp_path):
    directory, loaded, model = saved()
    (directory / "README.md").write_text("old")
    save_adapter(model, directory, manifest_of(loaded))

    assert not (directory / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_failed_save_keeps_the_adapter_that_was_there(saved, tmp_path):
    bad: Any = object()
    directory, loaded, model = saved()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(TypeError):
        save_adapter(model, directory, {**manifest_of(loaded), "bad": bad})

    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_full_disk_keeps_the_adapter_that_was_there(saved, tmp_path):
    directory, loaded, model = saved()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(LlmtuneError, match="cannot be saved"):
            save_adapter(model, directory, manifest_of(loaded))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_directory_with_other_files_is_not_overwritten(saved, tmp_path):
    _, loaded, model = saved()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(LlmtuneError, match="not overwritten"):
        save_adapter(model, tmp_path / "mine", manifest_of(loaded))

    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no adapter here"),
        ({"adapter_config.json": "{"}, "is not JSON"),
        ({"adapter_config.json": '{"peft_type": "POLY"}'}, "of type POLY"),
        ({"adapter_config.json": '{"peft_type": "LORA"}'}, "no adapter_model.safetensors"),
        (
            {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.bin": ""},
            "pickled weights, which are not read",
        ),
    ],
)
def test_what_is_no_readable_adapter_says_what_it_is(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(LlmtuneError, match=message):
        check_adapter(tmp_path, base_fingerprint="0" * 64)
