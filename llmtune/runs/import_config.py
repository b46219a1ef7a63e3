"""From the config of a different tool to ours, with what became of every key."""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtune.adapters.base import Adapter
from llmtune.adapters.config import METHODS
from llmtune.config import RunConfig
from llmtune.data.problems import shorten
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.io.foreign import foreign_tools, recognize_tool
from llmtune.io.json_files import read_json_object
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import SourcedTree, read_yaml
from llmtune.models.quantization.config import SMALLEST, members
from llmtune.runs.imported import Imported
from llmtune.training.objectives import DEFAULT_OBJECTIVE

SCHEDULES = {
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "warmup_stable_decay",
    **{name: name for name in ("cosine", "linear", "constant", "cosine_with_restarts")},
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion_8bit": "lion_8bit",
    "lion_32bit": "lion",
    "adafactor": "adafactor",
}
REPORTERS = ("tensorboard", "wandb", "mlflow", "trackio")
ADAPTER_BY_DEFAULT = ("llamafactory",)
"""Tools that train an adapter if nothing is said."""
DOUBLED = ("use_bnb_nested_quant", "double_quantization")
NEEDED = ("run_dir", "model.base", "data.train")


def import_config(path: Path) -> Imported:
    """Read a config of axolotl, LLaMA-Factory or TRL.

    Raises:
        LlmtuneError: it is a config of something else, or of a training that llmtune does not do.
    """
    given = read_yaml(path).values
    tool = recognize_tool(given)
    if tool is None:
        titles = ", ".join(each.title for each in foreign_tools())
        raise LlmtuneError(f"{path}: not a config that can be imported; expected {titles}")
    found = Imported(tool)
    found.put("run_dir", f"runs/{path.stem}", "the file's name")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        known = tool.keys.get(str(key))
        if known is None:
            found.missing.append(f"{key}: {shorten(value)}: not known here")
        elif value is None:
            continue
        elif known.part is not None:
            parts.setdefault(known.part, {})[str(key)] = value
        elif known.none is not None:
            found.missing.append(f"{key}: {known.none}")
        elif known.skip is not None:
            found.skipped.append(f"{key}: {known.skip}")
        else:
            assert known.to is not None
            _take(found, str(key), value, known.to, known.reading)
            if known.note:
                found.changed.append(f"{key}: {known.note}")
    for name, read in PARTS.items():
        if name in parts or name in ALWAYS:
            read(found, parts.get(name, {}), path)
    missing = [key for key in NEEDED if key not in found.values]
    if missing:
        raise LlmtuneError(f"{path}: names nothing that could be {', '.join(missing)}")
    validate_section(RunConfig, SourcedTree(dict(found.tree()), {(): str(path)}))
    return found


def _take(found: Imported, key: str, value: Any, ours: str, reading: str | None) -> None:
    read = READINGS[reading] if reading else lambda given: given
    try:
        taken = read(value)
    except (TypeError, ValueError):
        found.missing.append(f"{key}: {shorten(value)}: cannot be read")
        return
    if taken is None:
        found.missing.append(f"{key}: {shorten(value)}: there is none like it")
        return
    found.put(ours, taken, key)


def _number(value: Any) -> float:
    number = float(value)
    return int(number) if number == int(number) and abs(number) >= 1 else number


def _positive(value: Any) -> int | None:
    return int(value) if float(value) >= 1 else None


def _list(value: Any) -> list[str]:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)


def _modules(value: Any) -> Any:
    names = _list(value)
    return "all-linear" if names in (["all"], ["all-linear"]) else names


def _share(value: Any) -> float | None:
    return float(value) if 0 <= float(value) < 1 else None


def _reporters(value: Any) -> list[str]:
    return [name for name in _list(value) if name in REPORTERS]


def _start(value: Any) -> str | None:
    """Return a start of the default method, if it has that one."""
    name = "default" if value is True else str(value)
    with contextlib.suppress(ValueError):
        return str(METHODS[0].model_validate({"init": name}).model_dump()["init"])
    return None


