"""Files of records: what is read, what is written, and what the error says when a line is wrong."""

from __future__ import annotations

import hashlib
import json
import re
import string
import struct
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.core.errors import DataError, OutputError
from lfm.data.files import amount, digest, read, write
from lfm.data.media import MEDIA
from lfm.data.records import KINDS, Completion, Edit, Fact, Image, Label, Pair, Record, Text
from lfm.data.shapes import EXAMPLES, example
from lfm.runs.execute import Order, prepare


def saved(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MEDIA])
def test_each_kind_is_known_by_its_fields(tmp_path: Path, kind: str) -> None:
    line = json.loads(example(kind))
    assert line.pop("kind") == kind
    assert read(saved(tmp_path, "a.jsonl", json.dumps(line) + "\n\n" + json.dumps(line))) == (EXAMPLES[kind],) * 2
    assert read(saved(tmp_path, "a.json", json.dumps([line], indent=2))) == (EXAMPLES[kind],)


def test_a_text_file_is_one_text_a_line(tmp_path: Path) -> None:
    assert read(saved(tmp_path, "a.txt", "one\n\n  two  \r\n")) == (Text(text="one"), Text(text="  two  "))


def test_tables_are_read_with_quotes_line_breaks_and_byte_order_marks(tmp_path: Path) -> None:
    table = '\ufefftext,label\n"a, ""b""",yes\n"two\nlines",no\n'
    assert read(saved(tmp_path, "a.csv", table)) == (
        Label(text='a, "b"', label="yes"),
        Label(text="two\nlines", label="no"),
    )
    assert read(saved(tmp_path, "a.tsv", "prompt\tcompletion\nQ:\t a, b\n")) == (
        Completion(prompt="Q:", completion=" a, b"),
    )


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"sentence": "so good", "label": 1, "idx": 7}, Label(text="so good", label="1")),
        ({"text": "so", "label": 0, "label_text": "bad"}, Label(text="so", label="bad")),
        ({"premise": "a", "hypothesis": "b", "label": "no"}, Pair(text="a", text_b="b", label="no")),
        ({"question": "Q?", "answer": "A"}, Completion(prompt="Q?", completion="A")),
        (
            {"instruction": "Add.", "input": "3 and 4", "output": "7", "text": "Below …"},
            Completion(prompt="Add.\n\n3 and 4\n\n", completion="7"),
        ),
        (
            {"instruction": "Greet.", "context": "", "response": "Hello", "category": "chat"},
            Completion(prompt="Greet.\n\n", completion="Hello"),
        ),
        ({"text": "x", "label": True}, Label(text="x", label="true")),
        (
            {"sub_label": "Dante", "obj_label": "Florence", "predicate_id": "P19", "template": "[X] was born in [Y] ."},
            Fact(subject="Dante", relation="P19", object="Florence", prompt="Dante was born in", suffix=" ."),
        ),
        (
            {"obj_label": "fly", "masked_sentences": ["Birds can [MASK]."], "pred": "CapableOf"},
            Fact(subject="", relation="CapableOf", object="fly", prompt="Birds can", suffix="."),
        ),
        (
            {
                "case_id": 0,
                "requested_rewrite": {
                    "prompt": "The mother tongue of {} is",
                    "relation_id": "P103",
                    "target_new": {"str": "English", "id": "Q1860"},
                    "target_true": {"str": "French", "id": "Q150"},
                    "subject": "Danielle Darrieux",
                },
                "paraphrase_prompts": ["Danielle Darrieux, a native"],
                "neighborhood_prompts": ["The native language of Montesquieu is"],
            },
            Edit(
                subject="Danielle Darrieux",
                relation="P103",
                object="French",
                new_object="English",
                prompt="The mother tongue of Danielle Darrieux is",
                paraphrases=("Danielle Darrieux, a native",),
                neighbours=(("The native language of Montesquieu is", "French"),),
            ),
        ),
        (
            {"subject": "Watts", "src": "Where?", "rephrase": "In where?", "alt": "Illinois", "answers": ["Utah"],
             "loc": "who sang", "loc_ans": "Cher"},
            Edit(subject="Watts", relation="", object="Utah", new_object="Illinois", prompt="Where?",
                 paraphrases=("In where?",), neighbours=(("who sang", "Cher"),)),
        ),
    ],
    ids=["sst2", "setfit", "nli", "qa", "alpaca", "dolly", "bool", "lama-template", "lama-masked", "counterfact",
         "zsre"],
)  # fmt: skip
def test_common_datasets_are_read_as_they_are(tmp_path: Path, row: dict, record: Record) -> None:
    assert read(saved(tmp_path, "a.jsonl", json.dumps(row))) == (record,)


