"""Reading files of rows: JSONL, JSON, CSV, Parquet, Arrow and text, plain or compressed."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

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


def _iter_jsonl(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
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
                f"not JSON ({_reason(error)}): {shorten(text)}; expected one object a line",
                "json",
            )
            continue
        yield _object_or_problem(row, shown, number)


def _iter_json(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    text = _read_text(file, shown)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines[:2]):
            yield from _iter_jsonl(io.BytesIO(text.encode()), shown)  # JSON lines named .json
            return
        line = getattr(error, "lineno", 1)
        raise LlmtuneError(
            f"{shown}:{line}: not JSON ({_reason(error)}); expected a list of objects"
        ) from error
    if isinstance(rows, dict):
        lists = [key for key, value in rows.items() if isinstance(value, list)]
        if "messages" in rows or "conversations" in rows or len(lists) != 1:
            yield 1, rows
            return
        rows = rows[lists[0]]  # {"data": [...]}
    if not isinstance(rows, list):
        raise LlmtuneError(f"{shown}: holds {shorten(rows)}; expected a list of objects")
    for row, line in zip(rows, _element_lines(text, len(rows)), strict=True):
        yield _object_or_problem(row, shown, line)


def _element_lines(text: str, count: int) -> Iterator[int]:
    """Yield the line on which each element of the JSON list in `text` starts."""
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
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
        seekable = file if file.seekable() else io.BytesIO(file.read())
        with pyarrow.parquet.ParquetFile(seekable) as table:
            yield from _iter_batches(table.iter_batches(batch_size=BATCH_ROWS))
    except (pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise LlmtuneError(f"{shown}: not a Parquet file that can be read: {error}") from error


def _iter_arrow(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    import pyarrow

    data = file.read()
    try:
        opener = pyarrow.ipc.open_file if data[:6] == b"ARROW1" else pyarrow.ipc.open_stream
        with opener(io.BytesIO(data)) as reader:
            yield from _iter_batches(iter(reader.read_all().to_batches(BATCH_ROWS)))
    except (pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise LlmtuneError(f"{shown}: not an Arrow file that can be read: {error}") from error


def _iter_batches(batches: Iterator[Any]) -> Iterator[Parsed]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
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
    yield 1, {"text": _read_text(file, shown)}


def _read_text(file: IO[bytes], shown: str) -> str:
    data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LlmtuneError(f"{shown}:{line}: not UTF-8 text ({error.reason})") from error


def _object_or_problem(row: Any, shown: str, number: int) -> Parsed:
    if isinstance(row, dict):
        return number, row
    return RowProblem(shown, number, f"found {shorten(row)}; expected an object", "json")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else "nested too deeply"


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
