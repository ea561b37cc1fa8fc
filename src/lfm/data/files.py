"""Files of records: read with the file and line of whatever is wrong, written whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from math import ceil
from pathlib import Path
from typing import Any, final

import msgspec

from lfm.core.errors import DataError, OutputError, at
from lfm.core.interfaces import Codec
from lfm.core.method import Amount, Inputs, Sizes
from lfm.core.model import Model
from lfm.data import media
from lfm.data.formats import READERS, NoRecord, Rows, saved
from lfm.data.records import KINDS, Message, Record, Text, kind_of
from lfm.data.shapes import example, shape_of
from lfm.data.wording import wording

BYTES_A_TOKEN = 4.0
"""English text under common tokenizers; an estimate for planning."""


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


def told_by(records: Sequence[Record], made: Sequence[Record], places: Sequence[int]) -> Sequence[Record]:
    """Records made of others, each of the one at its place: users find them where those were read (see `where`)."""
    if not isinstance(records, Lines):
        return tuple(made)
    found = Lines(made)
    found.path, found.lines = records.path, [records.lines[place] for place in places]
    return found


def read(ref: str | Path, kind: str = "text") -> tuple[Record, ...]:
    """The records of a .jsonl, .json, .csv, .tsv, .parquet or .txt file (one text a line), or of a directory that
    `datasets` saved, all of one kind.

    DataError names file and line, what is wrong there, and a line that would be right: of `kind`, what is looked for,
    where the file does not tell its own.
    """
    path = Path(ref).expanduser()
    reader = saved if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is not a kind of data file that lfm reads", fix=f"use {', '.join(READERS)}")
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=3, cutoff=0.6)
        raise DataError(
            f"there is no data file {path}",
            fix=f"did you mean {' or '.join(str(path.parent / name) for name in near)}?"
            if near
            else "a path, or zoo:NAME as `lfm zoo` lists them",
        )
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
    columns: frozenset[str] = frozenset()  # of the first row
    for line, row in reader(path):
        columns = columns or frozenset(row)
        record = _record(path, line, row, shapes, columns)
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


def _record(
    path: Path, line: int, row: dict[str, Any], shapes: dict[Any, Any], columns: frozenset[str] = frozenset()
) -> Record:
    names = frozenset(row)
    try:
        if names not in shapes:
            shapes[names] = shape_of(set(names))
        fields = _plain(shapes[names](row), path.parent)
    except DataError as error:
        if not names or names < columns:
            lacking = " and ".join(repr(name) for name in sorted(columns - names)) or "any field"
            raise DataError(
                f"{at(path, line)}: there is nothing in {lacking}",
                why="a record needs what the first of the file has" if columns else "",
                fix="fill it in, or leave the row out",
            ) from None
        raise DataError(f"{at(path, line)}: {error.what}", why=error.why, fix=error.fix) from None
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{at(path, line)}: a row of a known dataset's layout lacks {error}") from None
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"{at(path, line)}: no kind of record is called {kind!r}", fix=f"kinds: {', '.join(KINDS)}")
    try:
        return msgspec.convert({"kind": kind, **fields}, KINDS[kind])
    except msgspec.ValidationError as error:
        raise DataError(f"{at(path, line)}: {_wrong(str(error))}", fix=f"a right line: {example(kind)}") from None


SAYS = {
    "str": "text",
    "null": "nothing (null)",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
"""JSON's types in words."""


def _wrong(said: str) -> str:
    """What msgspec says of a field that is of another type, in words; all else as it is."""
    found = re.fullmatch(r"Expected `(.+)`, got `(.+)` - at `\$\.?(.*)`", said)
    if not found:
        return said
    asked, got, field = found.groups()
    asked = " or ".join(SAYS.get(one, one) for one in asked.split(" | "))
    return f"`{field}` must be {asked}, and is {SAYS.get(got, got)}"


