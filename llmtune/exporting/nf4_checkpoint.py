"""A checkpoint in 4 bits (bitsandbytes NF4), that stock transformers loads as it is."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from llmtune.checks.merge_result import VerifyResult
from llmtune.checks.merged import verify_merge
from llmtune.checks.prompts import ComparedPrompts
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.render import encode_plain
from llmtune.errors import CheckFailed
from llmtune.io.own_files import copy_own
from llmtune.io.unfinished import require_space
from llmtune.merging.sidecar import TEMPLATE_FILES, TOKENIZER_FILES, own_code
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import OWN_TEMPLATE, ModelConfig
from llmtune.models.live import LiveModel
from llmtune.models.load import load_model
from llmtune.models.quantization.config import SMALLEST
from llmtune.models.quantization.describe import describe_quantized_base
from llmtune.models.quiet import quiet_loading
from llmtune.scoring.generate import Decoding

RELOADED_KL = 1e-3
"""Nats per token by which the reloaded checkpoint may differ from the model that was saved."""
NUM_PROMPTS = 4
STATE_BYTES = 2048
"""What is written beside each quantized weight: code books, shape and method."""
SMALL_FILES_BYTES = 1 << 20
"""Configs, header and card, when the free space is checked."""
OS_ERROR = re.compile(r"(?:os error|code:) (\d+)")


@dataclass(frozen=True)
class Nf4Result:
    """A 4-bit checkpoint, and the model in memory that it was saved from."""

    num_bytes: int
    quantized_ratio: float
    live: LiveModel


def write_nf4(source: Checkpoint, directory: Path, *, trust_remote_code: bool = False) -> Nf4Result:
    """Quantize a 16-bit checkpoint to NF4 with double quantization, into an empty directory.

    The tokenizer's files are the source's, byte for byte.

    Args:
        source: a merged or other 16-bit checkpoint.
        directory: where the files go.
        trust_remote_code: whether the source's own Python code may be run; it goes along.

    Raises:
        LlmtuneError: the model cannot be quantized, or the disk has too little room for it, which
            is seen before it is loaded.
        OSError: the disk ran full.
    """
    config = ModelConfig(
        base=str(source.directory),
        quantization=SMALLEST,
        cache_quantized=False,  # what is exported is that very file
        chat_template=source.template.file,
        template_arguments=dict(source.template.arguments),
        trust_remote_code=trust_remote_code,
    )
    source.require_whole(allow_pickle=False)
    require_space(directory, needed_bytes(config, source))
    loaded = load_model(config, source)
    with quiet_loading(), _plain_errors(directory):
        loaded.model.save_pretrained(directory)
    for path in _copied_files(source.directory):
        copy_own(path, directory / path.name, root=source.directory)
    if source.template != OWN_TEMPLATE:
        template = str(source.tokenizer.chat_template)
        (directory / TEMPLATE_FILES[0]).write_text(template, encoding="utf-8")
    for path in directory.iterdir():  # some writers leave files that only their owner can read
        path.chmod(0o644 if path.is_file() else 0o755)
    return Nf4Result(
        num_bytes=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        quantized_ratio=loaded.quantized.quantized_ratio,
        live=loaded,
    )


def check_reloaded(
    live: LiveModel, directory: Path, *, trust_remote_code: bool = False
) -> VerifyResult:
    """Load what was written with stock transformers, and compare it with the model in memory.

    Raises:
        CheckFailed: it does not load as what was saved.
    """
    prompts = tuple(
        tuple(encode_plain(live.tokenizer, text)) for text in OPEN_PROMPTS[:NUM_PROMPTS]
    )
    reloaded = verify_merge(
        live.model,
        directory,
        ComparedPrompts(sequences=prompts),
        decoding=Decoding(1, live.stop_token_ids),
        dtype=live.dtype,
        trust_remote_code=trust_remote_code,
    )
    if not reloaded.kl <= RELOADED_KL:
        raise CheckFailed(
            f"{directory}: the 4-bit checkpoint does not load as it was saved (KL "
            f"{reloaded.kl:.4f} nats per token); nothing was kept"
        )
    return reloaded


def needed_bytes(config: ModelConfig, source: Checkpoint) -> int:
    """Return what the 4-bit checkpoint of a base takes on the disk; no weight is read."""
    described = describe_quantized_base(config, source)
    assert described is not None
    # Checkpoints of a base model alone name their tensors without its first component.
    quantized = set(described.weights) | {name.partition(".")[2] for name in described.weights}
    needed = SMALL_FILES_BYTES
    for tensor in source.index.tensors.values():
        if tensor.name in quantized:
            needed += STATE_BYTES + config.storage.stored_bytes(tensor.shape)
        else:
            needed += math.prod(tensor.shape) * described.dtype.itemsize
    copied = [one for path in _copied_files(source.directory) for one in (path, *path.rglob("*"))]
    return needed + sum(path.stat().st_size for path in copied if path.is_file())


def _copied_files(source_dir: Path) -> list[Path]:
    """Return the tokenizer's files, templates and Python code, that go along as they are."""
    paths = (source_dir / name for name in (*TOKENIZER_FILES, *TEMPLATE_FILES))
    return [*(path for path in paths if path.exists()), *own_code(source_dir)]


@contextmanager
def _plain_errors(directory: Path) -> Iterator[None]:
    """Raise what the operating system said; safetensors has it in the words of its message only."""
    try:
        yield
    except SafetensorError as error:
        found = OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(directory)) from error
