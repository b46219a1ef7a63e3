"""What a quantization costs on a little general text, measured before anything is trained."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtune.data.open_prompts import GENERAL_PASSAGES
from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir
from llmtune.io.environment import versions
from llmtune.io.fingerprint import hash_json
from llmtune.io.json_files import read_json_object
from llmtune.io.run_dir import atomic_write_json
from llmtune.io.sizes import format_size
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import release_memory
from llmtune.models.load import load_model
from llmtune.models.probing import is_out_of_memory
from llmtune.models.quantization.config import members
from llmtune.planning.estimate import base_bytes
from llmtune.planning.shape import read_shape
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.perplexity import score_texts

log = logging.getLogger("llmtune")

MAX_LENGTH = 256
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class QuantizationPrice:
    """Loss on the passages before and after quantization, nats/token, and what memory it saves.

    `original` and `price` are None if the base does not fit without quantization. `base_bytes` is
    what the weights of the base need in each quantization, by its name.
    """

    method: str
    original: float | None
    quantized: float
    price: float | None
    base_bytes: Mapping[str, int]

    def lines(self, bound: float) -> tuple[str, ...]:
        """Return what to say of it, a warning first if it is over half of a bound."""
        memory = ", ".join(
            f"{name} {format_size(size)}" for name, size in sorted(self.base_bytes.items())
        )
        if self.price is None:
            return (f"what {self.method} costs is not known: the base does not fit without it",)
        costs = (
            f"{self.method} costs {self.price:+.3f} nats/token on general text "
            f"({self.original:.3f} -> {self.quantized:.3f}); the base in memory: {memory}"
        )
        if self.price <= bound / 2:
            return (costs,)
        return (
            f"{costs}. That alone is {self.price / bound:.0%} of what general ability may lose "
            f"({bound:g}): if the memory is there, use model.quantization=null or a finer one",
        )


def measure_price(config: ModelConfig, source: Checkpoint) -> QuantizationPrice | None:
    """Measure the quantization of a config, one model in memory at a time; None without one.

    It is kept in the cache directory by the base's fingerprint, the quantization and the libraries'
    versions.
    """
    if not config.storage.is_quantized:
        return None
    path = _kept_at(config, source)
    known = _read(path)
    if known is not None:
        return known
    dense = config.model_copy(update={"quantization": None})
    original = _loss_if_it_fits(dense, source)
    quantized = _loss(config, source)
    found = QuantizationPrice(
        method=config.quantization_method,
        original=original,
        quantized=quantized,
        price=None if original is None else quantized - original,
        base_bytes=_memory(source),
    )
    if original is not None:
        atomic_write_json(path, asdict(found))
    return found


def _loss_if_it_fits(config: ModelConfig, source: Checkpoint) -> float | None:
    try:
        return _loss(config, source)
    except LlmtuneError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
    return None


def _loss(config: ModelConfig, source: Checkpoint) -> float:
    live = load_model(config, source)
    scores = score_texts(
        live.model,
        live.tokenizer,
        GENERAL_PASSAGES,
        max_length=MAX_LENGTH,
        token_budget=choose_token_budget(live.model),
    )
    del live
    release_memory()
    num_tokens = sum(score.num_tokens for score in scores)
    return sum(score.negative_log_likelihood for score in scores) / num_tokens


def _memory(source: Checkpoint) -> dict[str, int]:
    """Return the bytes of the base's weights in every quantization; empty for an unknown shape."""
    try:
        shape = read_shape(source.config, source.origin)
    except LlmtuneError:
        return {}
    kinds = [member.model_validate({}) for member in members()]
    return {kind.method: sum(base_bytes(shape, kind, ELEMENT_BYTES).values()) for kind in kinds}


def _kept_at(config: ModelConfig, source: Checkpoint) -> Path:
    quantization = config.storage.model_dump(mode="json")
    made_by = [versions(), config.dtype, list(GENERAL_PASSAGES)]
    key = hash_json([source.fingerprint, quantization, *made_by])
    return cache_dir() / "prices" / f"{key[:32]}.json"


def _read(path: Path) -> QuantizationPrice | None:
    try:
        return QuantizationPrice(**read_json_object(path))
    except (LlmtuneError, TypeError):
        return None  # not measured yet, or of a different version: measured again
