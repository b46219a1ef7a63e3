"""Load a base model onto one device, quantized as asked, and check that it is what was asked."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import blamed_on
from llmtune.io.safetensors import CheckpointIndex
from llmtune.models.build import DTYPES, build_model
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import choose_attention, choose_device, choose_dtype
from llmtune.models.live import LiveModel, ModelIdentity
from llmtune.models.quantization.base import Quantization
from llmtune.models.quantization.config import SMALLEST
from llmtune.models.quantization.describe import (
    QuantizationTable,
    check_quantization,
    describe_quantization,
    expert_stacks,
    keep_differentiable,
)
from llmtune.models.quantized_cache import (
    READ_ERRORS,
    is_whole,
    keep_quantized,
    quantized_entry,
    say_unusable,
)
from llmtune.models.quiet import quiet_loading
from llmtune.models.skeleton import require_known_code
from llmtune.models.turns import stop_token_ids

# Knobs that only sampling reads. Beside `do_sample: false` they make `save_pretrained` raise.
SAMPLING_KNOBS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
)
LOAD_ADVICE = "if the message is not clear, fetch config.json and the weights again"


def load_model(config: ModelConfig, source: Checkpoint, *, stays_mapped: bool = False) -> LiveModel:
    """Load the checkpoint in `source` as `config` says.

    The whole model goes onto one device; nothing is offloaded, and no precision is lowered or
    raised unasked.

    Args:
        stays_mapped: leave the weights in their files, mapped into the computer's memory; the
            caller moves them to `device` a part at a time.

    Raises:
        LlmtuneError: this machine cannot do what was asked, the architecture is unknown, weights
            are missing or have other shapes, or the model does not fit into memory.
    """
    model_config = source.config
    require_known_code(
        f"model.base={config.base}", model_config, trust_remote_code=config.trust_remote_code
    )
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, source.model_type)
    attention = choose_attention(config, device, model_config)
    tokenizer = source.tokenizer
    place = torch.device("cpu") if stays_mapped else device
    if stays_mapped:
        _require_mappable(config, source, dtype)
    keywords = _loading_keywords(config, source, device=place, dtype=dtype, attention=attention)
    entry = quantized_entry(config, source, dtype=dtype, device=device)
    model = None if entry is None else _load_kept(entry, config, source, keywords)
    is_kept = model is not None
    model = model or _load_weights(config, source, keywords)
    if not is_kept:
        config.storage.finish_loading(model)
    keep_differentiable(model)
    check_quantization(model, config.storage, dtype)
    _check_placement(model, place)
    model.config.pad_token_id = tokenizer.pad_token_id
    stops = stop_token_ids(tokenizer, model.generation_config)
    notices = repair_generation_config(model, stops, tokenizer.pad_token_id)
    quantized = describe_quantization(model, config.quantization_method)
    if entry is not None and not is_kept:
        keep_quantized(entry, model, source.directory, quantized.bytes)
    return LiveModel(
        model=model.eval(),
        tokenizer=tokenizer,
        source=source,
        identity=ModelIdentity(
            base=source.fingerprint,
            adapter=None,
            dtype=str(dtype).removeprefix("torch."),
            quantization=config.quantization_method,
        ),
        device=device,
        dtype=dtype,
        attention=model.config._attn_implementation,
        quantized=quantized,
        stop_token_ids=stops,
        notices=(
            *(() if source.stored is None else (f"base: {source.stored.describe()}",)),
            *notices,
            *_device_notices(config, device),
            *_quantization_notices(model, quantized, config.storage),
        ),
    )


def _require_mappable(config: ModelConfig, source: Checkpoint, dtype: torch.dtype) -> None:
    """Refuse what would be copied whole into every process's memory to be cut."""
    if not source.has_safetensors:
        raise LlmtuneError(
            f"{source.origin}: train.shard=full reads safetensors, and this base has none; convert "
            "it, or set train.shard=none"
        )
    stored = Counter[str]()
    for entry in CheckpointIndex.open(source.directory).tensors.values():
        stored[entry.dtype] += entry.num_bytes
    ((most, _),) = stored.most_common(1)
    if DTYPES.get(most) != dtype:
        found = str(DTYPES.get(most, most)).removeprefix("torch.")
        wanted = str(dtype).removeprefix("torch.")
        raise LlmtuneError(
            f"{source.origin} is stored in {found} and would be trained in {wanted}: with "
            "train.shard=full every process would hold a converted copy of all of it. Set "
            f"model.dtype={found}, or take a base that is stored in {wanted}"
        )


def _loading_keywords(
    config: ModelConfig,
    source: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
) -> dict[str, Any]:
    keywords = {
        "dtype": dtype,
        "device_map": {"": str(device)},
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": config.weights == "safetensors" or source.has_safetensors,
        "weights_only": True,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported there, and refused below by name
    }
    if attention is not None:
        keywords["attn_implementation"] = attention
    quantization = config.storage.loading_config(dtype)
    if quantization is not None:
        keywords["quantization_config"] = quantization
    return keywords


