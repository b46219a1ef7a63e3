"""Read a GGUF file with transformers and save it as a dense bfloat16 checkpoint."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.errors import LlmtuneError
from llmtune.models.quiet import quiet_loading


def convert_gguf(gguf_path: Path, directory: Path) -> None:
    """Write the model and the tokenizer of `gguf_path` into `directory`, weights in bfloat16.

    Raises:
        LlmtuneError: transformers cannot read this file, or is too old to read GGUF files dense.
    """
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is None:
        raise LlmtuneError(
            f"{gguf_path}: transformers {transformers.__version__} cannot unpack GGUF files; "
            "5.23 can. Upgrade it, or give a dense checkpoint."
        )
    where = str(gguf_path.parent)
    try:
        # one progress bar of transformers' GGUF reader has no switch
        with quiet_loading(), redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf_path.name)
            model = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=gguf_path.name,
                quantization_config=gguf_config(dequantize=True),
                dtype=torch.bfloat16,
            )
    except (ValueError, KeyError, NotImplementedError, RuntimeError, ImportError) as error:
        raise LlmtuneError(
            f"{gguf_path}: transformers {transformers.__version__} cannot read this GGUF file: "
            f"{error}"
        ) from error
    with quiet_loading():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
