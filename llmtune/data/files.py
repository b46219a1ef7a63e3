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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
UTF8 = "utf-8"
FIRST_SPLIT = "train"
TEXT_KINDS = (".txt", ".md")
"""Files that are one document each."""
DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Reading:
    """How a file is read, as far as its name does not say."""

    encoding: str = UTF8
    delimiter: str | None = None
    """Between the fields of a CSV; None: a comma, in .tsv a tab."""
    split: str = FIRST_SPLIT
    """Which list of a JSON object of several lists."""


def iter_file(
    path: Path, shown: str, reading: Reading | None = None, *, kind: str | None = None
) -> Iterator[Parsed]:
    """Yield `(line, row)` or a `RowProblem` for every row of `path`; `shown` names it in messages.

    Args:
        kind: the suffix that says how to read it, if its name does not.

    Raises:
        LlmtuneError: the file as a whole cannot be read (not this kind, cut off, not UTF-8).
    """
    reading = reading or Reading()
    kind = kind or file_kind(path)
    if kind is None:
        raise LlmtuneError(
            f"{shown}: unknown kind of file; expected one of {', '.join(READERS)} "
            f"(or one of them with {', '.join(COMPRESSIONS)})"
        )
    try:
        with _open(path) as file:
            if kind in BINARY_KINDS:
                yield from READERS[kind](file, shown, reading)
                return
            _refuse_wide_text(file, shown)
            if reading.encoding != UTF8:
                file = _as_utf8(file, shown, reading.encoding)
            yield from READERS[kind](file, shown, reading)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise LlmtuneError(f"{shown}: cannot be read: {error}") from error


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as JSON; half of a character pair, which UTF-8 cannot hold, stays escaped."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    return json.dumps(row, default=str) if SURROGATES.search(line) else line


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


