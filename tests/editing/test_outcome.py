"""What is measured of edits, by what the model then says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lfm.data.answers import begins_with
from lfm.data.records import Edit
from lfm.editing import outcome
from lfm.editing.cloze import Asked

EDITS = (
    Edit(
        subject="France",
        relation="capital",
        object="Paris",
        new_object="Rome",
        prompt="The capital of France is",
        paraphrases=("France's capital is", "France is ruled from"),
        neighbours=(("The capital of Spain is", "Madrid"), ("The capital of Peru is", "Lima")),
        portability=(
            ("In the capital of France they speak", "Italian"),
            ("The capital of France lies by the", "Tiber"),
        ),
    ),
    Edit(subject="Ada", relation="job", object="painter", new_object="cat", prompt="Ada works as a"),
)
SAYS = {
    "The capital of France is": "Rome",
    "Ada works as a": "painter",
    "France's capital is": "Rome",
    "France is ruled from": "Paris",
    "The capital of Spain is": "Madrid",
    "In the capital of France they speak": "Italian",
    "The capital of France lies by the": "Seine",
}


def says(asked: Sequence[Asked]) -> list[bool]:
    return [SAYS.get(prompt) == answer for prompt, answer, _ in asked]


def test_each_share_is_of_its_own_prompts() -> None:
    found = outcome.measured(says, EDITS, EDITS, before=[True, False])
    assert found == {"efficacy": 0.5, "paraphrase": 0.5, "portability": 0.5, "neighbours_kept": 1.0}


class Talks:
    """A Text that says the same to anything, as far as there is room: a token is a character here."""

    def __init__(self, text: str) -> None:
        self.text = text

    def generate(self, prompts: Sequence[str], *, max_tokens: int, **_: object) -> list[str]:
        return [self.text[:max_tokens] for _ in prompts]


@pytest.mark.parametrize(
    ("text", "answer", "opens", "whole"),
    [
        ("cats and dogs", "cat", True, False),  # another word
        ("cat's tail", "cat", True, True),
        (" cat, and dogs", " cat", True, True),
        ("the first painter of Wolfenbüttel who sold none", "the first painter of Wolfenbüttel who", True, True),
        ("the first painter of Wolfenbüttel I met", "the first painter of Wolfenbüttel who", False, False),
    ],
)
def test_an_editor_answers_for_letters_and_an_evaluation_asks_for_words(
    text: str, answer: str, opens: bool, whole: bool
) -> None:
    assert outcome.saying(Talks(text))([("prompt", answer, "")]) == [opens]
    assert begins_with(text, answer) == whole


def test_nothing_is_told_of_what_was_not_asked() -> None:
    assert outcome.measured(says, EDITS[1:], EDITS[1:], before=[]) == {"efficacy": 0.0}
