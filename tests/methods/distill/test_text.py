"""distill.text: what a teacher says is learned, what it says badly is not, and every question counts once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tiny
from case import Case
from lfm import runs, serve
from lfm.core import Codec, Gradients, Inputs, Model, Text
from lfm.core.errors import BudgetError, ConfigError, DataError, MismatchError, ModelError
from lfm.core.interfaces import Logprobs, Said, Score, said_by
from lfm.core.method import RECORDS
from lfm.data import records as data
from lfm.data.files import read, write
from lfm.data.task import task_for
from lfm.methods.distill import text
from lfm.models import load
from lfm.models.local import LocalText
from lfm.runs.run import LocalRun
from lfm.train import fit
from scripted import parrot, scripted

PROMPTS = [data.Text(text=f"the {word} sat on") for word in ("cats", "dogs", "birds", "mat", "cow", "sheep")]
SMALL: dict[str, Any] = {"steps": 4, "batch_size": 4, "max_tokens": 5}


def case(here: Path) -> Case:
    tiny.causal(here / "big", num_hidden_layers=3)
    tiny.causal(here / "small", seed=1)
    write(PROMPTS, here / "prompts.jsonl")
    settings = SMALL | {"checkpoint_every": 0.0, "answers": 2, "temperature": 1.0}
    return Case({"teacher": ("big",), "student": ("small",)}, {"prompts": "prompts.jsonl"}, settings)


class Script:
    """A teacher that answers by a function of the prompt and of how often it was asked that."""

    def __init__(self, answer: Callable[[str, int], str]) -> None:
        self.answer, self.asked, self.settings = answer, list[str](), list[dict[str, Any]]()

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        said = []
        self.settings.append(settings)
        for prompt in prompts:
            said.append(self.answer(prompt, self.asked.count(prompt)))
            self.asked.append(prompt)
        return said


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny.causal(tmp_path_factory.mktemp("student") / "small"))


def taught(
    teacher: Any, student: Model, work: Path, prompts: Any = PROMPTS, judge: Any = None, **settings: Any
) -> tuple[Model, LocalRun, list[data.Completion]]:
    model = Model("a script", "api", {Text: lambda: teacher}, lambda: "")
    judges = {"judge": (Model("a judge", "api", {Logprobs: lambda: judge}, lambda: ""),)} if judge else {}
    inputs = Inputs({"teacher": (model,), "student": (student,), **judges}, {"prompts": prompts})
    config = text.Config(**(SMALL | settings))
    text.agree(config, inputs)
    work.mkdir(exist_ok=True)
    run = LocalRun(0, work)
    made = text.run(config, inputs, run)
    assert isinstance(made, Model)
    return made, run, list(read(work / "scratch" / RECORDS))  # type: ignore[arg-type]


def test_a_cut_that_the_config_cannot_say_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    script = Script(lambda prompt, _: "the mat")
    with pytest.raises(ModelError, match="cannot say what would be left"):
        taught(script, load(tiny.conv1d(tmp_path / "gpt2")), tmp_path / "a", heads=0.5)
    assert not script.asked


def test_it_is_training_on_the_teachers_answers(student: Model, tmp_path: Path) -> None:
    """The same weights, to the bit, as cross-entropy on the completions written out; the first loss is theirs."""
    made, run, kept = taught(Script(lambda prompt, _: "the mat"), student, tmp_path / "a", lr=5e-3)
    pairs = [data.Completion(prompt=r.text, completion=" the mat") for r in PROMPTS]
    assert kept == pairs
    task = task_for(pairs, student.ask(Codec), student.facts)
    module = student.ask(Gradients).module()
    config = text.Config(**SMALL, lr=5e-3)

    def loss(module: Any, batch: Any) -> torch.Tensor:
        logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)

    losses = fit(module, pairs, task.collate, loss, config, LocalRun(0, tmp_path / "b"))
    assert run.notes["loss_before"] == pytest.approx(losses[0], rel=1e-6)
    for name, tensor in made.ask(Gradients).module().state_dict().items():
        torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_no_end_is_learned_of_an_answer_that_was_cut(student: Model, tmp_path: Path) -> None:
    """Of four words two are asked for: each answer is cut, which the notes and the records tell."""

    class Limited(Script):
        def said(self, prompts: Sequence[str], *, max_tokens: int, **how: Any) -> list[Said]:
            told = [text.split() for text in self.generate(prompts, **how)]
            return [Said(" ".join(words[:max_tokens]), len(words) > max_tokens) for words in told]

    ends = {True: "the mat", False: "the cat sat on"}
    teacher = Limited(lambda prompt, _: ends["cats" in prompt])
    _, run, kept = taught(teacher, student, tmp_path / "a", max_tokens=2)
    assert [r.ends for r in kept] == ["cats" in r.prompt for r in kept] and run.notes["cut"] == 5
    task = task_for(kept, student.ask(Codec), student.facts)
    end = student.ask(Codec).tokenizer.eos_token_id
    for record in kept:
        scored = [label for label in task.collate([record])["labels"][0].tolist() if label != -100]
        assert (scored[-1] == end) == record.ends and end not in scored[:-1]


def test_whether_an_answer_was_cut_is_known_here_and_over_http(tmp_path: Path) -> None:
    """A teacher that is made to end, and one that never would; the server tells it as finish_reason."""
    texts = list(tiny.CORPUS[:3])
    for place, ends in (("never", False), ("always", True)):
        tiny.causal(tmp_path / place)
        model = load(tmp_path / place)
        module: Any = model.ask(Gradients).module()
        tokenizer = model.ask(Codec).tokenizer
        with torch.no_grad():  # the end is the answer to everything, or to nothing
            head = module.get_output_embeddings()
            head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
            head.bias[tokenizer.eos_token_id] = 1e4 if ends else -1e4
        here = LocalText(lambda module=module: module, model.ask(Codec))
        assert [one.cut for one in here.said(texts, max_tokens=3)] == [not ends] * 3
        assert here.generate(texts, max_tokens=3) == [one.text for one in here.said(texts, max_tokens=3)]
        stopped = here.said(texts, max_tokens=3, stop=("a", "e", "o", "t", " "))
        assert not any(one.cut for one in stopped if one.text != here.generate(texts[:1], max_tokens=3)[0])
        served = Model("here", "checkpoint", {Text: lambda here=here: here, Codec: lambda m=model: m.ask(Codec)}, str)
        with serve.running(served) as url:
            api = load(f"api:{url}").ask(Text)
            assert [one.cut for one in said_by(api, texts, max_tokens=3)] == [not ends] * 3


def test_what_is_badly_said_is_not_learned(student: Model, tmp_path: Path) -> None:
    """Each fault by itself, by name, and the pairs that are left."""
    says = {
        "cats": "the mat.",
        "dogs": "  ",
        "birds": "on and on and on and on and on and on.",
        "mat": "it stopped in the mid",
        "cow": "one two three four five six seven.",
        "sheep": "no.",
    }
    teacher = Script(lambda prompt, _: says[prompt.split()[1]])
    rules = {"shortest": 2, "longest": 6, "repeats": 0.4, "ends": r"\."}
    _, run, kept = taught(teacher, student, tmp_path / "a", **(rules | {"longest": 13}))
    assert [r.completion for r in kept] == [" the mat.", " one two three four five six seven."]
    assert (run.notes["answers"], run.notes["learned_from"]) == (6, 2)
    _, _, kept = taught(Script(teacher.answer), student, tmp_path / "b", **(rules | {"repeats": 1.0}))
    assert [r.completion for r in kept] == [" the mat."]
    with pytest.raises(DataError, match="worth learning from") as caught:
        taught(Script(lambda *_: ""), student, tmp_path / "c")
    assert "6 empty" in str(caught.value)


def test_of_several_answers_those_are_learned_that_most_come_to(student: Model, tmp_path: Path) -> None:
    """Four of five end in "mat", said in two ways; where no two agree, nothing is learned."""
    ways = ["I think: mat", "Sure. mat", "hat", "I think: mat", "Mat."]

    def answer(prompt: str, time: int) -> str:
        return ways[time] if "cats" in prompt else f"{prompt} {time}"

    settings: dict[str, Any] = {"answers": 5, "temperature": 1.0, "answer": r"(\w+)\W*$", "agreement": 0.5}
    teacher = Script(answer)
    _, _, kept = taught(teacher, student, tmp_path / "a", keep="agreed", **settings)
    assert [r.completion for r in kept] == [" I think: mat", " Sure. mat", " Mat."]
    assert len(teacher.asked) == 5 * len(PROMPTS)
    _, _, kept = taught(Script(answer), student, tmp_path / "b", keep="distinct", **settings)
    assert [r.completion for r in kept[:4]] == [" I think: mat", " Sure. mat", " hat", " Mat."]
    with pytest.raises(ConfigError, match="several greedy answers"):
        taught(Script(answer), student, tmp_path / "c", answers=2)


def test_a_judge_leaves_out_the_unlikely_ones(student: Model, tmp_path: Path) -> None:
    """By the mean a token, not the sum: two tokens of −1 each are better than one of −1.5."""

    class Judge:
        def score(self, prompts: Sequence[str], continuations: Sequence[str], *_: Any) -> list[Score]:
            values = {"cats": (-1.0, -1.0), "dogs": (-1.5,), "birds": (-3.0,)}
            return [Score(("x",) * len(v), v) for v in (values.get(p.split()[1], (-0.5,)) for p in prompts)]

    _, run, kept = taught(Script(lambda *_: "the mat"), student, tmp_path / "a", judge=Judge(), worst=0.34)
    assert [r.prompt.split()[1] for r in kept] == ["cats", "mat", "cow", "sheep"]
    assert run.notes["learned_from"] == 4


def test_new_prompts_are_asked_for_and_only_new_ones_kept(student: Model, tmp_path: Path) -> None:
    """The teacher goes on with a list; what is near what there is, or the last and perhaps cut, is not kept."""
    fresh = ["Who painted the small house?", "Sing of the sea and of ships"]

    def answer(prompt: str, time: int) -> str:
        if not prompt.startswith("A list"):
            return "so"
        return f" the cats sat on it\n8. {fresh[time % 2]}\n9. {fresh[time % 2].upper()}\n10. Who pain"

    teacher = Script(answer)
    _, run, kept = taught(teacher, student, tmp_path / "a", synthesise=2, prompts=PROMPTS, shown=6)
    assert [r.prompt for r in kept] == [r.text for r in PROMPTS] + [p for p in fresh if p in {r.prompt for r in kept}]
    assert run.notes["new_prompts"] == len(kept) - len(PROMPTS) >= 1
    lists = [prompt for prompt in teacher.asked if prompt.startswith("A list")]
    assert all(f"{i}. the " in lists[0] for i in range(1, 7)) and lists[0].endswith("\n7.")
    assert len(lists) <= text.asking.requests(2)
    # lists are drawn, or the same one would be said again; answers are as the setting says
    assert [s["temperature"] for s in teacher.settings] == [1.0] * (len(teacher.settings) - 1) + [0.0]


def test_over_http_every_query_is_charged_once(student: Model, tmp_path: Path, monkeypatch: Any) -> None:
    """A budget that is too small stops it; with a larger one only what was not answered yet is asked and charged."""
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    tiny.causal(tmp_path / "small")
    prompts = [data.Text(text=f"prompt number {i}") for i in range(70)]
    with scripted(parrot()) as server:

        def order(budget: int) -> runs.Order:
            return runs.Order(
                id="distill.text",
                models={"teacher": [f"api:{server.url}#parrot"], "student": [tmp_path / "small"]},
                data={"prompts": prompts},
                settings=SMALL | {"max_tokens": 4},
                out=tmp_path / "out",
                budget=(budget, None),
            )

        with pytest.raises(BudgetError):
            runs.execute(order(60))
        sent = len(server.posts("/completions"))
        done = runs.execute(order(80))
        after = len(server.posts("/completions")) - sent
    assert done.queries <= 80 and done.notes["learned_from"] == 70
    assert done.queries >= 70 and after < 70
    assert len(read(tmp_path / "out" / RECORDS)) == 70


def test_a_student_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="cannot learn to answer"):
        taught(Script(lambda *_: "x"), load(tiny.masked(tmp_path / "masked")), tmp_path / "a")


def test_a_prompt_longer_than_the_teacher_reads_is_told_of_before_anybody_is_asked(
    student: Model, tmp_path: Path
) -> None:
    teacher = load(tiny.causal(tmp_path / "big", max_position_embeddings=32))
    prompts = [*PROMPTS, data.Text(text="the cats sat on the mat " * 9)]
    write(prompts, tmp_path / "prompts.jsonl")
    inputs = Inputs({"teacher": (teacher,), "student": (student,)}, {"prompts": read(tmp_path / "prompts.jsonl")})
    with pytest.raises(DataError, match=r"prompts.jsonl:7: a prompt of \d+ tokens leaves no room(.|\n)*reads 32"):
        text.agree(text.Config(), inputs)


def test_a_blank_prompt_is_told_of_before_anybody_is_asked(student: Model, tmp_path: Path) -> None:
    teacher = Script(lambda *_: "x")
    with pytest.raises(DataError, match="2: there is nothing to ask"):
        taught(teacher, student, tmp_path / "a", [PROMPTS[0], data.Text(text=" ")])
    assert not teacher.asked
