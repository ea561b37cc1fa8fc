"""A student's loss through its head, chunk by chunk: the numbers of autograd on whole logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lfm.models.headless import Headless
from lfm.train.headed import Best, headed, modules, rowwise
from lfm.train.losses import Divergence, complete, kd, kd_topk

KINDS: tuple[Divergence, ...] = ("forward", "reverse", "jsd")


def plain(
    student: Headless, teacher: Any, labels: Any, alpha: float, temperature: float, kind: str, beta: float
) -> torch.Tensor:
    """The definition, on whole logits, in the precision of the weights."""
    x = F.linear(*student)
    if isinstance(teacher, Headless):
        teacher = F.linear(*teacher)
    if isinstance(teacher, Best) and kind == "forward" and temperature == 1:
        known = teacher.logprobs.exp()
        inside = torch.zeros_like(x, dtype=torch.bool).scatter(-1, teacher.ids, True)
        told = x.log_softmax(-1)
        soft = (known * (teacher.logprobs - told.gather(-1, teacher.ids))).sum(-1)
        if teacher.ids.shape[-1] < x.shape[-1]:
            rest = 1 - known.sum(-1)
            soft = soft + rest * (rest.log() - told.masked_fill(inside, -math.inf).logsumexp(-1))
    else:
        if isinstance(teacher, Best):
            rest = (1 - teacher.logprobs.exp().sum(-1, keepdim=True)) / (x.shape[-1] - teacher.ids.shape[-1])
            teacher = rest.log().expand_as(x).scatter(-1, teacher.ids, teacher.logprobs)
        width = min(x.shape[-1], teacher.shape[-1])
        s, t = ((y[:, :width] / temperature).log_softmax(-1) for y in (x, teacher))
        q, p = s.exp(), t.exp()
        m = beta * p + (1 - beta) * q
        soft = {
            "forward": p * (t - s),
            "reverse": q * (s - t),
            "jsd": beta * p * (t - m.log()) + (1 - beta) * q * (s - m.log()),
        }[kind].sum(-1)
    hard = F.cross_entropy(x, labels) if alpha < 1 else 0.0
    return (1 - alpha) * hard + alpha * temperature**2 * soft.mean()


def student(places: int = 7, width: int = 5, vocabulary: int = 23, dtype: Any = torch.float64, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((places, width), (vocabulary, width), (vocabulary,))
    return Headless(
        *(torch.randn(size, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)
    )


def teacher(of: str, places: int = 7, vocabulary: int = 23, k: int = 4, dtype: Any = torch.float64) -> Any:
    other = student(places, 3, vocabulary, dtype, seed=1)
    other = Headless(*(part.detach() for part in other))
    if of == "head":
        return other
    logits = F.linear(*other)
    if of == "logits":
        return logits
    told = logits.log_softmax(-1).topk(vocabulary if of == "all" else k, -1)
    return Best(told.indices, told.values)


def gradients(loss: torch.Tensor, of: Headless) -> tuple[Any, ...]:
    return torch.autograd.grad(loss, [t for t in of if t is not None])


@pytest.mark.parametrize("of", ["logits", "head", "best"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.0])
def test_loss_and_gradients_are_those_of_autograd_on_whole_logits(
    of: str, kind: Divergence, temperature: float, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "WORDS", 7)  # of 23: three products and a rest
    mine, theirs = student(), teacher(of)
    labels = torch.arange(7) * 3
    beta = 0.3
    expected = plain(mine, theirs, labels, alpha, temperature, kind, beta)
    slopes = gradients(expected, mine)
    for room in (1, 3 * 23 * 8, 0):  # a row at a time, three, and all at once
        found = headed(mine, theirs, labels, alpha=alpha, temperature=temperature, kind=kind, beta=beta, room=room)
        torch.testing.assert_close((found, *gradients(found, mine)), (expected, *slopes), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_all_answers_told_as_the_best_ones_are_the_whole_answers(kind: Divergence) -> None:
    for temperature in (1.0, 2.0):
        found, expected = (
            headed(student(), teacher(of), temperature=temperature, kind=kind).item() for of in ("all", "logits")
        )
        assert found == pytest.approx(expected, rel=1e-6)  # 1e-7 is never left out of what is told


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_longer_vocabulary_what_both_have_is_compared(kind: Divergence) -> None:
    labels = torch.arange(7)
    for mine, theirs in ((23, 19), (19, 23)):
        one, other = student(vocabulary=mine), teacher("logits", vocabulary=theirs)
        settings: Any = {"alpha": 0.6, "temperature": 1.0, "kind": kind, "beta": 0.5}
        expected, found = plain(one, other, labels, **settings), headed(one, other, labels, **settings)
        slopes = [gradients(loss, one) for loss in (found, expected)]
        torch.testing.assert_close((found, *slopes[0]), (expected, *slopes[1]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_an_answer_that_the_teacher_rules_out_costs_what_it_should(kind: Divergence) -> None:
    mine, theirs = student(), teacher("logits")
    theirs[:, 5] = -math.inf
    found, near = headed(mine, theirs, kind=kind), headed(mine, theirs.clamp(min=-50.0), kind=kind)
    slopes = [gradients(loss, mine) for loss in (found, near)]
    torch.testing.assert_close((found, *slopes[0]), (near, *slopes[1]), rtol=1e-9, atol=1e-12)


def test_an_answer_that_neither_can_give_costs_nothing() -> None:
    mine, theirs = student(), teacher("logits")
    bias = torch.zeros(23, dtype=torch.float64).index_fill(0, torch.tensor([5]), -math.inf)
    barred = mine._replace(bias=bias.requires_grad_())
    theirs[:, 5] = -math.inf
    there = [i for i in range(23) if i != 5]
    found = headed(barred, theirs)
    fewer = Headless(barred.hidden, barred.weight[there], barred.bias[there])
    expected = plain(fewer, theirs[:, there], None, 1.0, 1.0, "forward", 0.5)
    slopes = [gradients(loss, barred) for loss in (found, expected)]
    torch.testing.assert_close((found, *slopes[0]), (expected, *slopes[1]), rtol=1e-10, atol=1e-12)


def test_a_sure_student_and_a_sure_teacher_have_finite_gradients() -> None:
    """All but nothing is left out by either, to the last bit of fp32."""
    mine = student(dtype=torch.float32)
    mine = mine._replace(bias=torch.where(torch.arange(23) < 4, 200.0, -200.0).requires_grad_())
    ids = torch.arange(4).expand(7, 4)
    told = F.linear(*mine).detach()[:, :4].log_softmax(-1)
    found = headed(mine, Best(ids, told))
    assert found.item() == pytest.approx(0, abs=1e-4)
    assert all(bool(torch.isfinite(slope).all()) for slope in gradients(found, mine))


@pytest.mark.parametrize("of", ["logits", "head", "best"])
def test_what_does_not_train_gets_no_gradient_and_costs_none(of: str) -> None:
    mine = student()
    expected = gradients(headed(mine, teacher(of)), mine)
    frozen = Headless(mine.hidden, mine.weight.detach())
    expected = gradients(headed(mine._replace(bias=None), teacher(of)), mine._replace(bias=None))
    found = headed(frozen, teacher(of))
    torch.testing.assert_close(torch.autograd.grad(found, mine.hidden)[0], expected[0])
    with torch.no_grad():
        assert not headed(mine, teacher(of)).requires_grad
    assert headed(Headless(*(part.detach() for part in mine)), teacher(of)).grad_fn is None


def test_no_places_lose_nothing() -> None:
    mine = student(places=0)
    found = headed(mine, torch.empty(0, 23), torch.empty(0, dtype=torch.long), alpha=0.5)
    assert found.item() == 0 and all(not bool(slope.any()) for slope in gradients(found, mine))


def test_gradients_are_scaled_by_what_comes_after() -> None:
    mine = student()
    whole = gradients(headed(mine, teacher("best")), mine)
    for a, b in zip(gradients(headed(mine, teacher("best")) * 3 + 1, mine), whole):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("of", ["logits", "head", "best"])
def test_narrow_weights_are_summed_in_fp32(of: str) -> None:
    """bf16 weights, and fp32 ones under autocast, in many chunks: as near as bf16 products are to the fp64 ones."""
    labels = torch.arange(64) % 23
    exact = student(places=64)
    settings: Any = {"alpha": 0.5, "temperature": 1.0, "kind": "forward", "beta": 0.5}
    expected = gradients(plain(exact, teacher(of, places=64), labels, **settings), exact)
    theirs = teacher(of, places=64, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        mine = Headless(*(part.detach().to(dtype).requires_grad_() for part in exact))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found = headed(mine, theirs, labels, **settings, room=23 * 4 * 4)
        assert found.dtype == torch.float32
        for a, b, part in zip(gradients(found, mine), expected, mine):
            assert a.dtype == part.dtype
            assert float((a - b).norm() / b.norm()) < 2e-2


@pytest.mark.parametrize("of", ["logits", "head", "best"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_array_holds_all_places_and_words(of: str, kind: Divergence) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t))
            return out

    places, words = 256, 512
    mine, theirs = student(places, 8, words, torch.float32), teacher(of, places, words, dtype=torch.float32)
    room = 4 * words * 32
    with Watching():
        headed(mine, theirs, torch.arange(places), alpha=0.5, temperature=2.0, kind=kind, room=room).backward()
    assert max(sizes) <= 32 * words


def test_a_second_backward_pass_is_refused() -> None:
    mine = student()
    loss = headed(mine, teacher("logits"))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a backward pass for each loss"):
        loss.backward()


def test_it_is_what_the_losses_of_whole_logits_say_and_an_answer_of_no_probability_counts_none() -> None:
    mine, told = student(dtype=torch.float32), teacher("best", dtype=torch.float32)
    padded = Best(told.ids, told.logprobs.index_fill(1, torch.tensor([3]), -math.inf))
    logits = F.linear(*mine)
    for theirs in (told, padded):
        found, expected = headed(mine, theirs), kd_topk(logits, *theirs)
        slopes = [gradients(found, mine), torch.autograd.grad(expected, mine, retain_graph=True)]
        torch.testing.assert_close((found, *slopes[0]), (expected, *slopes[1]), rtol=1e-4, atol=1e-6)
        found, expected = (
            headed(mine, theirs, temperature=2.0, kind="jsd"),
            kd(logits, complete(*theirs, 23), 2.0, "jsd"),
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_rows_that_hang_together_have_the_gradients_of_whole_logits_and_few_are_made_at_once() -> None:
    """Each row is weighed by all: Σ_i (Σ_j m_j) m_i of two measures, from three rows of logits at a time."""
    made: list[int] = []
    goals = torch.randint(23, (7,), generator=torch.Generator().manual_seed(3))

    def measure(logits: torch.Tensor, part: slice) -> torch.Tensor:
        made.append(len(logits))
        told = logits.log_softmax(-1)
        return torch.stack([told.gather(-1, goals[part, None])[:, 0], told.exp().square().sum(-1)], -1)

    def total(each: torch.Tensor) -> torch.Tensor:
        return (each.sum(0).flip(0) * each).sum()

    one, other = student(), student()
    found = total(rowwise(one, measure, room=4 * 23 * 3))
    expected = total(rowwise(F.linear(other.hidden, other.weight, other.bias), measure))
    found.backward()
    expected.backward()
    assert made == [3, 3, 1, 7, *made[4:]] and sorted(made[4:]) == [1, 3, 3]
    torch.testing.assert_close(found, expected)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    none = Headless(one.hidden[:0], one.weight, one.bias)
    goals = goals[:0]
    assert rowwise(none, measure).shape == (0, 2)