READINGS: dict[str, Callable[[Any], Any]] = {
    "number": _number,
    "count": int,
    "positive": _positive,
    "list": _list,
    "modules": _modules,
    "share": _share,
    "reporters": _reporters,
    "text": str,
    "start": _start,
    "on_off": lambda value: "on" if value else "off",
    "loss_on": lambda value: "all" if value else "assistant",
    "schedule": lambda value: SCHEDULES.get(str(value)),
    "optimizer": lambda value: OPTIMIZERS.get(str(value)),
}


def _adapter(found: Imported, given: dict[str, Any], path: Path) -> None:
    """Refuse a full fine-tune; four bits may be part of the adapter's name."""
    [(key, value)] = given.items() or {"adapter": None}.items()
    default, quantized = METHODS[0].name(), f"q{METHODS[0].name()}"
    is_default = value is None and found.tool.name in ADAPTER_BY_DEFAULT
    other = next((method for method in METHODS[1:] if method.name() == value), None)
    if other is not None:
        _take_method(found, other, f"{key}: {value}")
    elif not is_default and value not in (default, quantized, True):
        raise LlmtuneError(
            f"{path}: {key}: {value}: trains all weights, or by a method that llmtune does not "
            "have; it trains adapters"
        )
    if value == quantized:
        found.put("model.quantization", {"method": SMALLEST.method}, f"{key}: {value}")


def _take_method(found: Imported, method: type[Adapter], origin: str) -> None:
    """Set a method, and leave out what a file says of others beside it."""
    found.put("adapter.method", method.name(), origin)
    for key in [key for key in found.values if key.startswith("adapter.")]:
        if key.removeprefix("adapter.") not in method.model_fields:
            found.missing.append(f"{found.origins[key]}: {method.name()} has no such knob")
            del found.values[key]


def _objective(found: Imported, given: dict[str, Any], path: Path) -> None:
    for key, value in given.items():
        if value == "pt":
            found.put("data.loss_on", "all", f"{key}: {value}")
        elif value != DEFAULT_OBJECTIVE.method:
            raise LlmtuneError(
                f"{path}: {key}: {value}: llmtune trains on answers alone; there is no DPO, ORPO, "
                "KTO or reward model"
            )


def _quantization(found: Imported, given: dict[str, Any], path: Path) -> None:
    bits = next((int(v) for k, v in given.items() if k == "quantization_bit"), None)
    bits = 4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else bits
    if bits is None:
        return
    member = next((one for one in members() if one.bits == bits), None)
    if member is None:
        found.missing.append(f"quantization of {bits} bits: there is none")
        return
    method = SMALLEST.method if bits == SMALLEST.bits else member.model_fields["method"].default
    knobs: dict[str, Any] = {"method": method}
    for key, value in given.items():
        if key in DOUBLED and "double_quant" in SMALLEST.model_fields and bits == SMALLEST.bits:
            knobs["double_quant"] = bool(value)
        if key == "bnb_4bit_quant_type" and value != method:
            found.changed.append(f"{key}: {value}: {method} is what there is")
    found.put("model.quantization", knobs, ", ".join(given))


def _method(found: Imported, given: dict[str, Any], path: Path) -> None:
    names = {method.name() for method in METHODS}
    for key, value in given.items():
        name = key.rpartition("use_")[2]
        if value and name in names:
            found.put("adapter.method", name, key)


def _weight_start(found: Imported, given: dict[str, Any], path: Path) -> None:
    if not given.get("pissa_init"):
        found.skipped.append(f"{', '.join(given)}: not switched on")
        return
    iterations = int(given.get("pissa_iter", 16))
    start = f"pissa_niter_{iterations}" if iterations > 0 else "pissa"
    found.put("adapter.init", start, ", ".join(given))


def _target_linear(found: Imported, given: dict[str, Any], path: Path) -> None:
    if any(given.values()) and "adapter.target_modules" not in found.values:
        found.put("adapter.target_modules", "all-linear", next(iter(given)))


