"""The end of the run tried before its beginning: the largest micro-batch, and every save."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llmtune.errors import LlmtuneError
from llmtune.io.run_dir import RunDir
from llmtune.io.unfinished import require_space
from llmtune.training.checkpoint import save_weights
from llmtune.training.memory.arithmetic import MemoryPlan

# Two checkpoints (weights and two moments each) beside one being written, and the adapter itself.
SAVED_COPIES = 10


class DoesNotFitError(LlmtuneError):
    """The largest micro-batch runs out of memory."""


def rehearse_step(run_step: Callable[[], None], *, longest: int, plan: MemoryPlan) -> None:
    """Run the worst micro-batch forward and backward once.

    Raises:
        DoesNotFitError: names the length, the size and two settings.
    """
    try:
        run_step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows = plan.limits.rows
        size = f"{rows} such rows" if rows else f"{max(plan.limits.tokens, longest)} tokens"
        raise DoesNotFitError(
            f"the longest row has {longest} tokens, and a micro-batch of {size} with "
            f"{plan.recomputed_layers} layers recomputed does not fit the memory (about "
            f"{plan.needed_bytes / 2**30:.1f} GiB for activations). Set data.max_length="
            f"{max(longest // 2, 1)}, or train.gradient_checkpointing=true with "
            "train.micro_batch_size=1 (batch_size, and so the result, stays)."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed, on a GPU or on the CPU, from other errors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)


def rehearse_save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, run: RunDir) -> None:
    """Write once what the run will write, where it will write it, and delete it again.

    Raises:
        LlmtuneError: the directory is not writable, the disk too full, or the base's generation
            config is one that transformers refuses to save.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = SAVED_COPIES * trained
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        require_space(run.path, needed, what=f"{run.path}: the adapter with its checkpoints")
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=run.path) as directory:
            _write_everything(model, tokenizer, Path(directory))
    except OSError as error:
        raise LlmtuneError(
            f"cannot write into {run.path}: {error}. Choose another run_dir."
        ) from error


def _write_everything(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    save_weights(model, directory)
    tokenizer.save_pretrained(directory)
    base = model.get_base_model()
    try:
        base.config.save_pretrained(directory)
        if base.generation_config is not None:
            base.generation_config.save_pretrained(directory)
    except ValueError as error:
        raise LlmtuneError(
            "the base model's config files cannot be saved again, so neither could the tuned "
            f"model's: {error} Correct generation_config.json of the base."
        ) from error
