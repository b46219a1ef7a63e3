"""Tiny real objects: a tokenizer trained in process and two-layer models of many families."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECIAL_TOKENS = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Is the opinion in this sentence positive or negative?",
    "A warm and funny film that earns every laugh; nothing here is wasted.",
    "The plot goes nowhere and the ending is a disappointment.",
    "user assistant system positive negative yes no one two three four five six seven",
    "Paris is the capital of France, and 12 + 30 = 42.",
]

VOCAB_SIZE = 512

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi",
    "gpt2",
    "gpt_neox",
    "mixtral",
)


def make_tokenizer(directory: Path | None = None, *, chat_template: str | None = CHATML):
    """Train a byte-level BPE tokenizer in process; save it where `directory` is given."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
    )
    fast.chat_template = chat_template
    if directory is not None:
        fast.save_pretrained(directory)
    return fast


def make_model(
    family: str,
    directory: Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides,
):
    """Return a two-layer random model of `family`; with `directory`, save it and its tokenizer.

    Every linear width is a multiple of 64 and of bitsandbytes' block size, so that NF4 works.
    `overrides` change single keys of the family's config.
    """
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**_family_config(family), **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("bias"):
                parameter.normal_(0, 0.05)
    if directory is not None:
        model.save_pretrained(directory)
        make_tokenizer(directory)
    return model.eval()


def _family_config(family: str) -> dict:
    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    if family == "gpt2":
        config["n_inner"] = 128
    else:
        config["intermediate_size"] = 128
    if family in {"llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral"}:
        config["num_key_value_heads"] = 2
    if family in {"qwen3", "gemma2"}:
        config["head_dim"] = 16
    if family == "gemma2":
        config["sliding_window"] = 64
        config["query_pre_attn_scalar"] = 16
    if family == "mixtral":
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return config