def _batch(found: Imported, given: dict[str, Any], path: Path) -> None:
    sizes = [int(value) for value in given.values() if str(value).isdecimal()]
    if len(sizes) < len(given):
        found.missing.append(f"{', '.join(given)}: cannot be read")
        return
    found.put("train.batch_size", math.prod(sizes), " x ".join(given))
    found.changed.append(
        f"{' x '.join(given)}: train.batch_size is the rows of a whole step, on one GPU; "
        "multiply by the number of GPUs that there were"
    )


def _length(found: Imported, given: dict[str, Any], path: Path) -> None:
    steps = {key: value for key, value in given.items() if key == "max_steps" and float(value) > 0}
    epochs = {key: value for key, value in given.items() if key != "max_steps"}
    for key, value in steps.items():
        found.put("train.max_steps", int(value), key)
    for key, value in epochs.items():
        if steps:
            found.skipped.append(f"{key}: max_steps wins")
        else:
            found.put("train.num_epochs", _number(value), key)


def _early_stopping(found: Imported, given: dict[str, Any], path: Path) -> None:
    if "train.eval_every" not in found.values:
        found.missing.append("early_stopping_patience: needs train.eval_every, in steps")
        return
    found.put("train.early_stopping.patience", int(given["early_stopping_patience"]), *given)


def _loraplus(found: Imported, given: dict[str, Any], path: Path) -> None:
    rate = found.values.get("train.learning_rate")
    for key, value in given.items():
        if isinstance(rate, float):
            found.put("train.learning_rates", {"lora_B": float(f"{rate * float(value):.3g}")}, key)


def _dtype(found: Imported, given: dict[str, Any], path: Path) -> None:
    for key, value in given.items():
        named = {"bf16": "bfloat16", "fp16": "float16"}.get(key) if value is True else value
        if named in ("bfloat16", "float16", "float32"):
            found.put("model.dtype", named, key)


def _longer_dropped(found: Imported, given: dict[str, Any], path: Path) -> None:
    [(key, value)] = given.items()
    found.put("data.max_length", int(value), key)
    found.put("data.length_policy", "drop", f"longer rows, as with {key}")


def _longer_cut(found: Imported, given: dict[str, Any], path: Path) -> None:
    for key, value in given.items():
        found.put("data.max_length", int(value), key)
        found.put("data.length_policy", "truncate-prompt", f"longer rows are cut, as with {key}")
        found.changed.append(
            f"{key}: longer rows lose the middle of their prompt, never the answer"
        )


def _template(found: Imported, given: dict[str, Any], path: Path) -> None:
    for key, value in given.items():
        if value not in ("tokenizer_default", "default"):
            found.changed.append(
                f"{key}: {value}: templates have no names here; the base's own is used, or the "
                "file in model.chat_template. Compare: llmtune data show"
            )


def _loss(found: Imported, given: dict[str, Any], path: Path) -> None:
    trains_answers = any(value is True for value in given.values())
    found.put("data.loss_on", "assistant" if trains_answers else "all", ", ".join(given))


def _mask_history(found: Imported, given: dict[str, Any], path: Path) -> None:
    if any(given.values()):
        found.put("data.loss_on", "last-assistant", next(iter(given)))


def _evaluation(found: Imported, given: dict[str, Any], path: Path) -> None:
    for key, value in given.items():
        if value == "epoch":
            found.missing.append(
                f"{key}: epoch: evaluations are counted in steps: train.eval_every"
            )
        if value == "no":
            found.values.pop("train.eval_every", None)