def _load_kept(
    entry: Path, config: ModelConfig, source: Checkpoint, keywords: dict[str, Any]
) -> PreTrainedModel | None:
    """Load the base as it was quantized before; None if it is not kept, or not usable."""
    if not is_whole(entry):
        return None
    kept = {name: keywords[name] for name in keywords.keys() - {"quantization_config"}}
    try:
        with quiet_loading():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(entry), **kept | {"use_safetensors": True}
            )
        _check_loading_info(info, source)
        check_quantization(model, config.storage, kept["dtype"])
    except torch.OutOfMemoryError as error:
        raise _too_large(config, source, keywords) from error
    except (*READ_ERRORS, RuntimeError, LlmtuneError) as error:
        say_unusable(entry, error)
        return None
    model.name_or_path = model.config._name_or_path = str(source.directory)
    return model


def _load_weights(
    config: ModelConfig, source: Checkpoint, keywords: dict[str, Any]
) -> PreTrainedModel:
    storage = config.storage
    asked = f"model.quantization.method={storage.method}, " if storage.is_quantized else ""
    reader = f"transformers (with {asked}{keywords['dtype']}, {keywords['device_map']['']})"
    try:
        with blamed_on(source.directory / CONFIG_NAME, reader, advice=LOAD_ADVICE), quiet_loading():
            model, info = build_model(source.directory, keywords)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(config, source, keywords) from error
    _check_loading_info(info, source)
    return model


def _too_large(config: ModelConfig, source: Checkpoint, keywords: dict[str, Any]) -> LlmtuneError:
    return LlmtuneError(
        f"{source.origin}: the base does not fit into the memory of {keywords['device_map']['']} "
        f"({config.quantization_method}, {keywords['dtype']}). Set model.quantization="
        f"'{{method: {SMALLEST.method}}}', choose a smaller base, or free the GPU."
    )


def _check_loading_info(info: dict[str, Any], source: Checkpoint) -> None:
    """Refuse a model of which parts were filled with random numbers: transformers only warns."""
    mismatched = [str(item[0]) for item in info.get("mismatched_keys", ())]
    for kind, keys in (("missing", info["missing_keys"]), ("of a different shape", mismatched)):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            raise LlmtuneError(
                f"{source.directory}: {len(keys)} weights are {kind} in the checkpoint, such as "
                f"{shown}. They would be random numbers; download or convert the base again."
            )


def _check_placement(model: PreTrainedModel, device: torch.device) -> None:
    elsewhere = sorted({str(p.device) for p in model.parameters() if p.device != device})
    if elsewhere:
        raise LlmtuneError(
            f"part of the base was put on {', '.join(elsewhere)} and not on {device}: it does not "
            f"fit. Set model.quantization='{{method: {SMALLEST.method}}}' or choose a smaller base."
        )


def _quantization_notices(
    model: PreTrainedModel, quantized: QuantizationTable, quantization: Quantization
) -> Iterator[str]:
    if not quantization.is_quantized:
        return
    experts = sum(stack.numel() for _, stack in expert_stacks(model))
    if experts:
        yield (
            f"expert weights ({experts / quantized.num_parameters:.0%} of the model) stay in "
            f"{model.dtype}: {quantized.method} covers linear layers only"
        )
    yield from quantization.notices(model.dtype)


def _device_notices(config: ModelConfig, device: torch.device) -> tuple[str, ...]:
    if config.device == "auto" and device.type == "cpu":
        return ("no GPU was found: the CPU is used",)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        idle = torch.cuda.device_count() - 1
        return (
            f"one process uses one GPU: {device}; {idle} more stay idle (torchrun --nproc-per-node "
            f"{idle + 1} -m llmtune run CONFIG would use them, see docs/scale.md)",
        )
    return ()


def repair_generation_config(
    model: PreTrainedModel, stop_ids: tuple[int, ...], pad_id: int
) -> tuple[str, ...]:
    """Give `model.generation_config` all stop tokens and the pad token, and make it savable.

    Sampling knobs beside `do_sample: false` are dropped: greedy decoding never read them. Returns
    one line for each such change.

    Raises:
        LlmtuneError: the config cannot be saved even so; found now and not after hours of training.
    """
    config = model.generation_config
    notices = _drop_unread_sampling(config)
    config.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    config.pad_token_id = pad_id
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config.save_pretrained(directory)
        except ValueError as error:
            raise LlmtuneError(
                f"{model.name_or_path}/generation_config.json: transformers will not save it: "
                f"{error}. Correct that file."
            ) from error
    return notices


def _drop_unread_sampling(config: GenerationConfig) -> tuple[str, ...]:
    if config.do_sample:
        return ()
    neutral = GenerationConfig()
    dropped = [
        name
        for name in SAMPLING_KNOBS
        if getattr(config, name, None) not in (None, getattr(neutral, name, None))
    ]
    for name in dropped:
        setattr(config, name, getattr(neutral, name, None))
    if not dropped:
        return ()
    names = ", ".join(dropped)
    return (f"generation config: {names} dropped, because do_sample is false there",)
