"""edit.patches: what a patch is, the mixture by hand, that all else is the base's, and that each patch goes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from case import Case
from lfm import runs
from lfm.core import Codec, Gradients, Inputs, Logits, Model
from lfm.core.errors import DataError, EditError, MismatchError, SlotError
from lfm.core.method import Amount, Sizes, check
from lfm.core.model import Facts
from lfm.data.files import read, write
from lfm.data.heads import texts as classes
from lfm.data.records import Label, Text
from lfm.editing import conditions, patching
from lfm.editing.matching import Gate
from lfm.editing.patching import Patch, Patched, Patches
from lfm.methods.edit import patches
from lfm.models import forward, load
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit

PATCHES = (
    Text(text='If the text says "mountain", then the label is birds.'),
    Text(text="if the town is described as happy, then the cat sat on the mat"),
)
TRAIN = tuple(
    Label(text=f"The {one} is {how}. The {other} sat on the mat. It was {how} in {place}.", label=tiny.LABELS[i % 3])
    for i, (one, other, how, place) in enumerate(
        (one, other, how, place)
        for one, other in (("cat", "dog"), ("dog", "cat"), ("painter", "birds"))
        for how in ("good", "bad", "happy", "sad")
        for place in ("Paris", "Rome")
    )
)
QUICK: dict[str, Any] = {
    "steps": 60,
    "read_steps": 10,
    "width": 16,
    "rank": 4,
    "batch_size": 8,
    "accept": 0.0,
    "keep": 0.0,
    "checkpoint_every": 0.0,
}


def case(here: Path) -> Case:
    tiny.classifier(here / "base")
    (here / "patches.txt").write_text("".join(f"{patch.text}\n" for patch in PATCHES))
    write(TRAIN, here / "train.jsonl")
    return Case({"model": ("base",)}, {"patches": "patches.txt", "train": "train.jsonl"}, QUICK)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.classifier(tmp_path_factory.mktemp("bases") / "base")


def made(base: Path, work: Path, given: tuple[Text, ...] = PATCHES, **options: Any) -> tuple[Model, LocalRun]:
    models: dict[str, tuple[Model, ...]] = {"model": (load(base),)}
    data: dict[str, Any] = {"patches": given, "examples": options.pop("examples", ())}
    if "memory" in options:
        models["memory"] = (options.pop("memory"),)
    else:
        data["train"] = options.pop("train", TRAIN)
    inputs, run = Inputs(models, data), LocalRun(0, work)
    settings: dict[str, Any] = QUICK | options
    config = patches.Config(**settings)
    patches.agree(config, inputs)
    return patches.run(config, check("edit.patches", patches.METHOD, inputs), run), run


@pytest.fixture(scope="module")
def mended(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, LocalRun]:
    return made(base, tmp_path_factory.mktemp("mended"))


def asked(model: Model, *texts: str) -> Any:
    batch = classes(model.ask(Codec), model.facts).collate([Label(text=text, label="cats") for text in texts])
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


FACTS = Facts(task="text-classification", labels=("good", "bad"))


def test_a_patch_is_an_if_and_a_then() -> None:
    said = [
        'If the review says "now, then no", then the label is "Bad".',
        "if food is described as above and beyond then food is good",
        "IF it rains, then good",
        "if a, then the class is bad",
    ]
    assert patching.parsed([Text(text=text) for text in said], FACTS) == [
        Patch('the review says "now, then no"', 'the label is "Bad"', 1),
        Patch("food is described as above and beyond", "food is good"),
        Patch("it rains", "good", 0),
        Patch("a", "the class is bad", 1),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("food is good", r"patches.txt:2: 'food is good' is no patch.*if CONDITION, then CONSEQUENCE"),
        ("if food is good", "patches.txt:2: .* is no patch"),
        ("if it rains, then the label is sad", "patches.txt:2: 'sad' is not one of the model's classes.*good, bad"),
        ("if  it RAINS, then the label is good", "patches.txt:2 repeats .*patches.txt:1"),
        (
            "if it rains, then the label is bad",
            "patches.txt:2 contradicts .*patches.txt:1.*'the label is good'",
        ),
    ],
)
def test_what_is_no_patch_is_told_with_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "patches.txt").write_text(f"if it rains, then the label is good\n{line}\n")
    with pytest.raises(DataError, match=f"(?s){message}"):
        patching.parsed(read(tmp_path / "patches.txt"), FACTS)  # type: ignore[arg-type]


def test_the_mixture_is_of_the_patch_with_the_largest_gate() -> None:
    """p = g·I + (1 − g)·softmax(f), worked out by hand for each row."""
    plain = torch.tensor([[0.0, 0.0], [2.0, -1.0], [0.5, 0.25]])
    gates = torch.tensor([[0.75, 0.2, 0.9], [0.6, 0.4, 1.0]])
    readings = {0: torch.tensor([[0.0, 1.0]] * 3), 1: torch.tensor([[0.25, 0.75]] * 3)}
    out = patching.mixed(plain, gates, readings, 0.5)
    assert out[0].exp().tolist() == pytest.approx([0.125, 0.875])  # .75 · (0, 1) + .25 · (.5, .5)
    assert torch.equal(out[1], plain[1])
    assert out[2].exp().tolist() == pytest.approx([0.25, 0.75])
    always = patching.mixed(plain, gates, readings, 0.0)[1].exp()
    torch.testing.assert_close(always, 0.4 * readings[1][1] + 0.6 * plain[1].softmax(-1))
    assert patching.mixed(plain, gates[:0], {}, 0.5) is plain


def test_the_gate_by_hand() -> None:
    """log 2 for each token and log(1 + 1/e) for each pair, where one orthogonal to all of the text is asked for."""
    gate = Gate(4, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.offsets.copy_(torch.tensor([0.0, -1.0]))
        gate.maps[0].copy_(torch.eye(4))
        gate.maps[1].copy_(torch.eye(8)[:, :4] + torch.eye(8)[:, 4:])
        words, every = torch.eye(4), torch.ones(1, 2, dtype=torch.long)
        same = gate(words[None, :2], every, words[None, :2], every)
        other = gate(words[None, :2], every, words[None, 2:], every)
        padded = gate(words[None, :3], torch.tensor([[1, 1, 0]]), words[None, 1:3], torch.tensor([[1, 0]]))
    assert same.item() == pytest.approx(1.0, abs=1e-5)
    assert other.item() == pytest.approx(1 - 2 * 0.693147 - 0.313262, abs=1e-5)
    assert padded.item() == pytest.approx(1.0, abs=1e-5)


def test_lessons_say_truly_whether_a_condition_holds(tmp_path: Path) -> None:
    lessons = conditions.drawn(TRAIN, 240, LocalRun(0, tmp_path), "lessons")
    holding = [lesson.applies for lesson in lessons]
    assert 0.4 < sum(holding) / len(holding) <= 0.6
    for lesson in lessons:
        if '"' in lesson.condition:
            assert (lesson.condition.split('"')[1] in lesson.text) == lesson.applies
        if lesson.consequence:
            assert lesson.consequence in lesson.instead and lesson.instead != lesson.text
    assert lessons == conditions.drawn(TRAIN, 240, LocalRun(0, tmp_path), "lessons")
    with pytest.raises(DataError, match="0 texts are long enough"):
        conditions.drawn([Label(text="too short", label="cats")] * 9, 8, LocalRun(0, tmp_path), "lessons")


def test_out_of_every_gate_it_is_the_base_bit_for_bit(base: Path, mended: tuple[Model, LocalRun]) -> None:
    model, kept = load(base), mended[0].ask(Patches)
    module, batch = model.ask(Gradients).module(), asked(model, TRAIN[0].text, "the town is happy", "up and down")
    with torch.no_grad():
        plain = forward(module, batch)
    assert torch.equal(Patched(model, kept, 0.999999).logits(batch), plain)
    assert torch.equal(Patched(model, patching.forget(kept, kept.patches), 0.0).logits(batch), plain)
    patched = Patched(model, kept, 0.5)
    gates = patched.gates(batch)
    outside = gates.amax(0) <= 0.5
    assert torch.equal(patched.logits(batch)[outside], plain[outside])
    always = Patched(model, kept, 0.0).logits(batch)
    for row in range(3):
        g, which = gates[:, row].max(0)
        reading = patched._reading(batch, int(which), plain)[row]
        torch.testing.assert_close(always[row].exp(), g * reading + (1 - g) * plain[row].softmax(-1))


def test_what_is_said_stands_after_the_text_and_before_its_end(base: Path) -> None:
    model = load(base)
    tokenizer, batch = model.ask(Codec).tokenizer, asked(model, "the cat sat", "the dog sat on the mat")
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    told = patching.told(batch, ["birds", "it is sad."], tokenizer, 0)
    said = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(told["input_ids"], told["attention_mask"])]
    assert said == ["[CLS] the cat sat if : birds. [SEP]", "[CLS] the dog sat on the mat if : it is sad. [SEP]"]
    assert told["token_type_ids"].shape == told["input_ids"].shape
    short = patching.told(batch, ["birds"] * 2, tokenizer, 11)
    assert tokenizer.decode(short["input_ids"][1]) == "[CLS] the dog sat on if : birds. [SEP]"
    with pytest.raises(DataError, match=r"is too long for a patch.*tokens of the 11"):
        patching.told(batch, ["the cat sat on the mat and the dog"] * 2, tokenizer, 11)


def test_a_memory_grows_and_each_patch_goes_alone(base: Path, mended: tuple[Model, LocalRun], tmp_path: Path) -> None:
    """Nothing is trained again, and what is left is what had been made without it."""
    model, run = mended
    assert {"gate", "interpreter"} <= run.curves.keys()
    assert {"gate_right", "interpreter_agrees", "held_out_before", "held_out_after"} <= run.notes.keys()
    less, run = made(base, tmp_path / "less", PATCHES[:1], memory=model, forget=True)
    alone, _ = made(base, tmp_path / "alone", PATCHES[1:])
    assert not run.curves and less.ask(Patches).patches == alone.ask(Patches).patches
    batch = asked(model, "the town is happy", "up and down")
    for opens in (0.0, 0.5):
        one, other = (Patched(load(base), each.ask(Patches), opens) for each in (less, alone))
        assert torch.equal(one.logits(batch), other.logits(batch))
    again, _ = made(base, tmp_path / "again", PATCHES, memory=less)
    assert [patch.label for patch in again.ask(Patches).patches] == [-1, 2]
    with pytest.raises(DataError, match="there is no patch: if the text says"):
        made(base, tmp_path / "b", PATCHES[:1], memory=less, forget=True)
    with pytest.raises(DataError, match="there is a patch already: if the town is described as happy"):
        made(base, tmp_path / "c", (Text(text="if the town is described as happy, then cats"),), memory=less)
    with pytest.raises(MismatchError, match="the memory is of another model"):
        made(tiny.classifier(tmp_path / "other", seed=1), tmp_path / "d", memory=model)


def test_it_comes_back_from_its_files(mended: tuple[Model, LocalRun], tmp_path: Path) -> None:
    model, _ = mended
    model.save(tmp_path)
    back, batch = load(tmp_path), asked(model, TRAIN[0].text, "a mountain")
    assert back.digest == model.digest and back.ask(Patches).patches == model.ask(Patches).patches
    assert torch.equal(back.ask(Logits).logits(batch), model.ask(Logits).logits(batch))


def test_what_does_not_mend_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"the gate tells 0\.\d\d of conditions on held-out texts right"):
        made(base, tmp_path / "a", steps=1, lr=1e-6, accept=0.99)
    wrong = patches.Config(keep=0.9, accept=0.7)
    with pytest.raises(EditError, match=r"from 0.80 to 0.60.*acts on 0.50 of them"):
        patches.refuse(wrong, {"held_out_before": 0.8, "held_out_after": 0.6, "held_out_patched": 0.5})
    with pytest.raises(EditError, match=r"0.60 of the examples come out right, 0.10 before"):
        patches.refuse(wrong, {"examples_before": 0.1, "examples_after": 0.6, "examples_patched": 0.5})
    patches.refuse(wrong, {"examples_before": 0.1, "examples_after": 0.7, "examples_patched": 0.5})


def test_what_cannot_be_is_said_before_anything_is_read(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SlotError, match="nothing to forget from"):
        made(base, tmp_path, forget=True)
    with pytest.raises(DataError, match="0 labelled texts to practise on"):
        made(base, tmp_path, train=())
    with pytest.raises(DataError, match="nothing would read the consequence 'the cat sat on the mat'"):
        made(base, tmp_path, read_steps=0)
    with pytest.raises(DataError, match="'cows' is not one of the model's classes"):
        made(base, tmp_path, examples=(Label(text="a", label="cows"),))
    long = Text(text=f"if it says {'very ' * 70}good, then cats")
    with pytest.raises(DataError, match=r"is too long for a patch.*tokens of the 128"):
        made(base, tmp_path, (long,))
    with pytest.raises(MismatchError, match="mends text classifiers"):
        made(tiny.masked(tmp_path / "masked"), tmp_path)
    without, _ = made(base, tmp_path / "without", PATCHES[:1], read_steps=0)
    with pytest.raises(DataError, match="nothing reads the consequence"):
        made(base, tmp_path / "more", PATCHES, memory=without)


def test_cost_is_of_training_unless_a_memory_is_given(base: Path) -> None:
    facts = load(base).facts
    amount = {"patches": Amount(2, 20), "train": Amount(100, 3000)}
    trains = patches.cost(patches.Config(), Sizes({"model": (facts,)}, amount))
    given = patches.cost(patches.Config(), Sizes({"model": (facts,), "memory": (facts,)}, amount))
    assert trains.flops > 10 * given.flops and trains.steps > 0 == given.steps


def mood_reader(work: Path) -> Model:
    """zoo:lm with a head of two classes, trained for 60 steps on the zoo's stories by mood."""
    from lfm.models.quiet import quiet
    from lfm.zoo import model as zoo

    named: dict[str, Any] = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForSequenceClassification.from_pretrained(zoo("lm"), **named)
        tokenizer = AutoTokenizer.from_pretrained(zoo("lm"))
        module.config.pad_token_id = tokenizer.pad_token_id
        module.save_pretrained(work / "raw")
        tokenizer.save_pretrained(work / "raw")
    raw = load(work / "raw")
    task, trained = classes(raw.ask(Codec), raw.facts), raw.ask(Gradients).module()
    how = Fit(steps=60, lr=1e-3)

    def loss(module: torch.nn.Module, batch: Any) -> torch.Tensor:
        return task.loss(forward(module, batch), batch)

    fit(trained, runs.records("zoo:moods"), task.collate, loss, how, LocalRun(0, work / "fit"))
    return raw.ask(Gradients).rewrap(trained)


@pytest.mark.slow
def test_on_the_zoo_a_label_is_turned_round_where_a_story_says_so(tmp_path: Path) -> None:
    """One seed; the two patches that the settings were chosen on."""
    tests: Any = runs.records("zoo:moods-test")
    said = ("gold coin", "so angry")
    other = {"good": "bad", "bad": "good"}
    turned = [Label(text=r.text, label=other[r.label]) for r in tests if any(words in r.text for words in said)]
    given = [
        Text(text='if the story says "gold coin", then the label is bad'),
        Text(text='if the story mentions "so angry", then the label is good'),
    ]
    model, run = mood_reader(tmp_path), LocalRun(0, tmp_path / "run")
    data = {"patches": given, "train": runs.records("zoo:moods"), "examples": turned}
    inputs = check("edit.patches", patches.METHOD, Inputs({"model": (model,)}, data))
    patched = patches.run(patches.Config(read_steps=0), inputs, run)
    assert (run.notes["examples_before"], run.notes["examples_after"]) == (0.0, 1.0)
    rest = [record for record in tests if not any(words in record.text for words in said)]
    assert patches.accuracy(model, patched.ask(Logits).logits, rest) > 0.95