def _datasets(found: Imported, given: dict[str, Any], path: Path) -> None:
    for key, ours in (("datasets", "data.train"), ("test_datasets", "data.evaluation")):
        if isinstance(given.get(key), list):
            found.put(ours, [_axolotl_source(found, one) for one in given[key]], key)
    limit = {"limit": int(given["max_samples"])} if given.get("max_samples") else {}
    folder = Path(str(given.get("dataset_dir", "data")))
    for key, ours in (("dataset", "data.train"), ("eval_dataset", "data.evaluation")):
        if key in given:
            names = _list(given[key])
            sources = [{**_factory_source(found, folder, name, path), **limit} for name in names]
            found.put(ours, sources, key)
    if "dataset_name" in given:
        source = {"path": given["dataset_name"]}
        if given.get("dataset_config"):
            source["subset"] = given["dataset_config"]
        column = given.get("dataset_text_field", "text")
        if column != "text":
            source["columns"] = {"text": column}
        split = given.get("dataset_train_split", "train")
        found.put("data.train", [source | ({"split": split} if split != "train" else {})],
                  "dataset_name")  # fmt: skip
        if given.get("dataset_test_split") and given.get("dataset_test_split") != split:
            held = source | {"split": given["dataset_test_split"]}
            found.put("data.evaluation", [held], "dataset_test_split")


def _axolotl_source(found: Imported, one: Mapping[str, Any]) -> JsonObject:
    files = one.get("data_files")
    source: dict[str, Any] = {"path": _list(files)[0] if files else one.get("path")}
    for theirs, ours in (("split", "split"), ("name", "subset"), ("revision", "revision")):
        if one.get(theirs) and not files and not (theirs == "split" and one[theirs] == "train"):
            source[ours] = one[theirs]
    kind = one.get("type")
    fields = {**(kind if isinstance(kind, Mapping) else {}), **one}
    names = {
        "field_instruction": "instruction",
        "field_input": "input",
        "field_output": "output",
        "field_system": "system",
        "field": "text",
    }
    columns = {ours: fields[theirs] for theirs, ours in names.items()
               if fields.get(theirs) and fields[theirs] != ours}  # fmt: skip
    if columns:
        source["columns"] = columns
    known = {"path", "data_files", "split", "name", "revision", "type", "ds_type", *names}
    left = sorted(str(key) for key in one if key not in known)
    kind = kind if isinstance(kind, str) else "of its own form" if kind else "not given"
    found.changed.append(
        f"datasets: {source['path']} is {kind}: the format is detected from the rows here"
        + (f"; not read: {', '.join(left)}" if left else "")
    )
    return source


def _factory_source(found: Imported, folder: Path, name: str, path: Path) -> JsonObject:
    """Return a source of LLaMA-Factory, as its `dataset_info.json` says where it is."""
    places = (folder / "dataset_info.json", path.parent / folder / "dataset_info.json")
    info = next((place for place in places if place.is_file()), None)
    said = read_json_object(info).get(name) if info is not None else None
    if not isinstance(said, Mapping):
        found.changed.append(
            f"dataset: {name}: there is no {folder / 'dataset_info.json'} that says which file it "
            f"is; {folder / name}.json is assumed"
        )
        return {"path": str(folder / f"{name}.json")}
    if said.get("hf_hub_url"):
        source: dict[str, Any] = {"path": said["hf_hub_url"]}
        return source | ({"split": said["split"]} if said.get("split", "train") != "train" else {})
    assert info is not None
    source = {"path": str(info.parent / str(said.get("file_name", f"{name}.json")))}
    theirs = {"prompt": "instruction", "query": "input", "response": "output", "system": "system",
              "history": "history", "messages": "conversations", "tools": "tools"}  # fmt: skip
    columns = {theirs[key]: column for key, column in (said.get("columns") or {}).items()
               if key in theirs and theirs[key] != column}  # fmt: skip
    return source | ({"columns": columns} if columns else {})


PARTS: dict[str, Callable[[Imported, dict[str, Any], Path], None]] = {
    "adapter": _adapter,
    "objective": _objective,
    "quantization": _quantization,
    "method": _method,
    "modules": _target_linear,
    "start": _weight_start,
    "datasets": _datasets,
    "longer_dropped": _longer_dropped,
    "longer_cut": _longer_cut,
    "loss": _loss,
    "mask_history": _mask_history,
    "template": _template,
    "batch": _batch,
    "length": _length,
    "evaluation": _evaluation,
    "early_stopping": _early_stopping,
    "loraplus": _loraplus,
    "dtype": _dtype,
}
ALWAYS = ("adapter",)
"""Parts that say something if no key of them is there, too."""
