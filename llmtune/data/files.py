"""Reading files of rows: JSONL, JSON, CSV, Parquet, Arrow and text, plain or compressed."""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from llmtune.data.columnar import iter_arrow, iter_parquet, refuse_doubled_columns
from llmtune.data.formats import FORMATS
from llmtune.data.json_list import READ_BYTES, iter_json_list, iter_member_list, read_member_kinds
from llmtune.data.problems import Parsed, RowProblem, shorten
from llmtune.data.row_values import json_reason, parse_json
from llmtune.errors import LlmtuneError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
CSV_FIELD_BYTES = 1 << 27
BINARY_KINDS = (".parquet", ".arrow")
SURROGATES = re.compile("[\ud800-\udfff]")
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
            if kind not in BINARY_KINDS:
                _refuse_wide_text(file, shown)
            yield from READERS[kind](file, shown)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise LlmtuneError(f"{shown}: cannot be read: {error}") from error


def file_kind(path: Path) -> str | None:
    """Return the suffix that says how to read `path`, or None if it is not a kind we read."""
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
    file: IO[bytes] = openers.get(suffix, open)(path, "rb")
    return file


def _refuse_wide_text(file: Any, shown: str) -> None:
    """Refuse UTF-16 and UTF-32, whose line breaks are not where UTF-8 has them."""
    start = file.peek(4)[:4]
    if start.startswith(WIDE_MARKS) or b"\0" in start:
        raise LlmtuneError(
            f"{shown}:1: not UTF-8 text but UTF-16 (it begins with the bytes {start.hex(' ')}); "
            "save it as UTF-8"
        )


def _iter_jsonl(file: Iterable[bytes], shown: str) -> Iterator[Parsed]:
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        try:
            row = parse_json(raw.decode())
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
    """Yield a list's elements one by one; a file that is one row is read whole."""
    start = file.read(READ_BYTES)
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        for number, row in _number_rows(iter_json_list(start, file, shown)):
            yield _object_or_problem(row, shown, number)
    elif _are_lines(start):
        yield from _iter_jsonl(_iter_lines(start, file), shown)
    else:
        yield from _iter_json_object(start, file, shown)


def _iter_json_object(start: bytes, file: IO[bytes], shown: str) -> Iterator[Parsed]:
    """Yield the rows of `{"data": [...]}` one by one, or the object as the file's only row.

    Which of the two it is shows at the file's end, so the file is read twice.
    """
    if not file.seekable():  # a compressed stream that goes one way
        start += file.read()
        file = io.BytesIO()
    try:
        kinds = read_member_kinds(start, file, shown)
    except LlmtuneError:
        lines = [line for line in start.splitlines() if line.strip()]
        if len(lines) < 2 or not all(line.lstrip().startswith(b"{") for line in lines[:2]):
            raise
        file.seek(0)
        yield from _iter_jsonl(file.readlines() or io.BytesIO(start), shown)  # named .json
        return
    file.seek(0)
    start = file.read(READ_BYTES) or start
    lists = [key for key, is_list in kinds.items() if is_list]
    if len(lists) != 1 or _is_row(kinds):
        yield 1, parse_json(_decode(start + file.read(), shown))  # the file is one row
        return
    for number, row in _number_rows(iter_member_list(start, file, shown, lists[0])):
        yield _object_or_problem(row, shown, number)


def _is_row(columns: Container[str]) -> bool:
    """Return whether the only object of a file is a row: it has what one of the formats reads."""
    return any(member.required[0] in columns for member in FORMATS.values())


def _number_rows(elements: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield a list's elements with their lines, or with their numbers if all are on one line."""
    numbered = enumerate(elements, 1)
    first = next(numbered, None)
    if first is None:
        return
    second = next(numbered, None)
    is_one_line = second is not None and second[1][0] == first[1][0]
    for index, (line, element) in itertools.chain(filter(None, [first, second]), numbered):
        yield index if is_one_line else line, element


def _are_lines(start: bytes) -> bool:
    """Say whether a file begins with an object on a line of its own, and another one."""
    first, _, rest = start.partition(b"\n")
    try:
        return isinstance(parse_json(first.decode()), dict) and rest.lstrip()[:1] == b"{"
    except (ValueError, RecursionError):
        return False


def _iter_lines(start: bytes, file: IO[bytes]) -> Iterator[bytes]:
    lines = io.BytesIO(start).readlines()
    yield from lines[:-1]
    yield lines[-1] if lines[-1].endswith(b"\n") else lines[-1] + file.readline()
    yield from file


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
                f"{shown}:{line}: not UTF-8 text ({error.reason}), on this line or soon after it"
            ) from error
        except csv.Error as error:
            raise LlmtuneError(f"{shown}:{line}: not CSV ({error})") from error
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = refuse_doubled_columns(values, shown)
            _check_delimiter(values, delimiter, shown)
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


def _check_delimiter(header: list[str], delimiter: str, shown: str) -> None:
    other = next((mark for mark in ";\t|," if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        raise LlmtuneError(
            f"{shown}:1: the header is one column, {shorten(header[0])}; expected columns with "
            f"{delimiter!r} between them. The file seems to use {other!r}: save it with commas as "
            ".csv, or with tabs as .tsv"
        )


def _iter_tsv(file: IO[bytes], shown: str) -> Iterator[Parsed]:
    return _iter_csv(file, shown, delimiter="\t")


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
        for name in row:
            if not name.isascii() and SURROGATES.search(name):
                return RowProblem(
                    shown,
                    number,
                    f"a column's name holds half of a character pair: {shorten(name)}; expected "
                    "valid Unicode",
                    "unicode",
                )
        return number, row
    return RowProblem(shown, number, f"found {shorten(row)}; expected an object", "json")


READERS: dict[str, Callable[[IO[bytes], str], Iterator[Parsed]]] = {
    ".jsonl": _iter_jsonl,
    ".ndjson": _iter_jsonl,
    ".json": _iter_json,
    ".csv": _iter_csv,
    ".tsv": _iter_tsv,
    ".parquet": iter_parquet,
    ".arrow": iter_arrow,
    ".txt": _iter_text,
    ".md": _iter_text,
}
