"""Words drawn while training: the right ones, from the right distribution, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from lfm.core import Gradients
from lfm.distilling import drawing
from lfm.models import forward, load

PROMPTS = [[1, 40, 50, 60, 70], [1, 41], [1, 42, 52, 62]]


@pytest.fixture(scope="module", params=["rotary", "learnt places"])
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    here = tmp_path_factory.mktemp("m")
    return load((tiny.causal if request.param == "rotary" else tiny.conv1d)(here)).ask(Gradients).module()


def drawn(module: Any, speaker: Any, prompts: Any = PROMPTS, numbers: Any = (0, 1, 2), new: int = 9) -> Any:
    noise = drawing.noise(5, list(numbers), new)
    with drawing.still(module):
        return drawing.draw(prompts, drawing.alone(speaker, 400), noise, [new] * len(prompts), None)


def test_kept_keys_and_values_say_what_reading_all_again_says(module: Any) -> None:
    kept = drawn(module, drawing.remembering(module))
    again = drawn(module, drawing.rereading(lambda batch: forward(module, batch)))
    assert kept == again and all(len(row) == 9 for row in kept)


def test_a_row_is_the_same_alone_and_beside_longer_and_shorter_prompts(module: Any) -> None:
    together = drawn(module, drawing.remembering(module))
    for i, prompt in enumerate(PROMPTS):
        assert drawn(module, drawing.remembering(module), [prompt], [i]) == [together[i]]


def test_each_token_is_what_the_modules_own_probabilities_and_the_noise_give(module: Any) -> None:
    noise = drawing.noise(5, [0, 1, 2], 9)
    for row, (prompt, said) in enumerate(zip(PROMPTS, drawn(module, drawing.remembering(module)), strict=True)):
        ids = torch.tensor([[*prompt, *said]])
        with torch.no_grad():
            p = forward(module, {"input_ids": ids})[0, len(prompt) - 1 : -1, :400].double().softmax(-1)
        sums = p.cumsum(-1)
        for place, token in enumerate(said):
            wanted = noise[row, 0, place].item()
            below = sums[place, token - 1].item() if token else 0.0
            assert below - 1e-5 <= wanted <= sums[place, token].item() + 1e-5


@pytest.mark.parametrize("width", [512, 4096, 50257])
def test_in_narrow_precision_the_same_tokens_are_drawn(width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    told, noise = torch.randn(64, width, generator=draw).softmax(-1), torch.rand(64, generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = drawing.pick(told, noise)
    assert torch.equal(narrow, drawing.pick(told, noise)) and len(narrow.unique()) > 40


def test_a_row_ends_where_it_says_so_and_has_at_most_its_room() -> None:
    says = iter(([7, 7, 3], [3, 8, 8], [9, 8, 8], [9, 8, 8]))

    def choose(tokens: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return torch.tensor(next(says))

    made = drawing.draw([[1], [1], [1]], choose, torch.zeros(3, 2, 4), [4, 4, 2], 3)
    assert made == [[7, 3], [7, 8, 8, 8], [3]]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 700))
def test_the_share_of_noise_that_picks_a_token_is_its_probability(seed: int, width: int) -> None:
    p = torch.randn(width, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    grid = (torch.arange(4096) + 0.5) / 4096
    share = drawing.pick(p.expand(4096, -1), grid).bincount(minlength=width) / 4096
    assert (share - p).abs().max() <= 1 / 4096 + 1e-5


def _said(probabilities: torch.Tensor) -> drawing.Speaker:
    return lambda tokens: probabilities.log().expand(len(tokens), -1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mixture_is_drawn_from_both(share: float) -> None:
    s, t = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.1, 0.2, 0.6])
    rows = 4096
    grid = torch.stack([(torch.arange(rows) + 0.5) / rows] * 2, 1)
    told = drawing.mixed(_said(s), _said(t), share, 4)(torch.zeros(rows, 1), grid)
    expected = (1 - share) * s + share * t
    torch.testing.assert_close(told.bincount(minlength=4) / rows, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("top", [1, 2, 4, 9])
def test_a_token_that_the_teacher_would_not_say_is_drawn_from_the_teacher(top: int) -> None:
    """P(a) = p_s(a) where a is of the teacher's top, plus what the student puts elsewhere times p_t(a)."""
    s, t = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.15, 0.25, 0.5])
    side = 128
    line = (torch.arange(side) + 0.5) / side
    told = drawing.proposed(_said(s), _said(t), top, 4)(torch.zeros(side**2, 1), torch.cartesian_prod(line, line))
    kept = torch.zeros(4)
    kept[t.topk(min(top, 4)).indices] = 1
    expected = s * kept + (s * (1 - kept)).sum() * t
    torch.testing.assert_close(told.bincount(minlength=4) / side**2, expected, rtol=0, atol=0.01)


def test_noise_is_a_records_own(tmp_path: Path) -> None:
    several, one = drawing.noise(3, [4, 9], 5), drawing.noise(3, [9], 5)
    assert torch.equal(several[1], one[0])
    assert not torch.equal(several[0], several[1]) and not torch.equal(one, drawing.noise(4, [9], 5))
