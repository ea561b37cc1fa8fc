"""On-policy distillation: the papers' losses and gradients written out, and what it is worth."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from lfm.core import Codec, Gradients, Inputs, Logits, Model
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import F
from lfm.core.method import check
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.task import task_for
from lfm.distilling import drawing
from lfm.distilling import lesson as lessons
from lfm.distilling.telling import HEAD, TOLD
from lfm.methods.distill import on_policy
from lfm.models import forward, load
from lfm.runs.run import LocalRun
from lfm.train import headed
from lfm.train.losses import kl

TEXTS = [data.Text(text=line) for line in tiny.CORPUS]
ASKED = [data.Completion(prompt=line[:20], completion=line[20:]) for line in tiny.CORPUS]
KINDS = ("gkd", "minillm", "speculative")


def distill(teacher: Model, student: Model, records: Any, work: Path, seed: int = 0, **settings: Any) -> Any:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)}, {"train": records})
    config = on_policy.Config(**({"steps": 20, "lr": 5e-3, "batch_size": 4, "new": 8, "prompt": 4} | settings))
    on_policy.agree(config, inputs)
    run = LocalRun(seed, work)
    made = on_policy.run(config, check("distill.on_policy", on_policy.METHOD, inputs), run)
    assert isinstance(made, Model)
    return made, run


def case(here: Path) -> Case:
    tiny.causal(here / "big", hidden_size=48)
    tiny.causal(here / "small", seed=1)
    write(TEXTS, here / "texts.jsonl")
    settings = {"steps": 4, "batch_size": 3, "checkpoint_every": 0.0, "kind": "speculative", "top": 5, "new": 6}
    return Case({"teacher": ("big",), "student": ("small",)}, {"train": "texts.jsonl"}, settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.causal(root / str(seed), seed=seed)
    return root


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_on_records_the_first_loss_is_the_papers_written_out(beta: float, root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "0"), load(root / "1")
    settings = {"steps": 1, "own": 0.0, "beta": beta, "temperature": 2.0, "precision": "fp32"}
    _, run = distill(teacher, student, TEXTS[:4], tmp_path, **settings)
    task = task_for(TEXTS[:4], student.ask(Codec), student.facts)
    batch = task.collate(TEXTS[:4])
    p, q = ((task.scored(m.ask(Logits).logits(batch), batch)[0] / 2).softmax(-1).double() for m in (teacher, student))
    m = beta * p + (1 - beta) * q
    terms = {0.0: p * (p / q).log(), 1.0: q * (q / p).log()}
    apart = terms.get(beta, beta * p * (p / m).log() + (1 - beta) * q * (q / m).log())
    assert run.notes["loss_before"] == pytest.approx(4 * apart.sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_has_nothing_to_say_against_itself(kind: str, root: Path, tmp_path: Path) -> None:
    model = load(root / "0")
    _, run = distill(model, model, TEXTS, tmp_path, steps=1, own=1.0, kind=kind)
    assert run.notes["loss_before"] == pytest.approx(0.0, abs=1e-5)


def test_minillms_loss_is_the_same_through_the_head_and_from_whole_logits(root: Path) -> None:
    """The teacher's logits and the student's, whole or made a few places at a time; the gradient too."""
    teacher, student = load(root / "0"), load(root / "1")
    lesson = lessons.lesson(TEXTS[:4], teacher, student)
    config = on_policy.Config(kind="minillm", temperature=2.0, heat=2.0)
    module = student.ask(Gradients).module()
    through = on_policy.policy(config, lesson, module)
    batch = lessons.behind(lesson, teacher, LocalRun(0, root / "run"))([0, 1, 2, 3])
    assert HEAD in batch
    rows, linear = list[int](), F.linear

    def traced(hidden: Any, weight: Any, bias: Any = None) -> Any:
        rows.extend([len(hidden)] * (len(weight) == student.facts.vocabulary))
        return linear(hidden, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(headed.ROOM, "cpu", 4 * student.facts.vocabulary * 5)
        patch.setattr(F, "linear", traced)
        loss = through(module, batch)
        loss.backward()
    assert rows and max(rows) == 5
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    patched = lambda module, batch: lesson.task.scored(forward(module, batch), batch)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_policy, "scoring", lambda *_: patched)
        plain = on_policy.policy(config, lesson, module)(module, batch)
        plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(found, [p.grad for p in module.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_minillms_estimate_is_the_gradient_of_the_sequences_divergence() -> None:
    """All pairs of two-token texts over three words, weighed by how likely they are drawn: ∇ KL(p_s ‖ p_t), exactly.

    Of two tokens the mean of what is to come is its sum, so here length normalisation changes nothing.
    """
    words, mix = 3, 0.3
    random = torch.Generator().manual_seed(0)
    first = torch.randn(words, generator=random, dtype=torch.float64, requires_grad=True)
    second = torch.randn(words, words, generator=random, dtype=torch.float64, requires_grad=True)
    theirs = [torch.randn(words, generator=random, dtype=torch.float64).log_softmax(-1)]
    theirs.append(torch.randn(words, words, generator=random, dtype=torch.float64).log_softmax(-1))
    texts = list(itertools.product(range(words), repeat=2))
    s1, s2 = first.log_softmax(-1), second.log_softmax(-1)
    whole = (s1[:, None] + s2).flatten()
    other = (theirs[0][:, None] + theirs[1]).flatten()
    expected = torch.autograd.grad((whole.exp() * (whole - other)).sum(), [first, second])

    labels = torch.full((2, 3), -100)
    found = [torch.zeros_like(first), torch.zeros_like(second)]
    for pair in itertools.product(texts, repeat=2):
        s = torch.stack([row for a, _ in pair for row in (first.log_softmax(-1), second.log_softmax(-1)[a])])
        t = torch.stack([row for a, _ in pair for row in (theirs[0], theirs[1][a])])
        said = torch.tensor([w for text in pair for w in text])
        labels[:, 1:] = said.reshape(2, 2)
        # drawn from the student: the weights p_s / p̃ are 1 with no mixture, and the estimate has no approximation
        chance = s.gather(-1, said[:, None]).sum().exp().item()
        one, other_one = (x.gather(-1, said[:, None])[:, 0] for x in (s, t))
        loss = on_policy.weighed((s.exp() * (s - t)).sum(-1), one, other_one, {"labels": labels}, 0.0)
        for into, part in zip(found, torch.autograd.grad(loss, [first, second]), strict=True):
            into += chance * 2 * part  # a mean over two tokens a text, of a loss that is their sum
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    # the weight of a token is p_s over the mixture that it is drawn from
    ours, its = torch.tensor([0.5]).log(), torch.tensor([0.9]).log()
    one = on_policy.weighed(torch.ones(1), ours, its, {"labels": torch.tensor([[-100, 0]])}, mix)
    assert one.item() == pytest.approx(0.5 / ((1 - mix) * 0.5 + mix * 0.9))


def test_what_is_to_come_is_a_mean_of_the_rest_less_the_others() -> None:
    places = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    got = on_policy.to_come(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), places)
    rests = ([3.0, 4.0], [16.0])  # (2 + 4)/2, 4 | 16; a row's last token has none to come
    expected = [rests[0][0] - 16.0, rests[0][1] - 16.0, 0.0, rests[1][0] - 3.5, 0.0, 0.0]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_in_narrow_precision_rewards_are_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    places = torch.rand(3, 400, generator=draw) > 0.2
    rewards = torch.randn(int(places.sum()), generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = on_policy.to_come(rewards, places)
    assert torch.equal(narrow, on_policy.to_come(rewards, places))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("records", [TEXTS, ASKED], ids=["text", "completion"])
def test_each_step_draws_anew_from_the_student_after_the_same_prompts(
    kind: str, records: Any, root: Path, tmp_path: Path
) -> None:
    """The batches that the teacher is asked about: prompts of the records, other words after them each time."""
    seen: list[Any] = []
    teacher, student = load(root / "0"), load(root / "1")
    logits = teacher.ask(Logits)

    class Listening:
        def logits(self, batch: Any) -> torch.Tensor:
            if on_policy.DRAWN in batch:
                seen.append(batch)
            return logits.logits(batch)

    spy = replace(teacher, gives={**teacher.gives, Logits: Listening}, _opened={})
    distill(spy, student, records, tmp_path, steps=3, own=1.0, kind=kind, batch_size=len(records), schedule="constant")
    assert len(seen) == 3
    plain = task_for(records, student.ask(Codec), student.facts).collate(records)
    begun = {tuple(row) for row in on_policy.prompts_of(plain, 4)}
    said = []
    for batch in seen:
        rows = [
            ([i for i, l in zip(ids, labels) if l == -100], [l for l in labels if l != -100])
            for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist())
        ]
        assert {
            tuple(ids[: len(ids) - (sum(m == 0 for m in mask))])
            for (ids, _), mask in zip(rows, batch["attention_mask"].tolist())
        } == begun
        assert all(1 <= len(words) <= 8 for _, words in rows)
        said.append(str([words for _, words in rows]))
    assert len(set(said)) == 3


def test_a_conversation_is_taken_up_at_its_last_turn() -> None:
    ignored = -100
    batch = {
        "input_ids": torch.tensor([[1, 5, 6, 7, 8, 9, 0], [1, 5, 6, 7, 8, 9, 4]]),
        "labels": torch.tensor([[ignored, ignored, 6, ignored, 8, 9, ignored], [ignored, 5, 6, 7, 8, 9, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1] * 7]),
    }
    assert on_policy.prompts_of(batch, 2) == [[1, 5, 6, 7], [1, 5]]
    assert on_policy.prompts_of(batch, 9) == [[1, 5, 6, 7], [1, 5, 6]]  # half of a text at most


def test_what_cannot_be_is_said_before_a_weight_is_read(root: Path, tmp_path: Path) -> None:
    other = tiny.masked(tmp_path / "masked")
    blind = {name: load(path).only((Codec,)) for name, path in (("causal", root / "0"), ("masked", other))}
    for name, what in (("masked", "says nothing of its own"),):
        inputs = Inputs({"teacher": (blind[name],), "student": (blind[name],)}, {"train": TEXTS})
        with pytest.raises(MismatchError, match=what):
            on_policy.agree(on_policy.Config(), inputs)
    inputs = Inputs({"teacher": (blind["causal"],), "student": (blind["causal"],)}, {"train": TEXTS})
    with pytest.raises(ConfigError, match="same value"):
        on_policy.agree(on_policy.Config(kind="minillm", heat=0.5), inputs)


def test_records_tokens_alone_need_no_teacher(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "0"), load(root / "1")

    class Silent:
        def logits(self, batch: Any) -> torch.Tensor:
            raise AssertionError("the teacher is asked")

    silent = replace(teacher, gives={**teacher.gives, Logits: Silent}, _opened={})
    alone: dict[str, Any] = {"own": 0.0, "alpha": 0.0, "steps": 4}
    one, _ = distill(teacher, student, TEXTS, tmp_path / "a", **alone)
    other, _ = distill(silent, student, TEXTS, tmp_path / "b", **alone)
    assert one.digest == other.digest


def test_what_is_made_is_saved_and_a_teacher_of_logits_alone_draws_the_same(root: Path, tmp_path: Path) -> None:
    """Keys and values kept, or all read again for each token: the same words, and so the same student."""
    teacher, student = load(root / "0"), load(root / "1")
    poor = replace(teacher, gives={k: v for k, v in teacher.gives.items() if k is not Gradients}, _opened={})
    settings = {"kind": "speculative", "top": 3, "own": 1.0, "steps": 3}
    made = [distill(t, student, TEXTS, tmp_path / str(i), **settings)[0] for i, t in enumerate((teacher, poor))]
    states = [m.ask(Gradients).module().state_dict() for m in made]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)
    (tmp_path / "out").mkdir()
    made[0].save(tmp_path / "out")
    assert load(tmp_path / "out").digest == made[0].digest
    assert TOLD not in states[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif("LFM_REAL_DATA" not in os.environ, reason="LFM_REAL_DATA is not set")
def test_what_it_says_of_itself_comes_nearer_to_its_teacher_than_by_records_alone(tmp_path: Path) -> None:
    """Two of a story model's five blocks, 100 steps on stories' own tokens, then 50 of each method from there.

    Judged as the paper would have it: on the student's own words after beginnings that it was not trained on, how far
    its answers are from its teacher's, KL(p_s ‖ p_t) a token.
    """
    root = Path(os.environ["LFM_REAL_DATA"])
    text = (root / "text" / "tinystories_slice.txt").read_text()
    parts = [data.Text(text=text[i : i + 300].partition(" ")[2]) for i in range(0, 165_000, 300)]
    train, test = parts[:400], parts[500:550]
    teacher = load(root / "models" / "stories260K")
    settings: dict[str, Any] = {"batch_size": 8, "prompt": 8, "new": 32}
    alone: dict[str, Any] = {"own": 0.0, "alpha": 0.0}
    base, _ = distill(teacher, teacher, train, tmp_path / "base", **settings, **alone, layers=2, steps=100, lr=2e-3)

    def apart(model: Model) -> float:
        module = model.ask(Gradients).module().eval()
        task = task_for(test, model.ask(Codec), model.facts)
        prompts = on_policy.prompts_of(task.collate(test), 8)
        speaker, noise = drawing.remembering(module), drawing.noise(0, range(len(prompts)), 64)
        with drawing.still(module):
            said = drawing.draw(prompts, drawing.alone(speaker, 512), noise, [64] * len(prompts), None)
            total = 0.0
            for prompt, words in zip(prompts, said, strict=True):
                batch = {"input_ids": torch.tensor([[*prompt, *words]])}
                both = (forward(module, batch), teacher.ask(Logits).logits(batch))
                s, t = (x[0, len(prompt) - 1 : -1].log_softmax(-1) for x in both)
                total += kl(s, t).mean().item()
        return total / len(prompts)

    found = {"base": apart(base)}
    ways: dict[str, dict[str, Any]] = {
        "tokens": alone,
        "records": {"own": 0.0, "beta": 0.0},
        "gkd": {"own": 1.0},
        "minillm": {"own": 1.0, "kind": "minillm"},
        "speculative": {"own": 1.0, "kind": "speculative"},
    }
    for name, more in ways.items():
        made, _ = distill(teacher, base, train, tmp_path / name, **settings, **more, steps=50, lr=1e-3)
        found[name] = apart(made)
    print({name: round(value, 3) for name, value in found.items()})
    assert all(found[name] < min(found["base"], found["tokens"]) for name in KINDS), found
    assert found["minillm"] < found["records"], found
