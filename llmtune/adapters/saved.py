"""An adapter on disk: stock peft format plus our manifest, written whole, read strictly."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llmtune.adapters.config import method_of
from llmtune.adapters.live import attach, keep_own, live_method
from llmtune.adapters.manifest import (
    CONFIG_NAME,
    COPY_AGAIN,
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    check_adapter,
    read_adapter_config,
)
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonValue, hash_file
from llmtune.io.json_files import blamed_on, read_json_object
from llmtune.io.run_dir import atomic_write_json

NUM_NAMED = 3
BASE_COPY_MARK = ".base_layer."
README_NAME = "README.md"
UNORDERED_SETTINGS = ("target_modules", "exclude_modules")
"""Settings that peft keeps as sets."""

logger = logging.getLogger(__name__)


def save_adapter(
    model: PeftModel,
    directory: Path,
    manifest: Mapping[str, JsonValue],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write the adapter in stock peft format, with `manifest`, and return the directory.

    It is written beside the target and renamed, so a reader never meets half an adapter; an
    adapter already in `directory` is replaced. What it records as its base is manifest["base"]:
    the hub id (`origin`) with its commit (`revision`), or else the absolute `path`. A `tokenizer`
    is saved beside it, chat template and all, and so is the model's generation config with every
    token that ends an answer. The manifest gets `files`: each one's sha256.

    Raises:
        LlmtuneError: the adapter cannot be written, or `directory` holds something else.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / CONFIG_NAME).is_file():
        raise LlmtuneError(f"{directory}: holds other files and no adapter; it is not overwritten.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    except OSError as error:
        raise LlmtuneError(f"{directory}: the adapter cannot be saved: {error}") from error
    try:
        # False: llmtune never resizes embeddings, and "auto" would ask the hub for the base
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        model.get_base_model().generation_config.save_pretrained(str(temporary))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        _record_base(temporary / CONFIG_NAME, manifest.get("base"))
        # peft's empty template; without it, a push to the hub writes the card with the numbers
        (temporary / README_NAME).unlink(missing_ok=True)
        files = {
            path.relative_to(temporary).as_posix(): hash_file(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        record = {"format": MANIFEST_FORMAT, **manifest, "files": files}
        atomic_write_json(temporary / MANIFEST_NAME, record)
        # some writers leave files that only their owner can read
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _swap(temporary, directory)
    except (OSError, SafetensorError) as error:
        raise LlmtuneError(f"{directory}: the adapter cannot be saved: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def load_adapter(
    model: PreTrainedModel, directory: Path, *, base_fingerprint: str, trainable: bool = False
) -> PeftModel:
    """Attach the adapter in `directory` to its base, every tensor accounted for.

    The model is changed in place. An adapter without our manifest (stock peft or trl) is loaded
    with its names and shapes checked, and a notice is logged (`check_adapter` returns it).

    Raises:
        LlmtuneError: the adapter is of a different base, or its tensors' names or shapes are not
            those the model needs.
    """
    for notice in check_adapter(directory, base_fingerprint=base_fingerprint):
        logger.warning(notice)
    config = _read_peft_config(directory)
    config.inference_mode = not trainable
    try:
        with blamed_on(directory / CONFIG_NAME, "peft", advice=COPY_AGAIN, passing=ValueError):
            adapted = attach(model, config)
    except ValueError as error:
        raise LlmtuneError(f"{directory}: does not fit this model: {error}") from error
    _load_weights(adapted, directory)
    return adapted if trainable else adapted.eval()


def start_from_adapter(model: PeftModel, directory: Path, *, base_fingerprint: str | None) -> None:
    """Set a freshly injected adapter to the saved one, which must have the same knobs.

    Raises:
        LlmtuneError: a different base, rank, alpha, method or set of modules.
    """
    for notice in check_adapter(directory, base_fingerprint=base_fingerprint):
        logger.warning(notice)
    saved, wanted = _read_peft_config(directory), model.peft_config["default"]
    method = method_of(wanted.to_dict())
    differing = [
        f"adapter.{knob}: the config says {getattr(wanted, name)}, the adapter has "
        f"{getattr(saved, name, None)} ({name})"
        for name, knob in {"peft_type": "method", **method.SHAPE_KNOBS}.items()
        if getattr(wanted, name) != getattr(saved, name, None)
    ]
    if differing:
        raise LlmtuneError(
            f"adapter.init_from={directory}: the adapter there has a different shape.\n"
            + "\n".join(differing)
        )
    _load_weights(model, directory)


def _load_weights(model: PeftModel, directory: Path) -> None:
    path = directory / WEIGHTS_NAME
    with blamed_on(path, "safetensors", advice=COPY_AGAIN):
        saved = load_file(path)
    with blamed_on(directory / CONFIG_NAME, "peft", advice=COPY_AGAIN):
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = _differences(_without_base_copies(saved, expected, model), expected)
    if problems:
        raise LlmtuneError(f"{path}: does not fit this model.\n" + "\n".join(problems))
    _check_places(saved, model, path)
    keep_own(model, _overwritten(saved, model))
    _set_weights(model, saved, str(path))


def check_found_again(model: PeftModel) -> None:
    """Check that peft finds the tensors of this adapter again, once it has saved them.

    Raises:
        LlmtuneError: it renames some as it loads them, and then has no place for them.
    """
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    _set_weights(model, saved, "adapter.target_modules")


def _set_weights(model: PeftModel, saved: Mapping[str, torch.Tensor], where: str) -> None:
    with live_method(model).loading(model):
        result = set_peft_model_state_dict(model, saved)
    if result.unexpected_keys:
        raise LlmtuneError(
            f"{where}: peft {version('peft')} renames tensors of this kind of model and does not "
            f"find them again, such as {result.unexpected_keys[0]!r}; leave their modules out of "
            "target_modules"
        )


def _check_places(saved: Mapping[str, torch.Tensor], model: PeftModel, path: Path) -> None:
    method = method_of(model.peft_config["default"].to_dict())
    for name in filter(method.counts, saved):
        layer = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, BaseTunerLayer), name
        reason = method.why_not_places(saved[name], layer.out_features, layer.in_features)
        if reason is not None:
            raise LlmtuneError(f"{path}: {name!r} {reason}; {COPY_AGAIN}")


def _overwritten(saved: Mapping[str, torch.Tensor], model: PeftModel) -> Iterator[str]:
    """Yield the base's parameters that loading changes: trained biases, and differing tables."""
    has_biases = any(getattr(each, "bias", "none") != "none" for each in model.peft_config.values())
    for name, own in model.named_parameters(remove_duplicate=False):
        is_bias = has_biases and name.endswith(".bias")
        copy = saved.get(name) if BASE_COPY_MARK in name else None
        is_changed = copy is not None and not torch.equal(copy.to(own.device, own.dtype), own)
        if is_bias or is_changed:
            yield name


