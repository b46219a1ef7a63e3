"""Is a GGUF file what it was made from: llama.cpp and transformers are asked the same."""

import logging
from pathlib import Path

import torch

from llmtune.checks.limits import allowed_kl
from llmtune.checks.merged import load_merged
from llmtune.checks.parity import ParityRequest, ParityResult, compare_with_runtime
from llmtune.checks.reference import comparison_dtype
from llmtune.checks.runtime import is_runtime_installed, require_runtime
from llmtune.errors import CheckFailed
from llmtune.models.checkpoint import read_generation_config
from llmtune.models.tokenizer import load_tokenizer
from llmtune.models.turns import stop_token_ids

log = logging.getLogger("llmtune")


def wants_runtime(asked: bool | None) -> bool:
    """Whether a file is run in llama.cpp: as asked, or where it is installed.

    Raises:
        LlmtuneError: it was asked for and is not installed.
    """
    if asked:
        require_runtime()
    if asked is not None:
        return asked
    if not is_runtime_installed():
        log.warning(
            "export: llama.cpp is not installed, so the file was not run in it: "
            "pip install 'llmtune[runtime]'"
        )
    return is_runtime_installed()


def compare_file(source: Path, path: Path, *, chat_template: Path | None = None) -> ParityResult:
    """Compare a GGUF file in llama.cpp with the checkpoint it was made from, both on the CPU.

    Raises:
        LlmtuneError: llama.cpp is not installed or cannot load the file.
    """
    tokenizer = load_tokenizer(source, chat_template=chat_template)
    dtype = getattr(torch, comparison_dtype(source, num_models=1))
    model = load_merged(source, dtype=dtype, device="cpu")
    stops = stop_token_ids(tokenizer, read_generation_config(source))
    request = ParityRequest(path, stops, num_threads=torch.get_num_threads())
    parity = compare_with_runtime(model, tokenizer, request)
    log.info("export: %s", describe_parity(parity))
    return parity


def describe_parity(parity: ParityResult) -> str:
    """Say in one line how close file and model are."""
    return (
        f"llama.cpp against transformers: {parity.num_same_prompts} of {parity.num_prompts} "
        f"prompts with the same token ids, {parity.num_same_answers} greedy answers the same, KL "
        f"{parity.kl:.2e} nats, {parity.num_same_strings} of {parity.num_strings} tricky strings "
        "tokenized the same"
    )


def require_parity(parity: ParityResult, type: str, path: Path, *, max_kl: float | None) -> None:
    """Check that a file of this type answers as its model does.

    Raises:
        CheckFailed: it does not.
    """
    limit = allowed_kl(type) if max_kl is None else max_kl
    different = parity.num_prompts - parity.num_same_prompts
    if different:
        raise CheckFailed(
            f"{path}: llama.cpp makes other token ids of {different} of {parity.num_prompts} chat "
            "prompts; the file was removed"
        )
    if not parity.kl <= limit:
        raise CheckFailed(
            f"{path}: llama.cpp's answers differ from the model's by {parity.kl:.4f} nats (KL), "
            f"more than {limit:g}; the file was removed. Choose a finer --type than {type}, or "
            "allow more with --max-kl"
        )
