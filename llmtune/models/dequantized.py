"""A quantized checkpoint turned into a dense one, once, in the cache directory."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir, make_once
from llmtune.io.fingerprint import hash_file, hash_json
from llmtune.io.run_dir import atomic_write_json
from llmtune.io.sizes import format_size
from llmtune.io.unfinished import remove_all_leftovers, require_space
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint, StoredForm
from llmtune.models.gguf import RECORD_NAME
from llmtune.models.stored.dense import (
    DenseTensor,
    dense_config,
    dense_dtype,
    plan_dense,
    small_files,
)
from llmtune.models.stored.formats import read_format

VERSION = 1
"""Of what is written; a checkpoint by an older one is made again."""
SPARE_BYTES = 64 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dequantization:
    """What a quantized checkpoint becomes, from its headers alone."""

    source: Checkpoint
    form: StoredForm
    config: Mapping[str, Any]
    """The config.json of the dense checkpoint."""
    tensors: tuple[DenseTensor, ...]
    target: Path
    """Where the dense checkpoint is, or will be."""

    @property
    def stored_bytes(self) -> int:
        """Of the quantized weights."""
        return sum(entry.num_bytes for entry in self.source.index.tensors.values())

    @property
    def dense_bytes(self) -> int:
        """Of the dense weights."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def is_made(self) -> bool:
        """Whether the dense checkpoint is there already."""
        return (self.target / CONFIG_NAME).is_file()

    def describe(self) -> str:
        """Say in one line what happens to the base, with its sizes."""
        made = "is" if self.is_made else "will be, on first use,"
        return (
            f"base: {self.form.describe()}: {format_size(self.stored_bytes)} as stored; the dense "
            f"checkpoint of {format_size(self.dense_bytes)} {made} in {self.target}"
        )


def plan_dequantization(
    source: Checkpoint, *, keeps_loadable: bool = False
) -> Dequantization | None:
    """Say what the dense checkpoint of `source` is; None if `source` is dense.

    Args:
        keeps_loadable: also None for one that transformers loads as it is.

    Raises:
        LlmtuneError: it is stored in a way that is not read, or is damaged.
    """
    format = read_format(source.config, str(source.directory))
    if format is None or (keeps_loadable and format.loads_as_is):
        return None
    if not source.has_safetensors and any(source.directory.glob("*.bin")):
        raise LlmtuneError(
            f"{source.directory}: this base is stored quantized ({format.title}) in pickled .bin "
            "files, which are not read; save it as safetensors, or give the 16-bit checkpoint that "
            "it was made from: model.base=..."
        )
    source.require_whole(allow_pickle=False, allow_quantized=True)
    dtype = dense_dtype(source.config)
    form = StoredForm(format.title, dtype, source.fingerprint)
    return Dequantization(
        source=source,
        form=form,
        config=dense_config(source.config),
        tensors=plan_dense(format, source.index, dtype),
        target=cache_dir() / "bases" / _key(source)[:16],
    )


def dequantize(plan: Dequantization) -> Checkpoint:
    """Return the dense checkpoint, which is made on first use.

    It is named after all that it depends on, and appears whole or not at all, also when two
    processes make it at once.

    Raises:
        LlmtuneError: the numbers of a weight cannot be read, or there is no room to write.
    """
    source, target = plan.source, plan.target
    if target.parent.is_dir():
        remove_all_leftovers(target.parent)
    if not plan.is_made:
        require_space(
            target,
            plan.dense_bytes + SPARE_BYTES,
            what=f"{source.directory}: the dense checkpoint of this base (set LLMTUNE_CACHE)",
        )
        logger.info(
            "%s: %s, once, into %s (%s)",
            source.directory,
            plan.form.describe(),
            target,
            format_size(plan.dense_bytes),
        )
        make_once(
            target,
            lambda directory: _write(plan, directory),
            marker=CONFIG_NAME,
            source=str(source.directory),
        )
    return replace(source, directory=target, stored=plan.form)


def _write(plan: Dequantization, directory: Path) -> None:
    # Imported here: a base that was made before, or is dense, loads no torch.
    from llmtune.models.stored.convert import write_dense

    write_dense(plan.source.directory, plan.tensors, directory)
    atomic_write_json(directory / CONFIG_NAME, plan.config)
    record = {
        "source": plan.source.origin,
        "revision": plan.source.revision,
        "stored": plan.form.title,
        "dtype": plan.form.dtype,
        "source_fingerprint": plan.form.fingerprint,
    }
    atomic_write_json(directory / RECORD_NAME, record)


def _key(source: Checkpoint) -> str:
    """Return a hash of all that the dense checkpoint depends on."""
    weights = sorted((entry.path.name, entry.num_bytes) for entry in source.index.tensors.values())
    return hash_json(
        {
            "version": VERSION,
            "fingerprint": source.fingerprint,
            "weights": weights,
            "files": {path.name: hash_file(path) for path in small_files(source.directory)},
        }
    )
