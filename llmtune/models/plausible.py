"""Whether config.json describes a model that its weights can be: checked before one is built.

A model is built from its config.json alone, so one number there (`num_hidden_layers: 10**7`) takes
all memory. What is stored bounds it: every layer has a tensor, every width a row of one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import CheckpointIndex

LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
SIZE_KEYS = (
    *("vocab_size", "intermediate_size", "ffn_hidden_size", "n_inner", "d_ff", "ffn_dim"),
    *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim"),
    *("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"),
)
SMALL_EMBEDDING_KEYS = ("embedding_size", "word_embed_proj_dim", "d_embed")
POSITION_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "sliding_window")
NEEDED_KEYS = frozenset(
    {*LAYER_KEYS, *WIDTH_KEYS, "vocab_size", "num_attention_heads", "n_head", "num_heads"}
    | {"max_position_embeddings", "n_positions"}
)
"""None of a model's is 0."""
MOST_LAYERS = 10_000
MOST_SIZE = 1 << 27
MOST_POSITIONS = 1 << 40
SECTION_KEYS = ("text_config", "quantization_config", "rope_scaling", "rope_parameters")
LEAST_BITS = 4
"""Of a stored weight; counting with them allows a 16-bit model four times what it has."""


def check_config(config: Mapping[str, Any], place: str) -> None:
    """Check the types and the size of the numbers that a model is built from.

    Raises:
        LlmtuneError: names the key, its value and what was expected.
    """
    for part in _parts(config):
        for section in SECTION_KEYS:
            if part.get(section) is not None and not isinstance(part[section], dict):
                raise LlmtuneError(
                    f"{place}: {section} is {str(part[section])!r:.80}; expected an object"
                )
    for part in _parts(config):
        for keys, limit in (
            (LAYER_KEYS, MOST_LAYERS),
            ((*WIDTH_KEYS, *SIZE_KEYS), MOST_SIZE),
            (POSITION_KEYS, MOST_POSITIONS),
        ):
            for key in keys:
                least = 1 if key in NEEDED_KEYS else -1
                _check_number(key, part.get(key), (least, limit), place)
        check_token_ids(part, place)


def check_token_ids(config: Mapping[str, Any], place: str) -> None:
    """Check the ids of special tokens in a config.json or a generation_config.json.

    Raises:
        LlmtuneError: names the key and its value.
    """
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int and -(1 << 31) < id < 1 << 31 for id in ids):
            raise LlmtuneError(f"{place}: {key} is {str(value)!r:.80}; expected a token's id")


def check_sizes(config: Mapping[str, Any], index: CheckpointIndex, place: str) -> None:
    """Check that the model described has not far more layers and weights than are stored.

    Raises:
        LlmtuneError: it has.
    """
    stored_bits = 8 * sum(entry.num_bytes for entry in index.tensors.values())
    most_weights, num_tensors = stored_bits // LEAST_BITS, len(index.tensors)
    for part in _parts(config):
        for key in LAYER_KEYS:
            layers = part.get(key)
            if isinstance(layers, int) and layers > num_tensors:
                raise LlmtuneError(
                    f"{place}: {key} is {layers:,}, and its weights have {num_tensors:,} tensors, "
                    "fewer than one a layer; fetch both again"
                )
        width = next((part[k] for k in WIDTH_KEYS if isinstance(part.get(k), int)), 1)
        narrow = [part[k] for k in SMALL_EMBEDDING_KEYS if isinstance(part.get(k), int)]
        for key in SIZE_KEYS:
            size = part.get(key)
            if isinstance(size, int) and size * min([width, *narrow]) > most_weights:
                raise LlmtuneError(
                    f"{place}: {key} is {size:,} at a width of {width:,}, and its files hold "
                    f"{stored_bits // 8:,} bytes of weights, far too few; fetch both again"
                )


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def _check_number(key: str, value: object, bounds: tuple[int, int], place: str) -> None:
    """Check a number, or one for each layer, which may be 0."""
    least, most = bounds
    for one in value if isinstance(value, list) else [value]:
        least_of_one = -1 if isinstance(value, list) else least
        is_whole = type(one) is int or (isinstance(one, float) and one.is_integer())
        if one is not None and not (is_whole and least_of_one <= float(str(one)) <= most):
            raise LlmtuneError(
                f"{place}: {key} is {str(value)!r:.80}; expected a whole number from {least} to "
                f"{most:,}"
            )
