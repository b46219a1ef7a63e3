"""Writing the merged model's files: untouched bytes by the kernel, changed tensors tile by tile."""

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from llmtune.io.progress import ProgressBar, progress_bar
from llmtune.io.safetensors import build_preamble, tensor_bytes
from llmtune.merging.changes import Block, MergePlan, PlannedShard, PlannedTensor
from llmtune.merging.scratch import CPU
from llmtune.merging.source import AdapterTensors
from llmtune.merging.tiles import MergeArithmetic, TensorMerger

COPY_BYTES = 64 << 20  # one piece of an untouched range
FALLBACK_BYTES = 4 << 20  # the buffer if the kernel cannot copy between the two files

NO_KERNEL_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
)


@dataclass(frozen=True)
class _Range:
    """Bytes that go from one file to another as they are."""

    source: Path
    source_offset: int
    target_offset: int
    num_bytes: int


@dataclass
class _Layout:
    """Where everything of one merged file goes."""

    preamble: bytes
    offsets: list[int] = field(default_factory=list)  # of each planned tensor
    num_bytes: int = 0


def merged_bytes(shard: PlannedShard) -> int:
    """Return the size in bytes of the file that `write_shards` makes of a planned shard."""
    return _lay_out(shard).num_bytes


def write_shards(
    plan: MergePlan, directory: Path, *, num_threads: int, device: torch.device = CPU
) -> None:
    """Write every shard of the plan into `directory` and flush it to the disk.

    Memory: about 7 MiB a thread and the adapter's part of the tensors in work, whatever the size
    of the model.

    Raises:
        LlmtuneError: a merged number is not finite.
        OSError: the disk is full or failed.
    """
    threads_before = torch.get_num_threads()
    try:
        shared = MergeArithmetic(AdapterTensors(device), device, plan.round_trip, plan.combination)
        total = sum(not tensor.is_copied for tensor in plan.tensors)
        with (
            ThreadPoolExecutor(num_threads, initializer=partial(torch.set_num_threads, 1)) as pool,
            progress_bar("merge", total, unit="tensors") as bar,
        ):
            for shard in plan.shards:
                writer = _ShardWriter(shard, directory / shard.file_name)
                writer.write(
                    pool,
                    lambda tensor: TensorMerger(tensor, shared),
                    max_pending=2 * num_threads,
                    bar=bar,
                )
    finally:
        torch.set_num_threads(threads_before)


class _ShardWriter:
    def __init__(self, shard: PlannedShard, path: Path) -> None:
        self.shard = shard
        self.path = path
        self.layout = _lay_out(shard)
        self.descriptor = -1

    def write(
        self,
        pool: ThreadPoolExecutor,
        make_merger: Callable[[PlannedTensor], TensorMerger],
        *,
        max_pending: int,
        bar: ProgressBar,
    ) -> None:
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        pending: set[Future[None]] = set()
        try:
            os.posix_fallocate(self.descriptor, 0, self.layout.num_bytes)
            _write_all(self.descriptor, memoryview(self.layout.preamble), 0)
            for copied in self._copied_ranges():
                pending.add(pool.submit(_copy_range, copied, self.descriptor))
                pending = _settle(pending, max_pending)
            for tensor, offset in zip(self.shard.tensors, self.layout.offsets, strict=True):
                if tensor.is_copied:
                    continue
                merger = make_merger(tensor)
                row_bytes = tensor_bytes(tensor.dtype, (tensor.num_columns,))
                for block, first_row, num_rows in tensor.tiles():
                    target = offset + first_row * row_bytes
                    pending.add(
                        pool.submit(self._write_tile, merger, (block, first_row, num_rows), target)
                    )
                    pending = _settle(pending, max_pending)
                bar.advance()
            _settle(pending, 0)
            os.fsync(self.descriptor)
        finally:
            for future in pending:
                future.cancel()
            wait(pending)
            os.close(self.descriptor)

    def _write_tile(self, merger: TensorMerger, tile: tuple[Block, int, int], target: int) -> None:
        _write_all(self.descriptor, merger.merge_tile(*tile), target)

    def _copied_ranges(self) -> Iterator[_Range]:
        """Yield the untouched bytes: neighbors as one range, in pieces of `COPY_BYTES`."""
        ranges: list[_Range] = []
        for tensor, offset in zip(self.shard.tensors, self.layout.offsets, strict=True):
            if not tensor.is_copied:
                continue
            source = tensor.source
            last = ranges[-1] if ranges else None
            if (
                last is not None
                and last.source == source.path
                and last.source_offset + last.num_bytes == source.start
                and last.target_offset + last.num_bytes == offset
            ):
                num_bytes = last.num_bytes + source.num_bytes
                ranges[-1] = _Range(last.source, last.source_offset, last.target_offset, num_bytes)
            else:
                ranges.append(_Range(source.path, source.start, offset, source.num_bytes))
        for whole in ranges:
            for start in range(0, whole.num_bytes, COPY_BYTES):
                yield _Range(
                    whole.source,
                    whole.source_offset + start,
                    whole.target_offset + start,
                    min(COPY_BYTES, whole.num_bytes - start),
                )


def _lay_out(shard: PlannedShard) -> _Layout:
    tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]
    preamble = shard.source.preamble
    if not shard.keeps_header:
        preamble = build_preamble(tensors, shard.source.metadata)
    layout = _Layout(preamble)
    offset = len(preamble)
    for _, dtype, shape in tensors:
        layout.offsets.append(offset)
        offset += tensor_bytes(dtype, shape)
    layout.num_bytes = offset
    return layout


def _settle(pending: set[Future[None]], max_pending: int) -> set[Future[None]]:
    """Wait until at most `max_pending` are left; raise what a finished one raised."""
    while len(pending) > max_pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
    return pending


def _copy_range(copied: _Range, target: int) -> None:
    source = os.open(copied.source, os.O_RDONLY)
    done = 0
    try:
        while done < copied.num_bytes:
            done += _copy_some(source, target, copied, done)
    finally:
        os.close(source)


def _copy_some(source: int, target: int, copied: _Range, done: int) -> int:
    left = copied.num_bytes - done
    offsets = (copied.source_offset + done, copied.target_offset + done)
    if hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, left, *offsets)
            if count:
                return count
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
    piece = os.pread(source, min(left, FALLBACK_BYTES), offsets[0])
    if not piece:
        raise OSError(errno.EIO, "cut short while it was being copied", str(copied.source))
    _write_all(target, memoryview(piece), offsets[1])
    return len(piece)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
