"""Files to rows. Every row keeps its line, so that every later error can name it.

jsonl is read line by line, json element by element, csv by the `csv` module; all of them are UTF-8 (a UTF-8 byte order
mark is skipped). csv values stay text: a house number 007 is not the number 7. A txt file is one document; its parts
are taken by lines. Parquet goes through pyarrow. Nothing here can run code: no pickle, no script.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmops.errors import DataError

__all__ = ["READERS", "Table", "read_bytes", "read_file"]

_OTHER_ENCODINGS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
                    (codecs.BOM_UTF16_BE, "UTF-16"))


@dataclass(frozen=True)
class Table:
    """Rows as they stand in a source, and the place of each ("data/train.jsonl:17")."""

    rows: list[dict[str, Any]]
    places: list[str]
    by_lines: bool = False  # one document whose parts are counted in lines
    header: str = ""  # the place of the column names, where they have one of their own

    @property
    def named_at(self) -> str:
        """Where the columns get their names: the header, or the first row."""
        return self.header or self.places[0]

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in the order in which they turn up."""
        return list(dict.fromkeys(column for row in self.rows for column in row))


def read_file(path: Path, label: str) -> Table:
    """Read one file by its suffix. `label` stands for it in messages. Raises DataError with file and line."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f'{label}: cannot read a "{suffix or path.name}" file; expected one of {", ".join(READERS)}; '
                        "convert the file, or give it the suffix of what it holds")
    table = READERS[suffix](path, label)
    if not table.rows:
        raise DataError(f"{label}:1: the file has no rows; expected at least one; check that it is the right file")
    return table


def read_bytes(path: Path, label: str) -> bytes:
    """All bytes of a file; DataError when the system refuses."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{label}: cannot be read ({error.strerror or error}); check the path and its "
                        f"rights") from error


def _text(path: Path, label: str) -> str:
    """The file as text. A file that is not UTF-8 is refused with the line of the first bad byte."""
    data = read_bytes(path, label)
    for mark, name in _OTHER_ENCODINGS:
        if data.startswith(mark):
            raise DataError(f"{label}:1: the file begins with the byte order mark of {name}; expected UTF-8; "
                            "save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise DataError(f"{label}:{line}: byte {column} of the line is 0x{data[error.start]:02x}, which is not UTF-8; "
                        "save the file as UTF-8 (it may be Latin-1 or Windows-1252), or mend the line") from error


def _read_jsonl(path: Path, label: str) -> Table:
    table = Table([], [])
    for number, line in enumerate(_text(path, label).split("\n"), 1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        place = f"{label}:{number}"
        if not table.rows and line.lstrip().startswith("["):
            raise DataError(f"{place}: the line begins a JSON array; expected one JSON object a line; "
                            'if the whole file is one array, name it ".json"')
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(place, error, "one JSON object a line") from error
        _append(table, value, place)
    return table


def _read_json(path: Path, label: str) -> Table:
    text = _text(path, label)
    at = _skip(text, 0)
    if text[at:at + 1] == "{":  # many write one object a line and still call it .json
        return _read_jsonl(path, label)
    if text[at:at + 1] != "[":
        raise DataError(f'{label}:{_line(text, at)}: the file begins with {text[at:at + 12]!r}; expected an array of '
                        "objects, or one object a line")
    table, decoder = Table([], []), json.JSONDecoder()
    line, counted, at = 1, 0, _skip(text, at + 1)
    while text[at:at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        place = f"{label}:{line}"
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(place, error, "an array of objects") from error
        _append(table, value, place)
        at = _skip(text, end)
        if text[at:at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at:at + 1] != "]":
                continue
        elif text[at:at + 1] == "]":
            break
        raise DataError(f"{label}:{_line(text, at)}: {text[at:at + 12]!r} follows an element; expected a comma and the "
                        "next object, or the closing bracket; mend the line (the file may be cut off)")
    rest = _skip(text, at + 1)
    if rest < len(text):
        raise DataError(f"{label}:{_line(text, rest)}: {text[rest:rest + 12]!r} follows the array; expected its end; "
                        'one array a file, or one object a line in a ".jsonl" file')
    return table


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _not_json(place: str, error: Exception, expected: str) -> DataError:
    what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    if isinstance(error, json.JSONDecodeError) and error.lineno > 1:  # within a whole file, not within one line
        place = f"{place.rsplit(':', 1)[0]}:{error.lineno}"
    return DataError(f"{place}: not JSON ({what}); expected {expected}; mend the line or take it out")


def _append(table: Table, value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f'{place}: {type(value).__name__} where an object is expected, as {{"text": "..."}}; '
                        "give every value a column name")
    table.rows.append(value)
    table.places.append(place)


def _read_csv(path: Path, label: str, delimiter: str = ",") -> Table:
    text = _text(path, label)
    limit = csv.field_size_limit(max(len(text), 1))  # long texts are ordinary here; the stock limit is 128 KiB
    try:
        return _csv_table(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), label)
    finally:
        csv.field_size_limit(limit)


def _csv_table(reader: Any, label: str) -> Table:
    table = Table([], [], header=f"{label}:1")
    header: list[str] = []
    while True:
        place = f"{label}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{place}: not csv ({error}); expected fields with commas, or quotes, inside them to be "
                            'quoted as "a ""b"" c"; mend the line') from error
        if fields is None:
            return table
        if not fields:
            continue
        if not header:
            header = [field.strip() for field in fields]
            if "" in header or len(set(header)) < len(header):
                raise DataError(f"{place}: the header is {', '.join(header)!r}; expected a different, non-empty name "
                                f"for "
                                "every column; mend the first line")
        elif len(fields) != len(header):
            raise DataError(f"{place}: {len(fields)} fields where the header has {len(header)} ({', '.join(header)}); "
                            "quote fields that hold commas or line breaks")
        else:
            _append(table, dict(zip(header, fields, strict=True)), place)


def _read_tsv(path: Path, label: str) -> Table:
    return _read_csv(path, label, "\t")


def _read_parquet(path: Path, label: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{label}:1: not a parquet file that can be read ({reason}); write it again, "
                        "or give the file the suffix of what it holds") from error
    return Table(rows, [f"{label}:{number}" for number in range(1, len(rows) + 1)])  # parquet has rows, not lines


def _read_txt(path: Path, label: str) -> Table:
    text = _text(path, label)
    return Table([{"text": text}] if text.strip() else [], [f"{label}:1"] if text.strip() else [], by_lines=True)


READERS: dict[str, Callable[[Path, str], Table]] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet,
    ".txt": _read_txt}
