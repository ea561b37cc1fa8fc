"""What a run's edits did, as the page tells it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lfm import record
from lfm.record import Edited
from lfm.report import edited as view
from lfm.report import page
from report.made import answer, edited, run


def made(out: Path, found: Edited | None = None, **rest: Any) -> Path:
    return run(out, "edit.rome", [("model", "zoo:lm", "1" * 64)], "2" * 64, edited=found, **rest)


def test_an_edit_is_told_by_what_was_said_before_and_after(tmp_path: Path) -> None:
    curves = {"loss": (3.0, 1.0), "p(new object) with the value found": (0.91, 0.999)}
    text = page([made(tmp_path / "r", edited(), curves=curves)])
    shown = view.shown(record.read(tmp_path / "r"))
    assert shown is not None and shown.more == 2
    (card,) = shown.cards
    assert [(line.label, line.kind) for line in card.lines] == [
        ("asked", "new"),
        ("said otherwise", "new"),
        ("beside it", "same"),
        ("the subject", "same"),
    ]
    assert (card.lines[0].p_before, card.lines[0].p_after, card.lines[3].p_after) == ("< 0.01", "0.97", "")
    assert [(line.kind, line.before, line.after) for line in shown.moved] == [
        ("lost", "Aal.", "Ost."),
        ("same", "Veld.", "Veld."),
    ]
    assert "Of 40 other prompts 1 is answered otherwise now." in text and "and 2 more edits." in text
    assert "p(new object) with the value found: 0.91 to &gt; 0.99." in text
    assert text.count("<figcaption>The capital of Veldoria is … Marn: hidden") == 1


def test_what_was_left_out_is_marked_and_a_subject_is_asked_once(tmp_path: Path) -> None:
    found = edited()
    (one,) = found.told
    two = msgspec.structs.replace(one, new_object="Ulm")
    found = msgspec.structs.replace(found, told=(one, two))
    prompt = next(each.prompt for each in one.answers if each.of == "edit")
    notes = {"skipped": 1, "skipped_because": f"{prompt!r} cannot be made to say 'Ulm' in block 0"}
    text = page([made(tmp_path / "r", found, notes=notes)])
    shown = view.shown(record.read(tmp_path / "r"))
    assert shown is not None and [card.left_out for card in shown.cards] == [False, True]
    assert [sum(line.label == "the subject" for line in card.lines) for card in shown.cards] == [1, 0]
    assert text.count("(left out)") == 1 and "1 edit left out" in text


def test_gains_are_drawn_by_the_blocks_that_were_tried(tmp_path: Path) -> None:
    gains = {"gain by block tried": (0.1, 0.3, 0.2)}
    text = page([made(tmp_path / "r", edited(), curves=gains, notes={"blocks_tried": "4, 6, 8"})])
    (drawn,) = re.findall(r"<figcaption>gain by block tried</figcaption>(.*?)</svg>", text, re.DOTALL | re.IGNORECASE)
    assert ">block<" in drawn and ">4<" in drawn and ">8<" in drawn and ">step<" not in drawn


def test_an_answer_is_new_lost_other_or_the_same() -> None:
    def kind(before: str, after: str, object: str = "Rome") -> str:
        return view.line(answer("fact", "", object, before, after)).kind

    assert (kind("Oslo.", "Rome."), kind("Rome.", "Oslo."), kind("Oslo.", "Oslo.")) == ("new", "lost", "same")
    assert (kind("Oslo.", "Bonn."), kind("Oslo.", "Bonn.", "")) == ("other", "other")


@pytest.mark.parametrize(
    ("others", "changed", "told"),
    [
        (0, 0, ""),
        (1, 0, "The other prompt that was asked is answered as before."),
        (1, 1, "The other prompt that was asked is answered otherwise."),
        (9, 0, "Of 9 other prompts none is answered otherwise now."),
        (9, 2, "Of 9 other prompts 2 are answered otherwise now."),
    ],
)
def test_how_many_others_moved_is_a_sentence(others: int, changed: int, told: str) -> None:
    assert view.beside(msgspec.structs.replace(edited(), others=others, changed=changed)) == told


def test_without_edits_or_by_an_earlier_version_there_is_no_such_part(tmp_path: Path) -> None:
    assert "What was edited" not in page([made(tmp_path / "r")])
    told = msgspec.json.decode((tmp_path / "r" / "run.json").read_bytes())
    del told["edited"]
    (tmp_path / "r" / "run.json").write_bytes(msgspec.json.encode(told))
    assert record.read(tmp_path / "r").edited is None and "What was edited" not in page([tmp_path / "r"])