def _plain(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Classes as names, messages without empty fields, images and sounds as bytes or the path of a file there is."""
    label = fields.get("label")
    if isinstance(label, bool | int):
        fields["label"] = str(label).lower()
    if isinstance(said := fields.get("messages"), list):  # columns of a table are there though they hold nothing
        fields["messages"] = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in said]
    for kind in media.MEDIA:
        if kind in fields:
            fields[kind] = media.held(kind, fields[kind], folder)
    return fields


# ---------------------------------------------------------------------------------------------- writing


def write(records: Sequence[Record], path: str | Path) -> None:
    """Write the records in the format of the path's suffix; the file appears whole or not at all.

    Images in memory become PNG, sounds WAV. `read` gives the same records back (these come back as bytes).
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
    for kind in media.MEDIA:
        if any(isinstance(row.get(kind), dict) for row in rows):
            raise DataError(
                f"a table cannot hold the bytes of an {kind}", fix=f"write .parquet or .jsonl, or save each {kind}"
            )
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=separator)  # ends lines with \r\n, and so quotes cells that hold either
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(json.dumps(v, ensure_ascii=False) if isinstance(v, list | bool) else v for v in row.values())
    return sink.getvalue().encode()


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _told(record: Record, *, base64_bytes: bool) -> dict[str, Any]:
    """Every field, defaults too, with the kind first."""
    row: dict[str, Any] = {"kind": kind_of(record)}
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if name in media.MEDIA:
            value = media.told(name, value, base64_bytes=base64_bytes)
        elif isinstance(value, tuple):
            value = [msgspec.structs.asdict(v) if isinstance(v, Message) else _listed(v) for v in value]
        row[name] = value
    return row


# ---------------------------------------------------------------------------------------------- measuring


def amount(records: Sequence[Record]) -> Amount:
    """How many records, and about how many tokens they are (one for 4 bytes of text, 16 × 16 pixels or 20 ms)."""
    kind = kind_of(records[0]) if records else ""
    if kind in media.MEDIA:
        seen = records[:64]  # images of one set are of one size; the sizes of a few will do
        each = sum(media.tokens(kind, getattr(record, kind)) for record in seen) / len(seen)
        return Amount(len(records), ceil(each * len(records)))
    size = sum(len(_words(record).encode("utf-8", "replace")) for record in records)
    return Amount(len(records), ceil(size / BYTES_A_TOKEN))


def sizes(inputs: Inputs) -> Sizes:
    """What a cost estimate of a method on these inputs rests on."""
    return Sizes(
        {role: tuple(model.facts for model in given) for role, given in inputs.models.items()},
        {role: amount(records) for role, records in inputs.data.items()},
        {role: tuple(model.gives.keys() for model in given) for role, given in inputs.models.items()},
        labels(inputs.data),
        lambda data, role: questions(inputs.records(data), inputs.model(role)),
    )


def labels(data: Mapping[str, Sequence[Record] | None]) -> dict[str, int]:
    """How many different classes each role's records have; nothing of records that are not there yet."""
    return {role: len({getattr(record, "label", "") for record in some}) for role, some in data.items() if some}


def questions(records: Sequence[Record], model: Model) -> tuple[int, int] | None:
    """As lfm.data.places has them; None of a model that is no causal one, or has no tokenizer."""
    from lfm.data import places  # which knows of tasks, and they of files

    return places.questions(records, model) if model.can(Codec) and model.facts.task == "causal-lm" else None


def _words(record: Record) -> str:
    return record.text if isinstance(record, Text) else "".join(wording(record))


def digest(records: Sequence[Record]) -> str:
    """sha256 over what the records say, in order; an image counts by its pixels and a sound by its samples, however
    they are stored."""
    found = hashlib.sha256()
    for place, record in enumerate(records):
        fields = {name: getattr(record, name) for name in record.__struct_fields__}
        if not fields.get("portability", True):  # the digest that edits had before they could say any
            del fields["portability"]
        if fields.get("ends"):  # likewise of completions
            del fields["ends"]
        for kind in media.MEDIA:
            if kind in fields:
                try:
                    fields[kind] = media.meaning(kind, fields[kind])
                except DataError as error:
                    told = f"{where(records, place)}: `{kind}`: {error.what}"
                    raise DataError(told, why=error.why, fix=error.fix) from None
        try:
            found.update(msgspec.json.encode({"kind": kind_of(record), **fields}, order="deterministic") + b"\n")
        except UnicodeEncodeError:
            raise DataError(
                f"{where(records, place)}: a text in it holds half a character", fix="take lone surrogates out"
            ) from None
    return found.hexdigest()