def test_images_of_a_parquet_file_and_its_class_names(tmp_path: Path) -> None:
    png = _png(np.arange(64, dtype=np.uint8).reshape(8, 8))
    table = pa.table({"image": [{"bytes": png, "path": None}] * 2, "label": [1, 0]})
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (Image(image=png, label="dog"), Image(image=png, label="cat"))
    pq.write_table(table, tmp_path / "b.parquet")
    assert [r.label for r in read(tmp_path / "b.parquet") if isinstance(r, Image)] == ["1", "0"]


def test_an_images_path_is_looked_for_beside_the_file(tmp_path: Path) -> None:
    saved(tmp_path, "seven.png", _png(np.zeros((8, 8), np.uint8)))
    line = json.dumps({"image": "seven.png", "label": "7"})
    assert read(saved(tmp_path, "a.jsonl", line)) == (Image(image=str(tmp_path / "seven.png"), label="7"),)
    with pytest.raises(DataError, match=r"b\.jsonl:1: `image`: there is no file .*six\.png"):
        read(saved(tmp_path, "b.jsonl", line.replace("seven", "six")))


# ------------------------------------------------------------------------------------------ what is wrong, and where


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y"', r"a\.jsonl:2: not JSON\. .*A|a right line: \{"),
        ("a.jsonl", '{"text": "x"}\n[1]', r"a\.jsonl:2: a record is an object, not list.*\{\"kind\":\"text\""),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', r"a\.jsonl:2: `text` must be text, and is a number"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}', r"a\.jsonl:2: `text` must be text, and is nothing \(null\)"),
        ("a.jsonl", '{"text": "x \\ud83d\\ude00"}\n{"text": "y \\ud800"}', r"a\.jsonl:2: \\ud800 is half a character"),
        ("a.json", '[{"text": "x"},\n{"text": "y \\uDC00"}]', r"a\.json:2: \\udc00 is half a character"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{}', r"a\.jsonl:2: there is nothing in 'label' and 'text'"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"label": "y"}', r"a\.jsonl:2: there is nothing in 'text'.*first"),
        ("a.jsonl", "{}", r"a\.jsonl:1: there is nothing in any field"),
        ("a.jsonl", '{"kind": "fact", "subject": "x"}', r"a\.jsonl:1: Object missing required field.*\"prompt\""),
        ("a.jsonl", '{"kind": "poem", "text": "x"}', r"a\.jsonl:1: no kind of record is called 'poem'.*kinds: text"),
        ("a.jsonl", '{"text": "x", "mood": "y"}', r"a\.jsonl:1: fields mood, text fit no kind.*does not know mood"),
        ("a.jsonl", '{"prompt": "x"}', r"fit no kind of record\. completion, the nearest, lacks completion"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "y", "label": "z"}',
            r"a\.jsonl:2: a label record in a file of text records",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl:2: byte 24 \(0xff\) is not UTF-8"),
        ("a.jsonl", "", "holds no records"),
        ("a.json", '{"text": "x"}', "is a list of objects"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.json", '[\n {"text": "x"},\n {"text" "y"}\n]', r"a\.json:3: not JSON"),
        ("a.json", '[\n {"text": "x"}\n {"text": "y"}\n]', r"a\.json:3: not JSON.*comma"),
        ("a.json", '[{"text": "x"}', r"a\.json:1: not JSON.*does not end"),
        ("a.json", '[\n {"text": "x"},\n {"text": 1}]', r"a\.json:3: `text` must be text"),
        ("a.csv", "text,label\na,b\nc\n", r"a\.csv:3: 1 cells in a table of 2 columns"),
        ("a.csv", 'text,label\n"a\nb",c\n"d"e,f\n', r"a\.csv:4: not a table"),
        ("a.csv", "text,text\na,b\n", r"a\.csv:1: the first line must name each column once"),
        ("a.parquet", b"PAR1 but not", "is not a parquet file that can be read"),
        ("a.xlsx", b"", "is not a kind of data file"),
        ("a.jsonl", '{"requested_rewrite": {}}', r"a\.jsonl:1: a row of a known dataset's layout lacks 'subject'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(saved(tmp_path, name, content))
    assert re.search(says, str(caught.value), re.S), str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_the_right_line_is_of_the_kind_that_is_looked_for(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.jsonl", "edit")
    assert '"kind":"edit"' in caught.value.fix
    order = Order(id="edit.rome", models={}, data={"edits": tmp_path / "a.jsonl"})
    with pytest.raises(DataError) as caught:
        prepare(order)
    assert '"kind":"edit"' in caught.value.fix


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no data file.*zoo:NAME"):
        read(tmp_path / "nowhere" / "none.jsonl")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"did you mean .*/train\.jsonl\?"):
        read(tmp_path / "trian.jsonl")


# ------------------------------------------------------------------------------------------ writing

WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
PLAIN = st.text(string.ascii_letters + " ,\"'éß東\t", min_size=1, max_size=12)
PAIRS = st.lists(st.tuples(WORDS, WORDS), max_size=2).map(tuple)
RECORDS = st.one_of(
    st.lists(st.builds(Text, text=WORDS, group=WORDS), min_size=1, max_size=4),
    st.lists(st.builds(Completion, prompt=WORDS, completion=WORDS), min_size=1, max_size=4),
    st.lists(st.builds(Label, text=WORDS, label=WORDS), min_size=1, max_size=4),
    st.lists(st.builds(Pair, text=WORDS, text_b=WORDS, label=WORDS), min_size=1, max_size=4),
    st.lists(
        st.builds(
            Edit,
            subject=WORDS,
            relation=WORDS,
            object=WORDS,
            new_object=WORDS,
            prompt=WORDS,
            suffix=WORDS,
            paraphrases=st.lists(WORDS, max_size=2).map(tuple),
            neighbours=PAIRS,
        ),
        min_size=1,
        max_size=3,
    ),
)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@settings(max_examples=40, deadline=None)
@given(records=RECORDS)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, suffix: str, records: list) -> None:
    path = tmp_path_factory.mktemp("files") / f"a{suffix}"
    write(records, path)
    assert read(path) == tuple(records)
    assert digest(read(path)) == digest(records)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(PLAIN.filter(str.strip), min_size=1, max_size=4))
