"""Reading Parquet and Arrow files a few rows at a time."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llmtune.data.problems import Parsed
from llmtune.errors import LlmtuneError
from llmtune.io.json_files import parse_json

BATCH_ROWS = 1024
BATCH_BYTES = 1 << 24


def iter_parquet(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    """Yield the rows of a Parquet file, a batch in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(_seekable(file)) as table:
            refuse_doubled_columns(table.schema_arrow.names, shown)
            num_bytes = sum(
                table.metadata.row_group(group).total_byte_size
                for group in range(table.metadata.num_row_groups)
            )
            size = _rows_in_batch(table.metadata.num_rows, num_bytes)
            yield from _iter_batches(table.iter_batches(batch_size=size))
    except (pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise LlmtuneError(f"{shown}: not a Parquet file that can be read: {error}") from error


def iter_arrow(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    """Yield the rows of an Arrow file or stream, a batch in memory at a time."""
    import pyarrow

    try:
        seekable = _seekable(file)
        is_file = seekable.read(6) == b"ARROW1"
        seekable.seek(0)
        # A batch is as long as its writer chose, perhaps the whole file: mapped, not read.
        source = pyarrow.memory_map(file.name) if seekable is file else seekable
        if is_file:
            with pyarrow.ipc.open_file(source) as reader:
                refuse_doubled_columns(reader.schema.names, shown)
                yield from _iter_batches(map(reader.get_batch, range(reader.num_record_batches)))
        else:
            with pyarrow.ipc.open_stream(source) as reader:
                refuse_doubled_columns(reader.schema.names, shown)
                yield from _iter_batches(iter(reader))
    except (pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise LlmtuneError(f"{shown}: not an Arrow file that can be read: {error}") from error


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """Return a plain file as it is; a compressed one unpacked, for going back in it is slow."""
    is_plain = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
    return file if is_plain else io.BytesIO(file.read())


def _iter_batches(batches: Iterator[Any]) -> Iterator[Parsed]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged one must not be looked into
        size = _rows_in_batch(batch.num_rows, batch.nbytes)
        for start in range(0, batch.num_rows, size):
            for row in batch.slice(start, size).to_pylist():
                number += 1
                yield number, drop_nulls(row)


def _rows_in_batch(num_rows: int, num_bytes: int) -> int:
    """Return how many rows to unpack at once: fewer if they are long."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * num_rows // max(num_bytes, 1)))


def drop_nulls(value: Any) -> Any:
    """Return `value` without null members: Arrow gives every struct the keys of all rows."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def refuse_doubled_columns(header: list[str], shown: str) -> list[str]:
    """Return the names of the columns, of which none may stand twice."""
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise LlmtuneError(f"{shown}:1: the columns name {', '.join(doubled)} more than once")
    return header


def read_class_names(path: Path, column: str) -> tuple[str, ...]:
    """Return the names of a column's whole-number labels, if a data set's file has kept them."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            metadata = pyarrow.parquet.read_schema(path).metadata
        elif path.suffix == ".arrow":
            with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
                metadata = reader.schema.metadata
        else:
            return ()
        feature = parse_json((metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(map(str, feature["names"]))
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError):
        return ()
