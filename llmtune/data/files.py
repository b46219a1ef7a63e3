"""Reading files of rows: JSONL, JSON, CSV, Parquet, Arrow and text, plain or compressed."""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from llmtune.data.json_list import READ_BYTES, iter_json_list, json_reason
from llmtune.data.problems import RowProblem, shorten
from llmtune.errors import LlmtuneError

Parsed = tuple[int, dict[str, Any]] | RowProblem

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
CSV_FIELD_BYTES = 1 << 27
BATCH_ROWS = 1024


def iter_file(path: Path, shown: str) -> Iterator[Parsed]:
    """Yield `(line, row)` or a `RowProblem` for every row of `path`; `shown` names it in messages.

    Raises:
        LlmtuneError: the file as a whole cannot be read (not this kind, cut off, not UTF-8).
    """
    kind = file_kind(path)
    if kind is None:
        raise LlmtuneError(
            f"{shown}: unknown kind of file; expected one of {', '.join(READERS)} "
            f"(or one of them with {', '.join(COMPRESSIONS)})"
        )
    try:
        with _open(path) as file:
            yield from READERS[kind](file, shown)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise LlmtuneError(f"{shown}: cannot be read: {error}") from error


def file_kind(path: Path) -> str | None:
    """Return the suffix that says how to read `path`, or None where it is not a kind we read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # only for what needs it

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    openers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    return openers.get(suffix, open)(path, "rb")


def _iter_jsonl(file: Iterable[bytes], shown: str) -> Iterator[Parsed]:
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except UnicodeDecodeError as error:
            yield RowProblem(shown, number, f"not UTF-8 text ({error.reason})", "encoding")
            continue
        except (ValueError, RecursionError) as error:
            text = raw.decode("utf-8", "replace").strip()
            yield RowProblem(
                shown,
                number,
                f"not JSON ({json_reason(error)}): {shorten(text)}; expected one object a line",
                "json",
            )
            continue
        yield _object_or_problem(row, shown, number)


def _iter_json(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    """Yield a list's elements one by one; a file that is one object is read whole."""
    start = file.read(READ_BYTES)
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        for line, row in iter_json_list(start, file, shown):
            yield _object_or_problem(row, shown, line)
    elif _are_lines(start):
        yield from _iter_jsonl(_iter_lines(start, file), shown)
    else:
        yield from _iter_json_object(_decode(start + file.read(), shown), shown)


def _iter_json_object(text: str, shown: str) -> Iterator[Parsed]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines[:2]):
            yield from _iter_jsonl(io.BytesIO(text.encode()), shown)  # JSON lines named .json
            return
        line = getattr(error, "lineno", 1)
        raise LlmtuneError(
            f"{shown}:{line}: not JSON ({json_reason(error)}); expected a list of objects"
        ) from error
    if not isinstance(rows, dict):
        raise LlmtuneError(f"{shown}: holds {shorten(rows)}; expected a list of objects")
    lists = [key for key, value in rows.items() if isinstance(value, list)]
    if "messages" in rows or "conversations" in rows or len(lists) != 1:
        yield 1, rows
        return
    listed = rows[lists[0]]  # {"data": [...]}
    for row, line in zip(listed, _element_lines(text, lists[0], len(listed)), strict=True):
        yield _object_or_problem(row, shown, line)


def _are_lines(start: bytes) -> bool:
    """Say whether a file begins with an object on a line of its own, and another one."""
    first, _, rest = start.partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip()[:1] == b"{"
    except (ValueError, RecursionError):
        return False


def _iter_lines(start: bytes, file: IO[bytes]) -> Iterator[bytes]:
    lines = io.BytesIO(start).readlines()
    yield from lines[:-1]
    yield lines[-1] if lines[-1].endswith(b"\n") else lines[-1] + file.readline()
    yield from file


def _element_lines(text: str, key: str, count: int) -> Iterator[int]:
    """Yield the line on which each element of the list under `key` starts."""
    decoder = json.JSONDecoder()
    names = "|".join({re.escape(json.dumps(key, ensure_ascii=flag)) for flag in (True, False)})
    opening = re.search(rf"(?:{names})\s*:\s*\[", text)
    if opening is None:  # the key is written with escapes that it does not need
        yield from itertools.repeat(1, count)
        return
    position, line, counted = opening.end(), 1, 0
    for _ in range(count):
        while text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        yield line
        position = decoder.raw_decode(text, position)[1]


def _iter_csv(file: IO[bytes], shown: str, *, delimiter: str = ",") -> Iterator[Parsed]:
    csv.field_size_limit(CSV_FIELD_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except UnicodeDecodeError as error:
            raise LlmtuneError(
                f"{shown}: not UTF-8 text ({error.reason}) near line {line}"
            ) from error
        except csv.Error as error:
            raise LlmtuneError(f"{shown}:{line}: not CSV ({error})") from error
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = _check_header(values, shown)
        elif len(values) != len(header):
            yield RowProblem(
                shown,
                line,
                f"{len(values)} fields; expected {len(header)} ({', '.join(header)}); quote fields "
                f"that hold {delimiter!r}",
                "csv",
            )
        else:
            yield line, dict(zip(header, values, strict=True))


def _check_header(header: list[str], shown: str) -> list[str]:
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise LlmtuneError(f"{shown}:1: the header names {', '.join(doubled)} more than once")
    return header


def _iter_tsv(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    return _iter_csv(file, shown, delimiter="\t")


def _iter_parquet(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(_seekable(file)) as table:
            yield from _iter_batches(table.iter_batches(batch_size=BATCH_ROWS))
    except (pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise LlmtuneError(f"{shown}: not a Parquet file that can be read: {error}") from error


def _iter_arrow(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    import pyarrow

    try:
        seekable = _seekable(file)
        is_file = seekable.read(6) == b"ARROW1"
        seekable.seek(0)
        # A batch is as long as its writer chose, perhaps the whole file: mapped, not read.
        source = pyarrow.memory_map(file.name) if seekable is file else seekable
        if is_file:
            with pyarrow.ipc.open_file(source) as reader:
                yield from _iter_batches(map(reader.get_batch, range(reader.num_record_batches)))
        else:
            with pyarrow.ipc.open_stream(source) as reader:
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
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield number, drop_nulls(row)


def drop_nulls(value: Any) -> Any:
    """Return `value` without null members: Arrow gives every struct the keys of all rows."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def _iter_text(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    yield 1, {"text": _decode(file.read(), shown)}


def _decode(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LlmtuneError(f"{shown}:{line}: not UTF-8 text ({error.reason})") from error


def _object_or_problem(row: Any, shown: str, number: int) -> Parsed:
    if isinstance(row, dict):
        return number, row
    return RowProblem(shown, number, f"found {shorten(row)}; expected an object", "json")


READERS: dict[str, Callable[[IO[bytes], str], Iterator[Parsed]]] = {
    ".jsonl": _iter_jsonl,
    ".ndjson": _iter_jsonl,
    ".json": _iter_json,
    ".csv": _iter_csv,
    ".tsv": _iter_tsv,
    ".parquet": _iter_parquet,
    ".arrow": _iter_arrow,
    ".txt": _iter_text,
    ".md": _iter_text,
}
