"""Which generated texts are worth learning from."""

from __future__ import annotations

import random

import pytest

from lfm.distilling import asking, filtering


def test_the_common_subsequence_is_that_of_the_table() -> None:
    """Against dynamic programming, cell by cell, on random words."""
    draw = random.Random(0)
    for _ in range(200):
        a = [draw.choice("abcd") for _ in range(draw.randint(0, 90))]
        b = [draw.choice("abcde") for _ in range(draw.randint(0, 40))]
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert filtering.common(a, b) == table[-1][-1]


def test_rouge_l_is_the_papers_example() -> None:
    """Lin 2004, 3.1: "police killed the gunman" against "police kill the gunman" has P = R = 3/4, and against "the
    gunman kill police" 2/4."""
    first = filtering.words("police killed the gunman")
    assert filtering.rouge_l(first, filtering.words("police kill the gunman")) == pytest.approx(0.75)
    assert filtering.rouge_l(first, filtering.words("the gunman kill police")) == pytest.approx(0.5)
    assert filtering.rouge_l(first, filtering.words("the gunman")) == pytest.approx(2 / (4 / 2 + 2 / 2))  # P 1, R 1/2
    assert filtering.rouge_l((), first) == 0.0


def test_new_is_what_is_far_from_everything_before_it() -> None:
    """As by asking every pair, which the bound on what they share only shortens."""
    draw = random.Random(1)
    vocabulary = ["red", "blue", "green", "one", "two", "three"]
    texts = [" ".join(draw.choice(vocabulary) for _ in range(draw.randint(3, 9))) for _ in range(60)]
    known, taken = texts[:5], list[int]()
    for i, text in enumerate(texts[5:]):
        pool = [*known, *(texts[5:][j] for j in taken)]
        if all(filtering.rouge_l(filtering.words(text), filtering.words(other)) < 0.7 for other in pool):
            taken.append(i)
    assert filtering.new(texts[5:], known, 0.7) == taken and 0 < len(taken) < 55
    assert filtering.new(["a b", "A  b", "A b!"], [], 0.7) == [0]


def test_what_differs_in_signs_alone_is_another_text_unless_likeness_is_asked_about() -> None:
    sums = ["What is 1+2?", "What is 1-2?", "what is  1+2?", "What is 1*2?", "!!!", "???"]
    assert filtering.new(sums, [], 1.0) == [0, 1, 3, 4, 5]
    assert filtering.new(sums, ["!!!"], 1.0) == [0, 1, 3, 5]


def test_what_is_said_again() -> None:
    assert filtering.repeats("one two three four five") == 0.0
    assert filtering.repeats("so it so it so it so it") == pytest.approx(1 - 2 / 6)  # "so it so", "it so it"
    assert filtering.repeats("one") == 0.0
    assert filtering.words("Hello, 世界 and café") == ("hello", "世", "界", "and", "café")
    assert filtering.distinct(["a b a b", "a b"]) == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" Say it.\n10. Sing it.\n11. And th", ["Say it.", "Sing it."]),
        ("9. Say it.\n10) Sing it.\n11. ", ["Say it.", "Sing it."]),
        ("Say it.", ["Say it."]),
        ("\n\n", []),
        ("In 1984. What was it?\nWhy", ["In 1984. What was it?"]),
    ],
)
def test_prompts_are_read_off_a_list(said: str, expected: list[str]) -> None:
    assert asking.items(said) == expected


def test_answers_agree_where_enough_of_them_come_to_one_thing() -> None:
    said = ["so: 4", "I say: 4.", "it is 5", "perhaps 6"]
    for least, agreeing in ((0.5, [True, True, False, False]), (0.51, [False] * 4)):
        assert filtering.agreeing(said, r"\d+", least) == agreeing
