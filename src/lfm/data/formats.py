"""Formats of data files: rows of named fields, each with the line that it stands in."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import msgspec

from lfm.core.errors import DataError, at

Rows = Iterator[tuple[int, dict[str, Any]]]
"""(line, fields), lines counted from 1; for parquet and arrow the row's number."""

JSON_CELLS = ("messages", "paraphrases", "neighbours", "portability")
"""Columns of a table whose cells are JSON."""


@final
class NoRecord(Exception):
    """What stands in a line that is no record of any kind, and why it is none."""

    def __init__(self, what: str, why: str = "") -> None:
        self.what, self.why = what, why


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{at(path, line)}: byte {error.start} ({raw[error.start]:#04x}) is not UTF-8",
            fix="save the file as UTF-8",
        ) from None


HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
"""A half of what JSON writes as two escapes: a character beyond the first 65,536."""


def _half(path: Path, line: int, text: str) -> DataError | None:
    """That an escape in this JSON is half a character, if one is."""
    try:
        if HALF.search(text):
            json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return DataError(
            f"{at(path, line)}: {ascii(error.object[error.start])[1:-1]} is half a character",
            why="such escapes come in twos, and the other is missing: what wrote it cut a text amid a character",
            fix="write the text anew, or take the half out",
        )
    except (ValueError, RecursionError):
        return None
    return None


def _bad_json(path: Path, line: int, why: object) -> NoRecord:
    return NoRecord(f"{at(path, line)}: not JSON", str(why))


def _fields(path: Path, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NoRecord(f"{at(path, line)}: a record is an object, not {type(value).__name__}")
    return value


def _jsonl(path: Path) -> Rows:
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if text.strip():
            try:
                value = msgspec.json.decode(text)
            except (msgspec.DecodeError, RecursionError) as error:  # the latter: brackets thousands deep
                raise _half(path, line, text) or _bad_json(path, line, error) from None
            yield line, _fields(path, line, value)


def _json(path: Path) -> Rows:
    """A list of objects, each with the line on which it begins."""
    text = _text(path)
    decoder, place, line, seen = json.JSONDecoder(), 0, 1, 0

    def skip(place: int) -> int:
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        return place

    place = skip(place)
    if place < len(text) and text[place] != "[":
        raise DataError(f"{at(path, 1)}: a .json data file is a list of objects", fix="or one object a line, as .jsonl")
    place = skip(place + 1)
    while place < len(text) and text[place] != "]":
        line, seen = line + text.count("\n", seen, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _bad_json(path, getattr(error, "lineno", line), getattr(error, "msg", error)) from None
        if half := _half(path, line, text[seen:place]):
            raise half
        yield line, _fields(path, line, value)
        place = skip(place)
        if place < len(text) and text[place] not in ",]":
            raise _bad_json(path, text.count("\n", 0, place) + 1, "a comma or ] is missing")
        if place < len(text) and text[place] == ",":
            place = skip(place + 1)
    if text.strip() and (place >= len(text) or text[place + 1 :].strip()):
        raise _bad_json(path, text.count("\n", 0, place) + 1, "the list does not end, or something follows it")


def _table(path: Path, separator: str) -> Rows:
    limit = csv.field_size_limit(sys.maxsize)  # texts are longer than csv's usual 128 KiB
    try:
        reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=separator, strict=True)
        header: list[str] = []
        end = 0
        try:
            for row in reader:
                line, end = end + 1, reader.line_num
                if not header:
                    header = _header(path, row)
                    continue
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{at(path, line)}: {len(row)} cells in a table of {len(header)} columns",
                        fix=f"columns: {', '.join(header)}; quote cells that hold {separator!r}",
                    )
                yield line, {name: _cell(name, cell) for name, cell in zip(header, row, strict=True)}
        except csv.Error as error:
            raise DataError(
                f"{at(path, end + 1)}: not a table: {error}", fix="quote cells with double quotes"
            ) from None
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, row: list[str]) -> list[str]:
    if len(set(row)) != len(row) or not all(row):
        raise DataError(f"{at(path, 1)}: the first line must name each column once", fix="such as text,label")
    return row


def _cell(name: str, cell: str) -> Any:
    """Lists are JSON in their cells, whether an answer `ends` is true or false; all else is text."""
    if name == "ends":
        return {"true": True, "": True, "false": False}.get(cell.strip().lower(), cell)
    if name not in JSON_CELLS:
        return cell
    try:
        return msgspec.json.decode(cell) if cell else []
    except msgspec.DecodeError:
        return cell


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        classes = _class_names(file.schema_arrow.metadata or {})
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                row += 1
                yield row, _named(fields, classes)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: text in it is not UTF-8", why=f"after row {row}: {error.reason}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file that can be read", why=str(error).splitlines()[0]) from None


def saved(path: Path) -> Rows:
    """Rows of a directory that `datasets` saved (save_to_disk): Arrow streams, named in state.json. Nothing else of it
    is read. DataError for a directory of several splits, naming them."""
    import pyarrow

    splits = sorted(inner.parent.name for inner in path.glob("*/state.json"))
    if not (path / "state.json").is_file():
        if not splits:
            raise DataError(
                f"{path} is a directory without a data set",
                why="it has no state.json, which datasets' save_to_disk writes",
                fix="a file, or a directory written by save_to_disk",
            )
        raise DataError(f"{path} holds several splits", fix=f"one of {', '.join(str(path / name) for name in splits)}")
    row = 0
    try:
        names = [file["filename"] for file in json.loads(_text(path / "state.json"))["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise DataError(f"{path / 'state.json'} names a file outside its directory")
        for name in names:
            with pyarrow.memory_map(str(path / name)) as source, pyarrow.ipc.open_stream(source) as stream:
                classes = _class_names(stream.schema.metadata or {})
                for batch in stream:
                    for fields in batch.to_pylist():
                        row += 1
                        yield row, _named(fields, classes)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not a data set that can be read", why=(str(error).splitlines() or [type(error).__name__])[0]
        ) from None


def _named(fields: dict[str, Any], classes: dict[str, list[str]]) -> dict[str, Any]:
    """The fields that hold something, classes by their names."""
    for name, names in classes.items():
        place = fields.get(name)
        if isinstance(place, int) and 0 <= place < len(names):
            fields[name] = names[place]
    return {name: value for name, value in fields.items() if value is not None}


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of classes stored as numbers, from the metadata that the `datasets` library writes."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: f["names"] for name, f in features.items() if isinstance(f, dict) and "names" in f}
    except (ValueError, KeyError, TypeError):
        return {}


def _lines(path: Path) -> Rows:
    for line, text in enumerate(_text(path).splitlines(), start=1):
        if text.strip():
            yield line, {"kind": "text", "text": text}


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": lambda path: _table(path, ","),
    ".tsv": lambda path: _table(path, "\t"),
    ".parquet": _parquet,
    ".txt": _lines,
}