def list_splits(path: Path) -> tuple[str, ...]:
    """Return the lists of a JSON file that is an object of several; empty for any other file."""
    if file_kind(path) != ".json":
        return ()
    with _open(path) as file:
        start = file.read(READ_BYTES)
        if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{" or _are_lines(start):
            return ()
        try:
            kinds = read_member_kinds(start, file, str(path))
        except LlmtuneError:
            return ()  # reading its rows says what is wrong
    lists = tuple(key for key, is_list in kinds.items() if is_list)
    return lists if len(lists) > 1 and not _is_row(kinds) else ()


def _as_utf8(file: IO[bytes], shown: str, encoding: str) -> IO[bytes]:
    """Return a text of a different encoding as UTF-8; it is read whole."""
    try:
        return io.BytesIO(file.read().decode(encoding).encode())
    except UnicodeDecodeError as error:
        raise LlmtuneError(f"{shown}: not {encoding} text ({error.reason})") from error


def _iter_jsonl(
    file: Iterable[bytes], shown: str, _reading: Reading | None = None
) -> Iterator[Parsed]:
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


def _iter_json(file: IO[bytes], shown: str, reading: Reading) -> Iterator[Parsed]:
    """Yield a list's elements one by one; a file that is one row is read whole."""
    start = file.read(READ_BYTES)
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        _refuse_split(reading, shown, "is one list")
        for number, row in _number_rows(iter_json_list(start, file, shown)):
            yield _object_or_problem(row, shown, number)
    elif _are_lines(start):
        _refuse_split(reading, shown, "has an object on each line")
        yield from _iter_jsonl(_iter_lines(start, file), shown)
    else:
        yield from _iter_json_object(start, file, shown, reading)


def _iter_json_object(
    start: bytes, file: IO[bytes], shown: str, reading: Reading
) -> Iterator[Parsed]:
    """Yield the rows of `{"data": [...]}` one by one, or the object as the file's only row.

    Of several lists (`{"train": [...], "test": [...]}`) the one that the split names is read.
    Which of them it is shows at the file's end, so the file is read twice.
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
    if _is_row(kinds) or not lists:
        _refuse_split(reading, shown, "is one row")
        yield 1, parse_json(_decode(start + file.read(), shown))  # the file is one row
        return
    name = reading.split if reading.split in lists else lists[0]
    if len(lists) > 1 and reading.split not in lists:
        raise LlmtuneError(
            f"{shown}: holds several lists ({', '.join(lists)}) and none of them is called "
            f"{reading.split!r}; say which one to read with split: {lists[0]}"
        )
    if name != reading.split:
        _refuse_split(reading, shown, f"has one list, {name}")
    for number, row in _number_rows(iter_member_list(start, file, shown, name)):
        yield _object_or_problem(row, shown, number)


def _refuse_split(reading: Reading, shown: str, what: str) -> None:
    if reading.split != FIRST_SPLIT:
        raise LlmtuneError(
            f"{shown}: {what}, so there is no split {reading.split!r} in it; take split out"
        )


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


def _iter_csv(file: IO[bytes], shown: str, reading: Reading) -> Iterator[Parsed]:
    csv.field_size_limit(CSV_FIELD_BYTES)
    delimiter = reading.delimiter or ","
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
                f"{shown}:{line}: not UTF-8 text ({error.reason}), on this line or soon after it; "
                "a file of Windows programs may need encoding: cp1252"
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
    other = find_delimiter(header[0])
    if len(header) == 1 and other not in (None, delimiter):
        raise LlmtuneError(
            f"{shown}:1: the header is one column, {shorten(header[0])}; expected columns with "
            f"{delimiter!r} between them. The file seems to use {other!r}: set delimiter: "
            f"{other!r}"
        )


def find_delimiter(header: str) -> str | None:
    """Return the mark that seems to stand between the columns of a header line."""
    found = {mark: header.count(mark) for mark in DELIMITERS}
    best = max(found, key=lambda mark: found[mark])
    return best if found[best] else None


def sniff_reading(path: Path, split: str = FIRST_SPLIT) -> Reading:
    """Guess how a file of rows is read: its encoding, and what is between the fields of a CSV.

    A text that is not UTF-8 is taken for the code page of Windows.
    """
    kind = file_kind(path)
    if kind is None or kind in BINARY_KINDS:
        return Reading(split=split)
    with _open(path) as file:
        decoder = codecs.getincrementaldecoder(UTF8)()
        encoding, first = UTF8, b""
        try:
            while chunk := file.read(READ_BYTES):
                first = first or chunk
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            encoding = "cp1252" if b"\0" not in first else UTF8
    if kind != ".csv":
        return Reading(encoding, None, split)
    header = first.removeprefix(codecs.BOM_UTF8).decode(encoding, "replace").partition("\n")[0]
    mark = find_delimiter(header)
    return Reading(encoding, None if mark in (None, ",") else mark, split)


def _iter_tsv(file: IO[bytes], shown: str, reading: Reading) -> Iterator[Parsed]:
    return _iter_csv(file, shown, replace(reading, delimiter=reading.delimiter or "\t"))


def _iter_text(file: IO[bytes], shown: str, _reading: Reading) -> Iterator[Parsed]:
    yield 1, {"text": _decode(file.read(), shown)}


def _iter_parquet(file: IO[bytes], shown: str, _reading: Reading) -> Iterator[Parsed]:
    return iter_parquet(file, shown)


def _iter_arrow(file: IO[bytes], shown: str, _reading: Reading) -> Iterator[Parsed]:
    return iter_arrow(file, shown)


def _decode(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LlmtuneError(f"{shown}:{line}: not UTF-8 text ({error.reason})") from error


def _object_or_problem(row: Any, shown: str, number: int) -> Parsed:
    if _is_pair(row):
        return number, {"text": row[0], "label": row[1]}
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


def _is_pair(row: Any) -> bool:
    """Say whether a row is a text with its label, as `[text, intent]`."""
    return (
        isinstance(row, list)
        and len(row) == 2
        and isinstance(row[0], str)
        and isinstance(row[1], str | int)
    )


READERS: dict[str, Callable[[IO[bytes], str, Reading], Iterator[Parsed]]] = {
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
