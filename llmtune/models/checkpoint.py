"""One opened checkpoint: where it is, where it came from, and what its small files say."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_file, hash_json
from llmtune.io.json_files import read_json_object, read_weight_map
from llmtune.io.safetensors import CheckpointIndex, fingerprint_checkpoint
from llmtune.models.config import OWN_TEMPLATE, TemplateChoice
from llmtune.models.plausible import check_config, check_sizes, check_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.io.manifest import BaseRecord

CONFIG_NAME = "config.json"
POSITIONS = "max_position_embeddings"
USUAL_POSITIONS = (POSITIONS, "n_positions")
GENERATION_NAME = "generation_config.json"
SAFETENSORS_NAMES = ("model.safetensors", "model.safetensors.index.json")
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class StoredForm:
    """How the checkpoint that a dense one was made from is quantized."""

    title: str
    """The format, such as `gptq 4-bit`."""
    dtype: str
    """What its weights became."""
    fingerprint: str
    """Of its weights."""

    def describe(self) -> str:
        """Say what was done."""
        return f"{self.title}, dequantized to {self.dtype}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, opened once and passed on.

    Each of its files is read when it is first asked for, and then kept. Nothing here loads torch.
    """

    directory: Path
    """Absolute path of a checkpoint directory that transformers loads."""
    origin: str
    """What was asked for: the absolute path given, or the hub id."""
    revision: str | None = None
    """The hub commit, 40 hex digits; null for local files."""
    gguf_sha256: str | None = None
    """SHA-256 of the GGUF file that the checkpoint was made from."""
    stored: StoredForm | None = None
    """How the base was stored, if this is the dense checkpoint made from it."""
    template: TemplateChoice = OWN_TEMPLATE
    """What replaces the checkpoint's own chat template, if anything."""
    template_date: str | None = None
    """The date (YYYY-MM-DD) that its chat template prints; null is the day's."""

    @classmethod
    def open(cls, directory: Path, *, template: TemplateChoice = OWN_TEMPLATE) -> "Checkpoint":
        """Open a local directory by its path; its files are checked when they are read."""
        return cls(directory, str(directory), template=template)

    @property
    def adapter_base(self) -> str:
        """What an adapter records as its base: the hub id, or the checkpoint's absolute path."""
        return self.origin if self.revision is not None else str(self.directory)

    def as_record(self) -> "BaseRecord":
        """Return where the checkpoint came from and its fingerprint, as manifests record it."""
        record: BaseRecord = {
            "path": str(self.directory),
            "origin": self.origin,
            "revision": self.revision,
            "gguf_sha256": self.gguf_sha256,
            "fingerprint": self.fingerprint,
        }
        if self.stored is not None:
            record["stored"] = self.stored.describe()
            record["stored_fingerprint"] = self.stored.fingerprint
        return record

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The contents of config.json.

        Raises:
            LlmtuneError: it is missing, is not JSON, or names no model type.
        """
        path = self.directory / CONFIG_NAME
        if not path.is_file():
            raise LlmtuneError(
                f"{self.directory}: not a model checkpoint: {_what_else(self.directory)}"
            )
        config = read_json_object(path)
        if not isinstance(config.get("model_type"), str):
            raise LlmtuneError(f"{path}: no `model_type`: this is not a transformers checkpoint.")
        check_config(config, str(path))
        return config

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.config["model_type"])

    @property
    def num_embedding_rows(self) -> int:
        """The number of token ids the model has rows for: config.json's vocab_size."""
        rows = self.config.get(
            "vocab_size", (self.config.get("text_config") or {}).get("vocab_size")
        )
        if not isinstance(rows, int):
            raise LlmtuneError(f"{self.directory / CONFIG_NAME}: no `vocab_size`.")
        return rows

    @property
    def num_positions(self) -> int | None:
        """The longest sequence that the model has positions for, or None if it has no limit."""
        parts = [self.config.get("text_config") or {}, self.config]
        parts = [part for part in parts if isinstance(part, Mapping)]
        found = [part[name] for part in parts for name in USUAL_POSITIONS if name in part]
        if not found:
            # A family's own name, or its default: transformers knows, and takes a second to load.
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING

            types = [p["model_type"] for p in parts if p.get("model_type") in CONFIG_MAPPING]
            family = CONFIG_MAPPING[types[0]] if types else None
            name = getattr(family, "attribute_map", {}).get(POSITIONS, POSITIONS)
            found = [part[name] for part in parts if name in part]
            if not found and family is not None:
                found = [getattr(family().get_text_config(), POSITIONS, None)]
        return next((n for n in found if isinstance(n, int) and n > 0), None)

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are stored quantized already."""
        return bool(self.config.get("quantization_config"))

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The contents of generation_config.json, or {} if there is none."""
        path = self.directory / GENERATION_NAME
        if not path.is_file():
            return {}
        config = read_json_object(path)
        check_token_ids(config, str(path))
        return config

    @cached_property
    def has_safetensors(self) -> bool:
        """Whether the weights are there as safetensors, whole.

        Raises:
            LlmtuneError: there is an index, but a shard it names is missing.
        """
        return has_weights(self.directory, SAFETENSORS_NAMES)

    @cached_property
    def index(self) -> CheckpointIndex:
        """The headers of the safetensors files: every tensor, and where it is.

        Raises:
            LlmtuneError: as `CheckpointIndex.open`.
        """
        return CheckpointIndex.open(self.directory)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the weights, 64 hex digits, by which an adapter knows its base.

        Names, shapes, dtypes and sampled bytes of every tensor for safetensors; all bytes for
        pickled weights. Neither the directory's name nor the sharding counts.
        """
        if self.has_safetensors:
            return fingerprint_checkpoint(self.index)
        pickles = sorted(self.directory.glob("*.bin"))
        return hash_json({path.name: hash_file(path) for path in pickles})

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The fast tokenizer, checked, with a pad token; see `models.tokenizer.load_tokenizer`."""
        from llmtune.models.template_date import fix_template_date
        from llmtune.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(
            self.directory,
            num_rows=self.num_embedding_rows,
            config=self.config,
            generation_config=self.generation_config,
            template=self.template,
        )
        if self.template_date is not None:
            fix_template_date(tokenizer, self.template_date)
        return tokenizer

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer, by tokenizer, template and generation config."""
        from llmtune.models.turns import stop_token_ids

        return stop_token_ids(self.tokenizer, self.generation_config)

    def require_whole(self, *, allow_pickle: bool, allow_quantized: bool = False) -> None:
        """Check that config and weights are all there, in a file format that is allowed.

        Raises:
            LlmtuneError: config or weights are missing or incomplete, the weights are pickled and
                `allow_pickle` is false, or the checkpoint is already quantized and
                `allow_quantized` is false.
        """
        config = self.config  # what is wrong with it is said first
        if not allow_quantized:
            refuse_quantized(config, str(self.directory))
        if self.has_safetensors:
            check_sizes(config, self.index, str(self.directory / CONFIG_NAME))
            return
        if has_weights(self.directory, PICKLE_NAMES):
            if allow_pickle:
                return
            raise LlmtuneError(
                f"{self.directory}: the weights are pickled .bin files, which are not read by "
                "default. Give a safetensors checkpoint, or set model.weights=any."
            )
        raise LlmtuneError(
            f"{self.directory}: no weights: expected model.safetensors, or "
            "model.safetensors.index.json with its shards. Copy them there, or give the base's "
            "place: model.base=PATH"
        )


def refuse_quantized(config: Mapping[str, Any], place: str) -> None:
    """Refuse a base whose config.json says that it is quantized already.

    Raises:
        LlmtuneError: it is; `place` names it.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise LlmtuneError(
            f"{place}: this base is already quantized ({method}); an adapter could not be "
            "merged into it. Give the 16-bit checkpoint and choose model.quantization instead."
        )


def has_weights(directory: Path, names: tuple[str, str]) -> bool:
    """Whether the single file, or the index and every shard it names, is there.

    Raises:
        LlmtuneError: there is an index, but a shard it names is missing.
    """
    single, index = (directory / name for name in names)
    if single.is_file():
        return True
    if not index.is_file():
        return False
    shards = sorted(set(read_weight_map(index)[0].values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise LlmtuneError(
            f"{directory}: {len(missing)} of {len(shards)} weight shards are missing, "
            f"the first is {missing[0]}. Copy them there, or give the base's place: "
            "model.base=PATH"
        )
    return True


def _what_else(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return (
            "it holds an adapter. Give the base it was trained on; to continue training this "
            f"adapter set adapter.init_from={directory}."
        )
    gguf = sorted(directory.glob("*.gguf"))
    if gguf:
        return f"there is no config.json; for the GGUF file in it give {gguf[0]}."
    return (
        "there is no config.json. Copy it there, or give the base's place: model.base=PATH "
        "(a checkpoint directory, a .gguf file or a hub id)"
    )