def test_texts_of_one_line_are_written_as_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("files") / "a.txt"
    write([Text(text=t) for t in texts], path)
    assert read(path) == tuple(Text(text=t) for t in texts)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_images_in_memory_come_back_with_their_pixels(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    records = [Image(image=random.integers(0, 256, shape, dtype=np.uint8), label="x") for shape in ((8, 8), (8, 8, 3))]
    write(records, tmp_path / f"a{suffix}")
    assert digest(read(tmp_path / f"a{suffix}")) == digest(records)
    write(read(tmp_path / f"a{suffix}"), tmp_path / f"b{suffix}")
    assert read(tmp_path / f"b{suffix}") == read(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("records", "name", "says"),
    [
        ([Text(text="x"), Label(text="x", label="y")], "a.jsonl", "records of one kind, not label, text"),
        ([], "a.jsonl", "not none"),
        ([Text(text="two\nlines")], "a.txt", "texts of one line"),
        ([Label(text="x", label="y")], "a.txt", "texts of one line"),
        ([Text(text="\ud800")], "a.jsonl", "half a character"),
        ([Image(image=b"...", label="y")], "a.csv", "cannot hold the bytes of an image"),
        ([Text(text="x")], "a.doc", "not a kind of data file"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, records: list, name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        write(records, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.jsonl", "before")
    with pytest.raises(DataError):
        write([Text(text="\ud800")], path)
    assert path.read_text() == "before"
    write([Text(text="after")], path)
    assert read(path) == (Text(text="after"),) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="cannot write"):
        write([Text(text="x")], tmp_path / "no" / "a.jsonl")


# ------------------------------------------------------------------------------------------ measuring


def test_a_digest_is_of_content_and_order() -> None:
    a, b = Text(text="a"), Text(text="b")
    assert digest([a, b]) != digest([b, a])
    assert digest([a]) != digest([Completion(prompt="", completion="a")])
    assert digest([Text(text="a")]) == digest([a])


def test_an_amount_counts_four_bytes_a_token() -> None:
    assert amount([Text(text="x" * 41)] * 2) == (2, 21)
    assert amount([Fact(subject="", relation="", object="Paris", prompt="It is", suffix=".")]) == (1, 3)
    # 32 × 20 pixels: 2 × 2 patches of 16 and a class token.
    assert amount([Image(image=np.zeros((20, 32), np.uint8), label="x")] * 100) == (100, 500)
    assert amount([]) == (0, 0)


def _png(array: np.ndarray) -> bytes:
    import io

    from PIL import Image as Picture

    sink = io.BytesIO()
    Picture.fromarray(array).save(sink, format="PNG")
    return sink.getvalue()


def test_edits_have_the_digest_that_they_had_before_they_could_tell_what_follows() -> None:
    """sha256 of the record's fields without portability, as they were written by hand from the fields of Edit then."""
    edit = Edit(subject="a", relation="b", object="c", new_object="d", prompt="a is")
    fields = {
        "kind": "edit",
        "group": "",
        "subject": "a",
        "relation": "b",
        "object": "c",
        "new_object": "d",
        "prompt": "a is",
        "suffix": ".",
        "paraphrases": [],
        "neighbours": [],
    }
    line = json.dumps(fields, sort_keys=True, separators=(",", ":")) + "\n"
    assert digest([edit]) == hashlib.sha256(line.encode()).hexdigest()
    assert digest([edit]) != digest([msgspec.structs.replace(edit, portability=(("e", "f"),))])


def test_a_picture_that_only_claims_to_be_huge_is_refused_by_its_line(tmp_path: Path) -> None:
    """60000 × 60000 by its header; Pillow's own error for it is neither an OSError nor a ValueError."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(png)
    (tmp_path / "a.jsonl").write_text('{"image": "huge.png", "label": "1"}\n')
    found = read(tmp_path / "a.jsonl")
    assert amount(found).records == 1
    with pytest.raises(DataError, match=r"a\.jsonl:1.*not an image.*huge\.png"):
        digest(found)


# ------------------------------------------------------------------------------------------ directories of datasets


def _saved_to_disk(folder: Path, rows: list[dict], **features: object) -> Path:
    """What `datasets` writes: Arrow streams, their names in state.json, the classes in the schema's metadata."""
    import pyarrow

    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    told = json.dumps({"info": {"features": features}})
    table = table.replace_schema_metadata({"huggingface": told})
    half = len(rows) // 2
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, part.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_a_directory_of_datasets_is_read_with_its_classes_names(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 2, "idx": i} for i in range(5)]
    found = read(_saved_to_disk(tmp_path / "set" / "train", rows, label={"names": ["no", "yes"]}))
    assert found == tuple(Label(text=f"t{i}", label=["no", "yes"][i % 2]) for i in range(5))
    with pytest.raises(DataError, match=r"holds several splits.*one of .*set/train"):
        read(tmp_path / "set")


def test_what_is_wrong_in_a_directory_is_named_by_its_row(tmp_path: Path) -> None:
    place = _saved_to_disk(tmp_path / "a", [{"text": "t", "label": "x"}, {"text": None, "label": "y"}])
    with pytest.raises(DataError, match=r"a:2: .*text"):
        read(place)
    (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../b.arrow"}]}))
    with pytest.raises(DataError, match="outside its directory"):
        read(place)
    (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": "none.arrow"}]}))
    with pytest.raises(DataError, match="not a data set that can be read"):
        read(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"without a data set.*save_to_disk"):
        read(tmp_path / "empty")


@pytest.mark.parametrize(("kind", "says"), [("image", "not an image"), ("audio", "not a WAV file")])
def test_what_is_no_image_or_sound_is_named_by_file_line_and_field(kind: str, says: str, tmp_path: Path) -> None:
    saved(tmp_path, "broken", b"nothing of the kind")
    table = read(saved(tmp_path, "a.csv", f"{kind},label\nbroken,x\n"))
    with pytest.raises(DataError, match=rf"a\.csv:2: `{kind}`: {says}"):
        digest(table)


def test_a_row_of_a_parquet_file_in_which_nothing_is_and_one_that_is_no_text_are_told(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"text": ["a", None, "b"], "label": ["x", None, "y"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:2: there is nothing in 'label' and 'text'.*leave the row out"):
        read(tmp_path / "a.parquet")
    broken = pyarrow.array([b"good", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: text in it is not UTF-8"):
        read(tmp_path / "b.parquet")


def test_half_a_character_in_a_record_made_in_python_is_told() -> None:
    with pytest.raises(DataError, match="text 2: a text in it holds half a character"):
        digest([Text(text="whole"), Text(text="\ud800")])
