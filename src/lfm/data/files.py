"""Files of records: read with the file and line of whatever is wrong, written whole or not at all."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any, final

import msgspec

from lfm.core.errors import DataError, OutputError, at
from lfm.core.heavy import np
from lfm.core.method import Amount
from lfm.data.records import KINDS, Image, Record, Text, kind_of
from lfm.data.shapes import example, shape_of
from lfm.data.wording import wording

Rows = Iterator[tuple[int, dict[str, Any]]]
"""(line, fields), lines counted from 1; for parquet the row's number."""

BYTES_A_TOKEN = 4.0
"""English text under common tokenizers; an estimate for planning."""
PATCH = 16
"""Pixels on the side of an image token; likewise."""


# ---------------------------------------------------------------------------------------------- reading


@final
class Lines(tuple[Record, ...]):
    """Records with the file and the line that each was read from."""

    path: Path
    lines: Sequence[int]


def where(records: Sequence[Record], place: int) -> str:
    """How users find a record, counted from 0: FILE:LINE, or its kind and number where it was read from no file."""
    if isinstance(records, Lines):
        return at(records.path, records.lines[place])
    return f"{kind_of(records[place])} {place + 1}"


@final
class NoRecord(Exception):
    """What stands in a line that is no record of any kind, and why it is none."""

    def __init__(self, what: str, why: str = "") -> None:
        self.what, self.why = what, why


def read(ref: str | Path, kind: str = "text") -> tuple[Record, ...]:
    """The records of a .jsonl, .json, .csv, .tsv, .parquet or .txt file (one text a line), all of one kind.

    DataError names file and line, what is wrong there, and a line that would be right: of `kind`, what is looked for,
    where the file does not tell its own.
    """
    path = Path(ref).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is not a kind of data file that lfm reads", fix=f"use {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"there is no data file {path}")
    try:
        found = _read(path, reader)
    except NoRecord as error:
        raise DataError(error.what, why=error.why, fix=f"a right line: {example(kind)}") from None
    if not found:
        raise DataError(f"{path} holds no records", fix=f"a line such as {example(kind)}")
    return found


def _read(path: Path, reader: Callable[[Path], Rows]) -> Lines:
    records: list[Record] = []
    lines = array("Q")
    shapes: dict[frozenset[str], Callable[[dict[str, Any]], dict[str, Any]]] = {}
    for line, row in reader(path):
        record = _record(path, line, row, shapes)
        if records and type(record) is not type(records[0]):
            raise DataError(
                f"{at(path, line)}: a {kind_of(record)} record in a file of {kind_of(records[0])} records",
                fix="give each kind its own file",
            )
        records.append(record)
        lines.append(line)
    found = Lines(records)
    found.path, found.lines = path, lines
    return found


def _record(path: Path, line: int, row: dict[str, Any], shapes: dict[Any, Any]) -> Record:
    names = frozenset(row)
    try:
        if names not in shapes:
            shapes[names] = shape_of(set(names))
        fields = _plain(shapes[names](row), path.parent)
    except DataError as error:
        raise DataError(f"{at(path, line)}: {error.what}", why=error.why, fix=error.fix) from None
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{at(path, line)}: a row of a known dataset's layout lacks {error}") from None
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"{at(path, line)}: no kind of record is called {kind!r}", fix=f"kinds: {', '.join(KINDS)}")
    try:
        return msgspec.convert({"kind": kind, **fields}, KINDS[kind])
    except msgspec.ValidationError as error:
        raise DataError(f"{at(path, line)}: {error}", fix=f"a right line: {example(kind)}") from None


def _plain(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Classes as names, images as bytes or as the path of a file that is there."""
    label = fields.get("label")
    if isinstance(label, bool | int):
        fields["label"] = str(label).lower()
    if "image" in fields:
        fields["image"] = _image(fields["image"], folder)
    return fields


def _image(image: Any, folder: Path) -> str | bytes:
    if isinstance(image, dict):
        held = image.get("bytes")
        if isinstance(held, str):
            try:
                return base64.b64decode(held, validate=True)
            except ValueError:
                raise DataError("an image's bytes are not base64") from None
        image = held if held is not None else image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, str) and image:
        place = folder / image
        if not place.is_file():
            raise DataError(f"there is no image {place}")
        return str(place)
    raise DataError(f"an image is a path or {{'bytes': …}}, not {type(image).__name__}", fix=example("image"))


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
            except msgspec.DecodeError as error:
                raise _bad_json(path, line, error) from None
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
    """paraphrases, neighbours and portability are JSON lists in their cells; all else is text."""
    if name not in ("paraphrases", "neighbours", "portability"):
        return cell
    try:
        return msgspec.json.decode(cell) if cell else []
    except msgspec.DecodeError:
        return cell


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        classes = _class_names(file.schema_arrow.metadata or {})
        row = 0
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                row += 1
                for name, names in classes.items():
                    place = fields.get(name)
                    if isinstance(place, int) and 0 <= place < len(names):
                        fields[name] = names[place]
                yield row, {name: value for name, value in fields.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file that can be read", why=str(error).splitlines()[0]) from None


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


# ---------------------------------------------------------------------------------------------- writing


def write(records: Sequence[Record], path: str | Path) -> None:
    """Write the records in the format of the path's suffix; the file appears whole or not at all.

    Images in memory become PNG. `read` gives the same records back (an image in memory comes back as PNG bytes).
    DataError if the records cannot be told so (several kinds, a .txt of anything but one-line texts).
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path} is not a kind of data file that lfm writes", fix=f"use {', '.join(READERS)}")
    kinds = {kind_of(record) for record in records}
    if len(kinds) != 1:
        raise DataError(f"a data file holds records of one kind, not {', '.join(sorted(kinds)) or 'none'}")
    try:
        content = _content(records, path.suffix.lower())
    except UnicodeEncodeError as error:
        raise DataError(f"a record holds half a character ({error.reason})", fix="remove lone surrogates") from None
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}", why=error.strerror or str(error)) from None
    finally:
        part.unlink(missing_ok=True)


