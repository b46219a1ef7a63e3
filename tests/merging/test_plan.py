"""Whatever an adapter holds that has no place in the base is an error that names it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.errors import LlmtuneError
from llmtune.merging.plan import plan_merge
from llmtune.models.checkpoint import Checkpoint
from tests.merging.adapters import load_adapter, load_base, make_adapter, make_base

PREFIX = "base_model.model.model.layers.0.self_attn."


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    make_adapter(make_base(directory / "base"), directory / "adapter")
    return directory


@pytest.fixture
def place(made, tmp_path) -> Path:
    """A base and an adapter that the test may spoil."""
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    return tmp_path


def change_tensors(place: Path, **renamed: str | None) -> None:
    path = place / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for old, new in renamed.items():
        tensor = tensors.pop(PREFIX + old.replace("__", "."))
        if new is not None:
            tensors[new] = tensor
    save_file(tensors, path)


def change_config(place: Path, part: str, **settings) -> None:
    path = place / part
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def plan(place: Path, **options):
    return plan_merge(Checkpoint.open(place / "base"), place / "adapter", **options)


def refuse(place: Path, message: str) -> str:
    with pytest.raises(LlmtuneError, match=message) as error:
        plan(place)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_plan_lists_every_changed_tensor_as_json(place):
    listed = json.loads(json.dumps(plan(place).to_dict()))
    assert listed["tensors"] == 21
    assert len(listed["changed"]) == 14
    first = listed["changed"][0]
    assert (first["change"], first["dtype"]) == ("lora", "F32")
    (delta,) = first["deltas"]
    assert (delta["rank"], delta["scaling"], delta["weight"]) == (4, 2.0, 1.0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_planned_scalings_are_those_of_the_live_model(tmp_path, use_rslora):
    make_adapter(
        make_base(tmp_path / "base"),
        tmp_path / "adapter",
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 8, r"layers\.1\.self_attn\.k_proj": 2, "proj": 3},
        alpha_pattern={r"^model\.layers\.0\..*": 5, "down_proj|o_proj": 11},
    )
    live = load_adapter(tmp_path / "base", tmp_path / "adapter").base_model.model
    tensors = {tensor.name: tensor for tensor in plan(tmp_path).tensors}
    for name, module in live.named_modules():
        if hasattr(module, "lora_A"):
            (update,) = tensors[f"{name}.weight"].updates
            assert update.scaling == module.scaling["default"], name


def test_unmatched_tensor_is_named_with_near_misses(place):
    change_tensors(
        place,
        q_proj__lora_A__weight=PREFIX + "q_prj.lora_A.weight",
        q_proj__lora_B__weight=PREFIX + "q_prj.lora_B.weight",
    )
    message = refuse(place, "has no place in the base")
    assert "q_prj.lora_A.weight" in message
    assert "'model.layers.0.self_attn.q_proj.weight'" in message


def test_adapter_of_a_wider_base_is_refused_with_both_shapes(place):
    shutil.rmtree(place / "base")
    make_base(place / "base", intermediate_size=256)
    refuse(place, r"shape \[4, 128\] does not fit .* of shape \[64, 256\]; is this the adapter's")


def test_transposed_weight_is_not_taken_for_a_conv1d(place):
    weights = place / "base" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, weights)
    refuse(place, "does not fit")


def test_half_a_pair_is_refused(place):
    change_tensors(place, q_proj__lora_B__weight=None)
    refuse(place, "q_proj' has no lora_B")


def test_tensor_that_is_not_pefts_is_refused(place):
    change_tensors(place, q_proj__lora_A__weight="q_proj.lora_A.weight")
    refuse(place, "does not begin with 'base_model.model.'")


def test_lora_tensor_of_an_unknown_kind_is_refused(place):
    change_tensors(place, q_proj__lora_A__weight=PREFIX + "q_proj.lora_C.weight")
    refuse(place, "merging does not know")


def test_two_adapters_in_one_file_are_refused(place):
    path = place / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[PREFIX + "q_proj.lora_A.other.weight"] = torch.zeros(4, 64)
    save_file(tensors, path)
    refuse(place, "more than one adapter")


def test_rank_that_contradicts_the_config_is_refused(place):
    change_config(place, "adapter/adapter_config.json", r=6)
    refuse(place, "gives that module rank 6")


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "POLY"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"alora_invocation_tokens": [5]},
        {"use_qalora": True},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1}},
        {"some_new_setting": True},
    ],
)
def test_kinds_that_do_not_merge_are_refused_by_name(place, settings):
    change_config(place, "adapter/adapter_config.json", **settings)
    setting, value = next(iter(settings.items()))
    refuse(place, re.escape(value if setting == "peft_type" else setting))


def test_lora_bias_without_a_bias_in_the_base_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    refuse(tmp_path, "lora_bias.*cannot be merged")


def test_quantized_base_is_refused(place):
    change_config(place, "base/config.json", quantization_config={"quant_method": "bitsandbytes"})
    refuse(place, "already quantized")


def test_base_stored_in_8_bits_is_refused(place):
    weights = place / "base" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, weights)
    refuse(place, "stored as F8_E4M3")


def test_missing_shard_of_the_base_is_named(place):
    load_base(place / "base").save_pretrained(place / "base", max_shard_size=60_000)
    (place / "base" / "model.safetensors").unlink()
    shard = sorted((place / "base").glob("model-*.safetensors"))[1]
    shard.unlink()
    refuse(place, re.escape(shard.name))


@pytest.mark.parametrize("part", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_corrupted_header_is_named(place, part):
    path = place / part
    path.write_bytes(path.read_bytes()[:8] + b"?" + path.read_bytes()[9:])
    refuse(place, re.escape(str(path)) + ".*malformed")


def test_pickled_adapter_is_refused(place):
    (place / "adapter" / "adapter_model.safetensors").rename(
        place / "adapter" / "adapter_model.bin"
    )
    refuse(place, "pickle")


def test_directory_that_is_no_adapter_is_refused(place):
    (place / "adapter" / "adapter_config.json").unlink()
    refuse(place, "adapter_config.json")


def test_head_tied_by_the_config_but_not_in_the_file_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    change_config(tmp_path, "base/config.json", tie_word_embeddings=True)
    refuse(tmp_path, "tie_word_embeddings")


def test_grown_vocabulary_at_half_strength_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"):
        tensors[name] = torch.zeros(520, 64)
    save_file(tensors, path)
    assert plan(tmp_path).config_changes == {"vocab_size": 520}
    with pytest.raises(LlmtuneError, match=r"only be merged at strength 1, not 0\.5"):
        plan(tmp_path, strength=0.5)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(512, 64)
    save_file(tensors, path)
    refuse(tmp_path, "one of two tensors only")


def test_token_row_outside_the_table_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", trainable_token_indices=[5, 7])
    change_config(tmp_path, "adapter/adapter_config.json", trainable_token_indices=[5, 700])
    refuse(tmp_path, "row 700")


def test_expert_adapter_that_fits_nothing_is_refused(tmp_path):
    base = make_base(tmp_path / "base", "mixtral")
    make_adapter(base, tmp_path / "adapter")
    shutil.rmtree(base)
    make_base(base, "mixtral", num_local_experts=2)
    refuse(tmp_path, "mlp.experts.* fits none of the base's tensors")


def test_adapter_of_another_base_of_the_same_shape_is_refused(place):
    manifest = {"format": 1, "base": {"origin": "org/other", "fingerprint": "0" * 64}}
    (place / "adapter" / "llmtune_adapter.json").write_text(json.dumps(manifest))
    assert "org/other" in refuse(place, "trained on a different base")
    manifest["base"]["fingerprint"] = Checkpoint.open(place / "base").fingerprint
    (place / "adapter" / "llmtune_adapter.json").write_text(json.dumps(manifest))
    assert not plan(place).notices


def test_adapter_that_does_not_name_its_base_is_merged_with_a_notice(place):
    assert "cannot be verified" in plan(place).notices[0]


def test_adapter_that_changes_nothing_is_an_error(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", scale=0.0)
    refuse(tmp_path, "no effect")
    assert plan(tmp_path, strength=0).strength == 0
