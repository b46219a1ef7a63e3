"""Read a GGUF file with transformers and save it as a dense bfloat16 checkpoint."""

import io
import json
from contextlib import redirect_stderr
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llmtune.errors import LlmtuneError
from llmtune.io.gguf_head import GgufHead, read_gguf_head
from llmtune.io.json_files import FETCH_AGAIN, blamed_on, read_json_object
from llmtune.models.quiet import quiet_loading

SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
# llama.cpp splits single digits off first for these; transformers 5.23 overlooks that.
DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def convert_gguf(gguf_path: Path, directory: Path) -> None:
    """Write the model and the tokenizer of `gguf_path` into `directory`, weights in bfloat16.

    Raises:
        LlmtuneError: the file is damaged, or transformers cannot read it, or is too old to read
            GGUF files dense.
        OSError: `directory` cannot be written.
    """
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is None:
        raise LlmtuneError(
            f"{gguf_path}: transformers {transformers.__version__} cannot unpack GGUF files; "
            "5.23 can. Upgrade it, or give a dense checkpoint."
        )
    head = read_gguf_head(gguf_path)  # what is damaged must not reach transformers' own reader
    _check_sizes(head, gguf_path)
    where = str(gguf_path.parent)
    reader = f"transformers {transformers.__version__}"
    # one progress bar of transformers' GGUF reader has no switch
    with blamed_on(gguf_path, reader), quiet_loading(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf_path.name)
        model = AutoModelForCausalLM.from_pretrained(
            where,
            gguf_file=gguf_path.name,
            quantization_config=gguf_config(dequantize=True),
            dtype=torch.bfloat16,
        )
    if head.values.get("tokenizer.ggml.pre") in DIGITS_FIRST:
        _split_digits_first(tokenizer)
    _set_special_tokens(tokenizer, head)
    try:
        with quiet_loading():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except SafetensorError as error:
        raise OSError(str(error)) from error  # its only reason to fail here is the disk
    _drop_invented_tokens(directory / "tokenizer.json", model.config.vocab_size)


def _check_sizes(head: GgufHead, path: Path) -> None:
    """Refuse sizes that the file's tensors do not have: a model is built from the sizes alone."""
    architecture = head.values.get("general.architecture")
    largest = max((size for tensor in head.tensors for size in tensor.shape), default=0)
    limits = {"block_count": len(head.tensors), "vocab_size": largest}
    limits |= dict.fromkeys(("embedding_length", "feed_forward_length"), largest)
    limits |= dict.fromkeys(("attention.head_count", "expert_count"), largest)
    for name, limit in limits.items():
        value = head.values.get(f"{architecture}.{name}", 0)
        if not isinstance(value, int) or value > limit:
            raise LlmtuneError(
                f"{path}: {architecture}.{name} is {str(value)!r:.80}, and its tensors have "
                f"{limit:,} at most; {FETCH_AGAIN}"
            )


def _set_special_tokens(tokenizer: PreTrainedTokenizerFast, head: GgufHead) -> None:
    """Name the special tokens as the file does; transformers 5.17 may take BOS for EOS."""
    for name, key in SPECIAL_TOKENS.items():
        id = head.values.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(id, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(id))


def _split_digits_first(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _drop_invented_tokens(path: Path, rows: int) -> None:
    """Take out added tokens past the embedding: a tokenizer class's own, and not in the file."""
    content = read_json_object(path)
    kept = [token for token in content["added_tokens"] if token["id"] < rows]
    if len(kept) < len(content["added_tokens"]):
        content["added_tokens"] = kept
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