def _without_base_copies(
    saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], model: PeftModel
) -> dict[str, torch.Tensor]:
    """Leave out the base's own tables, which PEFT saves beside adapters on them, bias and all."""
    own = model.state_dict()
    return {
        name: tensor
        for name, tensor in saved.items()
        if name in expected
        or BASE_COPY_MARK not in name
        or name not in own
        or own[name].shape != tensor.shape
    }


def _differences(
    saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> list[str]:
    shapes = [
        f"{name} {tuple(saved[name].shape)} (the model needs {tuple(expected[name].shape)})"
        for name in sorted(saved.keys() & expected.keys())
        if saved[name].shape != expected[name].shape
    ]
    groups = {
        "missing": sorted(expected.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - expected.keys()),
        "of a different shape": shapes,
    }
    return [
        f"{len(names)} tensors {kind}: {', '.join(names[:NUM_NAMED])}"
        + (", ..." if len(names) > NUM_NAMED else "")
        for kind, names in groups.items()
        if names
    ]


def _read_peft_config(directory: Path) -> PeftConfig:
    read_adapter_config(directory)
    with blamed_on(directory / CONFIG_NAME, "peft", advice=COPY_AGAIN):
        return PeftConfig.from_pretrained(str(directory))


def _record_base(path: Path, base: JsonValue) -> None:
    base = base if isinstance(base, Mapping) else {}
    revision = base.get("revision")
    place = base.get("origin") if revision else base.get("path")
    settle_config(path, {"base_model_name_or_path": place, "revision": revision})


def settle_config(path: Path, changes: Mapping[str, JsonValue] = MappingProxyType({})) -> None:
    """Rewrite an adapter_config.json with `changes`, and with its sets of modules in order.

    peft writes them in the order of a Python set, which differs from process to process, and so
    would the hash of the same adapter.
    """
    config = {**read_json_object(path, advice=COPY_AGAIN), **changes}
    for name in UNORDERED_SETTINGS:
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(new: Path, target: Path) -> None:
    """Put `new` where `target` is; the old directory is only deleted afterwards."""
    if not target.exists():
        new.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    target.rename(old / target.name)
    try:
        new.rename(target)
    except OSError:
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
