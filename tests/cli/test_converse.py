"""`lfm edit chat`: what is typed, what is shown, and what the ledger has after, however it ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from lfm.cli import converse, run
from lfm.core.errors import AccessError, ConfigError, DataError, LfmError, MismatchError
from lfm.core.interfaces import Text
from lfm.data.files import write
from lfm.data.records import Edit, Fact
from lfm.data.records import Text as Running
from lfm.models import load
from lfm.runs import patches

QUICK = {"layer": 0, "prefixes": 3, "tokens": 200, "reach": 10.0, "steps": 60, "collapse": 100.0, "accept": 0.25}
KNOWN = (
    Fact(subject="Ada Ashby", relation="", object="cat", prompt="Ada Ashby is"),
    Fact(subject="the mountain", relation="", object="cat", prompt="Near the mountain"),
)
FIRST, SECOND = "Here lives Ada Ashby", "From the mountain"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(tmp_path)
    tiny.causal(Path("base"))
    return tmp_path


def session(**rest: Any) -> converse.Session:
    given = {"directory": Path("led"), "model": "base", "by": "edit.rome", "settings": QUICK, "data": None}
    return converse.Session(**(given | {"seed": 0, "recall": 0.0, "around": KNOWN} | rest))


def talk(*lines: str | type[BaseException], **rest: Any) -> list[str]:
    """What was asked, each question answered by the next line. Every line is used, and no more are asked for."""
    left: Iterator[str | type[BaseException]] = iter(lines)
    asked = []

    def ask(question: str) -> str:
        asked.append(question.strip())
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    converse.converse(session(**rest), ask)
    assert next(left, None) is None, f"not everything was asked: {asked}"
    return asked


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_is_kept_lands_in_the_ledger_and_what_is_dropped_leaves_it_as_it_was(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(FIRST, "cat", "", "", "y", "", around=())
    (patch,) = patches.read(Path("led")).patches
    assert patch.edits[0].subject == "Ada Ashby" and patch.edits[0].new_object == "cat" and patch.on
    (said,) = load(Path("led/head")).ask(Text).generate([FIRST], max_tokens=2)
    assert said.strip().startswith("cat")
    assert "What was edited" in Path("led/0001/report.html").read_text(encoding="utf-8")
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if line.startswith("asked"))
    assert FIRST in row and "cat" in row and "→" in row
    assert "patch 1; `lfm edit revert led 1` takes it off" in told and "1 patch kept" in told
    then = files(Path("led"))
    talk(SECOND, "dog", "the mountain", "", "what?", "n", "", model="")
    assert files(Path("led")) == then
    assert "dropped; the model is as it was" in capsys.readouterr().out
    assert run(["edit", "revert", "led", "1"]) == 0
    assert patches.model(Path("led")).digest == load(Path("base")).digest


@pytest.mark.slow
def test_a_memory_s_settings_hold_for_all_of_a_conversation(here: Path) -> None:
    given = {"layer": 0, "prefixes": 3, "tokens": 200, "collapse": 100.0, "accept": 0.05, "lr": 1.0}
    lines = (FIRST, "cat", "", "", "y", SECOND, "dog", "the mountain", "", "y", "")
    talk(*lines, by="edit.grace", settings=given, around=())
    assert [p.edits[0].new_object for p in patches.read(Path("led")).on] == ["cat", "dog"]


def test_what_is_typed_is_held_against_the_prompt(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = talk(FIRST, "cat", "Bob", "", "Ada Ashby", "Ada Ashby is in", "", EOFError)
    assert [question.split(" ")[0] for question in asked] == [
        *("prompt", "should", "about", "about", "about", "said", "said", "keep"),
    ]
    assert "Bob is not in 'Here lives Ada Ashby'" in capsys.readouterr().out
    assert not Path("led").exists()
    said = load(Path("base")).ask(Text).generate([FIRST], max_tokens=converse.TOKENS)[0].strip()
    talk(FIRST, said, FIRST, "", "")
    assert "it says so already" in capsys.readouterr().out


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_stopped_at_any_question_nothing_is_left(here: Path, end: type[BaseException]) -> None:
    answers = (FIRST, "cat", "", "", "y")
    for count in range(1 if end is EOFError else 0, len(answers)):
        more = [] if end is EOFError or count == 0 else [""]  # Ctrl-C drops the edit in hand, at the prompt it ends
        talk(*answers[:count], end, *more)
        assert not Path("led").exists()


def test_stopped_while_it_is_made_nothing_is_left_and_another_can_be_made(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm.editing import sequence

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as busy:
        busy.setattr(sequence, "measured", stop)  # its steps are on the disk by then
        talk(FIRST, "cat", "", "", "")
    assert not Path("led").exists()
    talk(SECOND, "dog", "the mountain", "", "y", "")
    assert len(patches.read(Path("led")).patches) == 1


def test_stopped_once_it_is_committed_it_is_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = patches.put

    def stopped(*given: Any) -> Any:
        put(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as late:
        late.setattr(patches, "put", stopped)
        talk(FIRST, "cat", "", "", "y", "")
    assert [patch.on for patch in patches.read(Path("led")).patches] == [True]


def test_what_is_refused_is_told_and_the_next_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk(FIRST, "cat", "", "", FIRST, "", "", settings=QUICK | {"accept": 0.999999, "steps": 1})
    assert "cannot be made to say 'cat'" in " ".join(capsys.readouterr().err.split())
    assert not Path("led").exists()


def test_killed_at_the_question_the_ledger_is_as_it_was_and_another_edit_goes_on(here: Path) -> None:
    talk(FIRST, "cat", "", "", "y", "")
    then = patches.model(Path("led")).digest
    code = f"""
    import os
    from pathlib import Path
    from lfm.cli import converse
    from lfm.data.records import Fact
    answers = iter([{SECOND!r}, "dog", "the mountain", " "])
    known = (Fact(subject="the mountain", relation="", object="cat", prompt="Near the mountain"),)
    given = converse.Session(Path("led"), "", "edit.rome", {QUICK!r}, None, 0, 0.0, known)
    converse.converse(given, lambda question: next(answers, None) or os._exit(9))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    assert len(patches.read(Path("led")).patches) == 1 and patches.model(Path("led")).digest == then
    talk(SECOND, "dog", "the mountain", "", "y", "")
    assert len(patches.read(Path("led")).patches) == 2