def _content(records: Sequence[Record], suffix: str) -> bytes:
    rows = [_told(record, base64_bytes=suffix in (".jsonl", ".json")) for record in records]
    if suffix == ".jsonl":
        return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    if suffix == ".json":
        return b"[\n" + b",\n".join(msgspec.json.encode(row) for row in rows) + b"\n]\n"
    if suffix == ".txt":
        texts = [record.text if isinstance(record, Text) else "" for record in records]
        if any(not t.strip() or len(t.splitlines()) != 1 or getattr(r, "group", "") for t, r in zip(texts, records)):
            raise DataError("a .txt file holds texts of one line each, and no groups", fix="write .jsonl instead")
        return "".join(text + "\n" for text in texts).encode()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    return _table_bytes(rows, "," if suffix == ".csv" else "\t")


def _table_bytes(rows: list[dict[str, Any]], separator: str) -> bytes:
    if isinstance(rows[0].get("image"), dict):
        raise DataError("a table cannot hold the bytes of an image", fix="write .parquet or .jsonl, or save the images")
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=separator)  # ends lines with \r\n, and so quotes cells that hold either
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for v in row.values())
    return sink.getvalue().encode()


def _told(record: Record, *, base64_bytes: bool) -> dict[str, Any]:
    """Every field, defaults too, with the kind first."""
    row: dict[str, Any] = {"kind": kind_of(record)}
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if name == "image":
            value = _image_told(value, base64_bytes)
        elif isinstance(value, tuple):
            value = [list(v) if isinstance(v, tuple) else v for v in value]
        row[name] = value
    return row


def _image_told(image: Any, base64_bytes: bool) -> Any:
    if isinstance(image, str | Path):
        return str(Path(image).absolute())
    if not isinstance(image, bytes):
        from PIL import Image as Picture

        sink = io.BytesIO()
        Picture.fromarray(np.asarray(image)).save(sink, format="PNG")
        image = sink.getvalue()
    return {"bytes": base64.b64encode(image).decode() if base64_bytes else image}


# ---------------------------------------------------------------------------------------------- measuring


def amount(records: Sequence[Record]) -> Amount:
    """How many records, and about how many tokens they are (one for 4 bytes of text, one for 16 × 16 pixels)."""
    if records and isinstance(records[0], Image):
        seen = records[:64]  # images of one set are of one size; the sizes of a few will do
        each = sum(_patches(record.image) for record in seen if isinstance(record, Image)) / len(seen)
        return Amount(len(records), ceil(each * len(records)))
    size = sum(len(_words(record).encode("utf-8", "replace")) for record in records)
    return Amount(len(records), ceil(size / BYTES_A_TOKEN))


def _words(record: Record) -> str:
    return record.text if isinstance(record, Text) else "".join(wording(record))


def _patches(image: Any) -> int:
    from PIL import Image as Picture

    if isinstance(image, str | Path | bytes):
        try:
            with Picture.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                width, height = opened.size
        except OSError:
            return 1
    else:
        height, width = np.asarray(image).shape[:2]
    return ceil(width / PATCH) * ceil(height / PATCH) + 1


def digest(records: Sequence[Record]) -> str:
    """sha256 over what the records say, in order; an image counts by its pixels, wherever and however it is stored."""
    from lfm.models.codec import picture

    found = hashlib.sha256()
    for record in records:
        fields = {name: getattr(record, name) for name in record.__struct_fields__}
        if not fields.get("portability", True):  # the digest that edits had before they could say any
            del fields["portability"]
        if isinstance(record, Image):
            pixels = np.ascontiguousarray(picture(record.image))
            fields["image"] = [*pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest()]
        found.update(msgspec.json.encode({"kind": kind_of(record), **fields}, order="deterministic") + b"\n")
    return found.hexdigest()
