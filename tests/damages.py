"""Ways in which a file of a base, an adapter or a run is damaged: functions of its bytes."""

import json
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load, save

Damage = Callable[[bytes], bytes]

PLAIN: dict[str, Damage] = {
    "empty": lambda content: b"",
    "null": lambda content: b"null",
    "list": lambda content: b"[]",
    "number": lambda content: b"5",
    "object": lambda content: b"{}",
    "cut": lambda content: content[: len(content) // 2],
    "binary": lambda content: b"\xff\xfe\x00" + content,
}
"""Of any JSON file."""

CATASTROPHIC = "([a-z_.0-9]+)+!"
WRONG: dict[str, dict[str, list[object]]] = {
    "base/config.json": {
        "model_type": [None, 5, [], "nope"],
        "architectures": [5, ["Nope"]],
        "hidden_act": ["nope", 5, None],
        "num_hidden_layers": [10**7, -1, "2", 0, 2.5, [1], None],
        "hidden_size": [63, 10**6, 0, "x", None, True],
        "intermediate_size": [0, 10**12, "x"],
        "vocab_size": [10**9, 3, 0, "x", None],
        "num_attention_heads": [0, 7, "x", -1],
        "num_key_value_heads": [0, 3, "x"],
        "head_dim": [0, "x"],
        "rope_parameters": [5, {"rope_type": "nope"}, {"rope_type": "linear"}, {"rope_theta": "x"}],
        "rms_norm_eps": ["x", None],
        "max_position_embeddings": ["x", 0, -1, 10**30],
        "pad_token_id": [10**6, "x", -5],
        "eos_token_id": ["x", 10**6, [], ["x"], {"a": 1}],
        "tie_word_embeddings": ["x", None],
        "dtype": ["float99", 5],
        "text_config": [5, []],
        "quantization_config": [5, [1], {"quant_method": "nope"}, {"load_in_4bit": True}],
        "attention_dropout": ["x"],
        "auto_map": [5, {"AutoConfig": "x.Y"}],
    },
    "base/generation_config.json": {
        "eos_token_id": ["x", [10**9], {"a": 1}, [None]],
        "temperature": [-1, "x"],
        "do_sample": ["x"],
        "max_new_tokens": ["x", -1],
        "cache_implementation": ["nope"],
    },
    "base/tokenizer.json": {
        "model": [None, 5, {"type": "Nope"}, {"type": "BPE", "vocab": 5, "merges": []}, {}],
        "added_tokens": [5, [5], [{"id": 10**9, "content": "x"}], [{"id": "x"}], [{}]],
        "pre_tokenizer": [5, {"type": "Nope"}],
        "decoder": [{"type": "Nope"}],
        "post_processor": [{"type": "TemplateProcessing", "single": 5}],
        "normalizer": [{"type": "Nope"}],
        "truncation": [5, {"max_length": -1}],
        "version": ["99.0"],
    },
    "base/tokenizer_config.json": {
        "eos_token": [5, {"x": 1}, [], None, "<|nope|>"],
        "chat_template": [5, ["x"], {"a": 1}, "{% if %}", "{{ " * 400, "{{ 'a' * 10**10 }}"],
        "tokenizer_class": [5, "Nope"],
        "model_max_length": ["x", -1],
        "added_tokens_decoder": [5, {"x": 1}, {"7": {"content": 5}}],
        "extra_special_tokens": [5, {"a": 5}],
        "padding_side": ["up"],
    },
    "adapter/adapter_config.json": {
        "peft_type": [None, 5, "IA3", "POLY", "nope"],
        "r": ["x", 0, -1, 10**9, None, [4], True],
        "lora_alpha": ["x", None, 1e300, [8]],
        "lora_dropout": ["x", 5],
        "target_modules": [None, 5, [], [5], "(((", "nope", ["nope"], CATASTROPHIC, {"a": 1}],
        "exclude_modules": [5, CATASTROPHIC],
        "rank_pattern": [[], 5, {"q_proj": "x"}, {"q_proj": 0}, {CATASTROPHIC: 4}, {"((": 4}],
        "alpha_pattern": [{"q_proj": None}, {CATASTROPHIC: 4}],
        "modules_to_save": ["x", [5], ["nope"]],
        "bias": [5, "nope"],
        "task_type": ["nope", 5],
        "init_lora_weights": [5, "nope", []],
        "layers_to_transform": ["x", [10**9], ["x"]],
        "use_dora": ["x", 5],
        "use_rslora": [None],
        "trainable_token_indices": ["x", [10**9], {"a": "x"}, [-1]],
        "target_parameters": [5, ["nope"]],
        "new_of_tomorrow": [5],
        "auto_mapping": [5, {"base_model_class": "x"}],
    },
    "adapter/llmtune_adapter.json": {
        "format": [None, "x"],
        "base": [None, 5, "x", {"fingerprint": 5}],
        "config": [5, {"model": 5}],
        "files": [5, {"adapter_config.json": 5}],
        "template": [None, 5, {}, {"golden_prompt_ids": 5}],
        "stop_token_ids": [5, "x"],
    },
    "manifest.json": {
        "format": [2, "x"],
        "config": [5, {}, {"model": 5}, {"model": {}}],
        "stages": [5, [], {"train": 5}, {"train": {"result": 5}}, {"train": {}}],
        "created": [5],
        "base": [5, {}],
        "data": [5],
    },
    "merged/llmtune_merge.json": {
        "base": [5, None],
        "strength": ["x", None],
        "adapters": [5],
        "adapter_hash": [5, None],
    },
}
INDEXES: dict[str, object] = {
    "weight_map-null": {"weight_map": None},
    "weight_map-list": {"weight_map": ["a"]},
    "weight_map-empty": {"weight_map": {}},
    "weight_map-above": {"weight_map": {"a": "../x.safetensors"}},
    "weight_map-absolute": {"weight_map": {"a": "/etc/passwd"}},
    "weight_map-number": {"weight_map": {"a": 5}},
    "weight_map-missing": {"weight_map": {"a": "none.safetensors"}},
    "metadata-number": {"metadata": 5, "weight_map": {"a": "model.safetensors"}},
}


def _cast(dtype: torch.dtype) -> Damage:
    return lambda content: save({name: t.to(dtype) for name, t in load(content).items()})


def _header(text: str) -> Damage:
    return lambda content: len(text).to_bytes(8, "little") + text.encode()


def _without(word: str) -> Damage:
    return lambda content: save({n: t for n, t in load(content).items() if word not in n})


WEIGHTS: dict[str, Damage] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut-header": lambda content: content[:20],
    "longer": lambda content: content + b"\0" * 8,
    "zeros": lambda content: b"\0" * len(content),
    "null": _header("null"),
    "list": _header("[]"),
    "no-tensors": _header("{}"),
    "metadata-number": _header('{"__metadata__": 5}'),
    "entry-null": _header('{"a": null}'),
    "offsets": _header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [9e999, 4]}}'),
    "shape": _header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'),
    "unknown-dtype": _header('{"a": {"dtype": "F99", "shape": [], "data_offsets": [0, 4]}}'),
    "float64": _cast(torch.float64),
    "int64": _cast(torch.int64),
    "bool": _cast(torch.bool),
    "flat": lambda content: save({name: t.flatten() for name, t in load(content).items()}),
    "one-missing": _without("layers.1"),
    "nan": lambda content: save({n: t * float("nan") for n, t in load(content).items()}),
}


def wrong_value(key: str, value: object) -> Damage:
    """Return a damage that sets one key of a JSON object."""
    return lambda content: json.dumps({**json.loads(content), key: value}).encode()


def whole(value: object) -> Damage:
    """Return a damage that puts a JSON value in the place of a file."""
    return lambda content: json.dumps(value).encode()


def damages_of(name: str) -> Iterator[tuple[str, Damage]]:
    """Yield what can be wrong with a file, by its name in a run."""
    if name.endswith(".index.json"):
        yield from PLAIN.items()
        for label, content in INDEXES.items():
            yield label, whole(content)
    elif name.endswith(".safetensors"):
        yield from WEIGHTS.items()
    else:
        yield from PLAIN.items()
        for key, values in WRONG.get(name, {}).items():
            for value in values:
                yield f"{key}={str(value)[:30]}", wrong_value(key, value)