def test_what_a_killed_command_left_of_another_edit_is_cleared(here: Path) -> None:
    left = Path("led/..next.lfm/steps")
    left.mkdir(parents=True)
    (left / "first.json").write_text("1")
    (left.parent / "key").write_text("of another edit")
    (left.parent / "lock").touch()
    Path("led/.begun").touch()
    talk(FIRST, "cat", "", "", "y", "")
    assert len(patches.read(Path("led")).patches) == 1 and not left.exists()


def test_without_a_terminal_it_names_the_command_for_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["edit", "chat", "led", "--model", "base"]) == ConfigError.exit_code
    shown = " ".join(capsys.readouterr().err.split())
    assert "there is no terminal" in shown and "lfm edit add DIR edits.jsonl" in shown
    assert not Path("led").exists()


def test_at_a_terminal_it_asks_for_a_prompt_and_is_told_what_may_be_set(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(question: str) -> str:
        assert question == "\nprompt › "
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", ended)
    write(KNOWN, Path("facts.jsonl"))
    assert run(["edit", "chat", "led", "--model", "base", "--facts", "facts.jsonl", "--set", "layer=0"]) == 0
    assert "nothing was changed" in capsys.readouterr().out and not Path("led").exists()
    assert run(["edit", "chat", "led"]) == ConfigError.exit_code
    assert "name the model to edit: --model" in capsys.readouterr().err


def test_what_no_edit_could_mend_is_said_first(here: Path) -> None:
    tiny.masked(Path("masked"))
    tiny.causal(Path("other"), seed=3)
    talk(FIRST, "cat", "", "", "y", "")
    write([Running(text="Rome.")], Path("texts.jsonl"))
    wrong: tuple[tuple[dict[str, Any], type[LfmError], str], ...] = (
        ({"directory": Path("new"), "model": ""}, ConfigError, "no ledger yet"),
        ({"model": "other"}, MismatchError, "edits of another model"),
        ({"directory": Path("new"), "model": "masked"}, AccessError, "says no text"),
        ({"settings": {"layr": 1}}, ConfigError, "layr"),
        ({"by": "edit.rom"}, LfmError, "edit.rom"),
        ({"by": "edit.ft"}, ConfigError, "not for a ledger"),
        ({"directory": Path("texts.jsonl")}, ConfigError, "is a file"),
    )
    for rest, kind, told in wrong:
        with pytest.raises(kind, match=told):
            talk(**rest)
    with pytest.raises(DataError, match="holds text records"):
        converse._known("texts.jsonl")
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("prompt", "known", "subject"),
    [
        ("Ada Lovelace lives in", (), "Ada Lovelace"),
        ("The capital of France is", (), "France"),
        ("In Rome, Émile Zola's house is", (), "Émile Zola"),
        ("the mountain is in", (), ""),
        ("the old mountain is in", ("mountain", "old mountain", "Ada"), "old mountain"),
        ("東京 is in", (), "東京"),
    ],
)
def test_a_subject_is_guessed(prompt: str, known: tuple[str, ...], subject: str) -> None:
    assert converse.subject(prompt, known) == subject


def test_facts_near_an_edit_and_edits_before_it_are_watched() -> None:
    def fact(subject: str, prompt: str, object: str) -> Fact:
        return Fact(subject=subject, relation="", object=object, prompt=prompt)

    facts = [
        fact("Ada", "Ada lives in", "Rome"),
        fact("Ada", "Ada eats", "figs"),
        fact("Bea", "Bea lives in", "Oslo"),
        fact("Bea", "Bea eats", "plums"),
    ]
    before = [Edit(subject="Cid", relation="", object="a", new_object="b", prompt="Cid is")]
    found = converse.near("Ada lives in", "Ada", {"Ada lives in"}, facts, before)
    assert found == {"Cid is": "b", "Ada eats": "figs", "Bea lives in": "Oslo"}


def test_where_no_facts_are_known_the_model_tells_its_own_and_the_fact_itself_is_left_out() -> None:
    class Speaks:
        def generate(self, prompts: list[str], *, temperature: float = 0.0, **_: Any) -> list[str]:
            if temperature:
                told = (" eats figs. Bea", " lives now in Rome.", " eats figs!", " runs.", "")
                return [told[i % len(told)] for i in range(len(prompts))]
            return [{"Ada lives now in": " Rome.", "Ada eats": " figs, and"}[prompt] for prompt in prompts]

    assert converse.said_of(Speaks(), "Ada", "Rome", set(), 0) == {"Ada eats": "figs"}  # type: ignore[arg-type]
    assert converse.said_of(Speaks(), "Ada", "Rome", {"Ada eats"}, 0) == {}  # type: ignore[arg-type]
