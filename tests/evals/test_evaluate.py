"""One call on any model: local ones of each architecture, and ones that give only probabilities or only text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sklearn.metrics import f1_score

import tiny
from lfm import models
from lfm.core.errors import AccessError, ConfigError, DataError
from lfm.core.interfaces import Codec, Gradients, Logits, Logprobs, Score, Text
from lfm.core.model import Facts, Model
from lfm.data.answers import begins_with
from lfm.data.files import digest
from lfm.data.records import Completion, Edit, Fact, Image, Label, Pair, kind_of
from lfm.data.records import Text as Running
from lfm.evals import Evaluation, compare, evaluate

TEXTS = [Running(text=text) for text in tiny.CORPUS]
FACTS = [
    Fact(subject="France", relation="capital", object="Paris", prompt="The capital of France is"),
    Fact(subject="Italy", relation="capital", object="Rome", prompt="The capital of Italy is"),
    Fact(subject="Ada", relation="job", object="a painter", prompt="Ada works as"),
    Fact(subject="Bo", relation="job", object="a dog", prompt="Bo works as"),
]
EDITS = [
    Edit(
        subject="France",
        relation="capital",
        object="Paris",
        new_object="Rome",
        prompt="The capital of France is",
        paraphrases=("The town of France is", "In France is"),
        neighbours=(("The capital of Germany is", "Berlin"), ("The capital of Italy is", "Rome")),
    ),
    Edit(subject="Ada", relation="job", object="painter", new_object="cat", prompt="Ada works as a"),
]
COMPLETIONS = [
    Completion(prompt="The cat sat on", completion=" the mat"),
    Completion(prompt="Q: What is two plus two? A:", completion=" four"),
]
NAMED = [Label(text=t, label=l) for t, l in zip(("so good", "so bad", "all is well"), ("happy", "sad", "happy"))]
LABELS = [Label(text=text, label=label) for text, label in zip(tiny.CORPUS, tiny.LABELS * 2)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in made:
            made[name] = models.load(getattr(tiny, name)(root / name))
        return made[name]

    return model


def fake(*, said: dict[str, str] | None = None, told: dict[tuple[str, str], float] | None = None) -> Model:
    """A model that says these texts and gives these log-probabilities (−9 a word for all else)."""

    class Said:
        def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
            return [(said or {}).get(prompt, "?") for prompt in prompts]

    class Told:
        def score(
            self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()
        ) -> list[Score]:
            found = []
            for prompt, answer in zip(prompts, continuations):
                words = answer.split()
                total = (told or {}).get((prompt, answer.strip()), -9.0 * len(words))
                found.append(Score(tuple(words), (total / len(words),) * len(words)))
            return found

        def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Any]:
            known = [(p, a.split()[0], v) for (p, a), v in (told or {}).items()]
            return [sorted(((a, v) for p, a, v in known if p == q), key=lambda x: -x[1])[:k] for q in prompts]

    gives: dict[type, Callable[[], Any]] = {}
    if said is not None:
        gives[Text] = Said
    if told is not None:
        gives[Logprobs] = Told
    return Model(ref="fake", kind="api", gives=gives, identify=lambda: "0" * 64)


def values(evaluation: Evaluation) -> dict[str, float]:
    return {name: metric.value for name, metric in evaluation.metrics.items()}


# ------------------------------------------------------------------------------------------ heads


def test_a_classifiers_metrics_are_scikit_learns(local: Callable[[str], Model]) -> None:
    model = local("classifier")
    found = evaluate(model, LABELS, batch_size=4)
    codec, asked = model.ask(Codec), model.ask(Logits)
    said = [tiny.LABELS[asked.logits(codec.texts([r.text])).argmax().item()] for r in LABELS]
    truth = [r.label for r in LABELS]
    assert found.metrics["accuracy"].value == pytest.approx(np.mean([s == t for s, t in zip(said, truth)]))
    assert found.metrics["macro_f1"].value == pytest.approx(f1_score(truth, said, average="macro"))
    assert [s.answer for s in found.samples] == said[:5]
    assert (found.access, found.kind, found.headline, found.records) == ("logits", "label", "accuracy", 6)


def test_images_are_classified(local: Callable[[str], Model]) -> None:
    records = [Image(image=np.full((8, 8), 25 * i, np.uint8), label=str(i)) for i in range(10)]
    found = evaluate(local("vit"), records)
    assert set(found.metrics) == {"accuracy", "macro_f1", "cross_entropy", "ece"}
    assert found.data == digest(records) and found.model == local("vit").digest


# ------------------------------------------------------------------------------------------ likelihood


def test_perplexity_and_bits_per_byte_are_those_of_the_models_own_loss(local: Callable[[str], Model]) -> None:
    model = local("causal")
    found = evaluate(model, TEXTS, batch_size=4)
    module: Any = model.ask(Gradients).module()
    tokenizer = model.ask(Codec).tokenizer
    loss, tokens, size = 0.0, 0, 0
    for text in tiny.CORPUS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        n = ids.shape[1] - 1
        loss, tokens, size = (
            loss + n * module(input_ids=ids, labels=ids).loss.item(),
            tokens + n,
            size + len(text.encode()),
        )
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert found.metrics["bits_per_byte"].value == pytest.approx(loss / math.log(2) / size, rel=1e-5)
    assert f"{tokens} tokens of the model's own tokenizer" in found.metrics["perplexity"].basis
    assert found.metrics["bits_per_byte"].basis == f"{size} bytes of UTF-8"


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
@pytest.mark.parametrize("records", [TEXTS, FACTS, EDITS, COMPLETIONS, NAMED], ids=lambda r: kind_of(r[0]))
def test_logits_and_logprobs_measure_alike(local: Callable[[str], Model], name: str, records: list) -> None:
    model = local(name)
    by_logits = evaluate(model.only([Logits, Codec, Logprobs]), records)
    by_logprobs = evaluate(model.only([Logprobs]), records)
    assert (by_logits.access, by_logprobs.access) == ("logits", "logprobs")
    shared = values(by_logits).keys() & values(by_logprobs).keys()
    assert len(shared) >= 1
    for metric in shared:
        assert by_logits.metrics[metric].value == pytest.approx(by_logprobs.metrics[metric].value, rel=1e-4), metric


def test_long_texts_are_read_in_pieces_and_said_to_be(local: Callable[[str], Model]) -> None:
    long = Running(text="the cat sat on the mat and the dog looked at the cat. " * 40)
    found = evaluate(local("causal"), [long, *TEXTS])
    assert any("longer than the model's context are read in pieces" in note for note in found.notes)
    assert f"{len(long.text) + sum(len(t.encode()) for t in tiny.CORPUS)} bytes" in found.metrics["bits_per_byte"].basis


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_completions_are_generated_and_scored(local: Callable[[str], Model], name: str) -> None:
    found = evaluate(local(name), COMPLETIONS)
    assert list(found.metrics) == ["exact_match", "forced_match", "perplexity"]


def test_a_completion_must_be_said_and_then_ended() -> None:
    first, second = (record.prompt for record in COMPLETIONS)
    assert values(evaluate(fake(said={first: "the mat \n", second: " fourteen"}), COMPLETIONS)) == {"exact_match": 0.5}
    told = evaluate(fake(told={(first, "the mat"): -2.0, (second, "four"): -4.0}), COMPLETIONS)
    assert values(told) == {"perplexity": pytest.approx(math.exp(6 / 3))}  # three words in all


def test_a_masked_model_is_measured_at_its_masks(local: Callable[[str], Model]) -> None:
    found = evaluate(local("masked"), TEXTS)
    assert list(found.metrics) == ["masked_perplexity"] and "15 %" in found.metrics["masked_perplexity"].basis
    with pytest.raises(AccessError, match="measured by logits alone"):
        evaluate(local("masked").only([Logprobs]), TEXTS)


# ------------------------------------------------------------------------------------------ classes in words


def test_classes_compete_by_the_likelihood_of_their_names(local: Callable[[str], Model]) -> None:
    records = [Label(text=t, label=l) for t, l in zip(("so good", "so bad", "all is well"), ("happy", "sad", "happy"))]
    model = local("causal")
    found = evaluate(model.only([Logits, Codec]), records)
    tokenizer, asked = model.ask(Codec).tokenizer, model.ask(Logits)
    said, loss = [], []
    for record in records:
        told = {}
        for name in ("happy", "sad"):
            prompt = tokenizer(record.text)["input_ids"]
            ids = tokenizer(f"{record.text} {name}", return_tensors="pt")["input_ids"]
            told_ids = asked.logits({"input_ids": ids})[0].log_softmax(-1)
            told[name] = sum(told_ids[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1]))
        said.append(max(told, key=lambda n: told[n]))
        top = max(told.values())
        loss.append(top + math.log(sum(math.exp(v - top) for v in told.values())) - told[record.label])
    assert found.metrics["accuracy"].value == pytest.approx(np.mean([s == r.label for s, r in zip(said, records)]))
    assert found.metrics["cross_entropy"].value == pytest.approx(np.mean(loss), rel=1e-4)
    assert any("compete as words" in note for note in found.notes)


def test_classes_by_log_probabilities_alone() -> None:
    told = {("so good", "happy"): -1.0, ("so good", "sad"): -2.0, ("so bad", "happy"): -1.5, ("so bad", "sad"): -3.0}
    records = [Label(text="so good", label="happy"), Label(text="so bad", label="sad")]
    found = values(evaluate(fake(told=told), records))
    assert found["accuracy"] == 0.5
    assert found["cross_entropy"] == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1.5))) / 2)


def test_classes_read_from_text_alone() -> None:
    said = {"so good": " happy!", "so bad": "happy", "well a": "unhappy"}
    records = [
        Label(text="so good", label="happy"),
        Label(text="so bad", label="sad"),
        Label(text="well a", label="happy"),
    ]
    found = evaluate(fake(said=said), records)
    assert found.access == "text" and found.metrics["accuracy"].value == pytest.approx(1 / 3)
    # happy: 1 hit, 1 false alarm, 1 miss; sad: 1 miss.
    assert found.metrics["macro_f1"].value == pytest.approx((2 / 4 + 0) / 2)
    assert "1 of 3 answers began with no class's name" in found.notes[0]
    pairs = [Pair(text="so", text_b="good", label="happy")]
    assert evaluate(fake(said=said), pairs).metrics["accuracy"].value == 1.0


# ------------------------------------------------------------------------------------------ facts and edits


def test_facts_rank_among_their_relations_objects() -> None:
    told = {
        ("The capital of France is", "Paris"): -1.0,
        ("The capital of France is", "Rome"): -2.0,
        ("The capital of Italy is", "Paris"): -1.0,
        ("The capital of Italy is", "Rome"): -2.0,
        ("Ada works as", "a painter"): -5.0,
        ("Ada works as", "a dog"): -6.0,
        ("Bo works as", "a painter"): -6.0,
        ("Bo works as", "a dog"): -5.0,
    }
    found = values(evaluate(fake(told=told), FACTS))
    assert found == {"p_at_1": 0.75, "p_at_10": 1.0, "mrr": pytest.approx((0.75 + 1.0) / 2)}
    said = {"Ada works as": " a painter.", "Bo works as": " a doghouse", "The capital of France is": "Parisian"}
    assert values(evaluate(fake(said=said), FACTS)) == {"exact_match": 0.25}


def test_an_edit_that_holds_and_harms_nothing_scores_one_throughout() -> None:
    said, told = {}, {}
    for edit in EDITS:
        for prompt in (edit.prompt, *edit.paraphrases):
            said[prompt] = f" {edit.new_object}."
            told |= {(prompt, edit.new_object): -0.1, (prompt, edit.object): -3.0}
        for prompt, answer in edit.neighbours:
            said[prompt] = f" {answer}."
            told |= {(prompt, answer): -0.1, (prompt, edit.new_object): -0.1 if answer == edit.new_object else -3.0}
    edits = [msgspec.structs.replace(EDITS[0], neighbours=EDITS[0].neighbours[:1]), EDITS[1]]
    found = evaluate(fake(said=said, told=told), edits)
    assert set(values(found).values()) == {1.0} and len(found.metrics) == 10
    assert found.metrics["efficacy"].n == 2 and found.metrics["paraphrase"].n == 1


def test_an_edit_is_scored_by_hand() -> None:
    edit = EDITS[0]
    told = {
        (edit.prompt, "Rome"): -1.0,
        (edit.prompt, "Paris"): -2.0,
        (edit.prompt, "Oslo"): -0.5,  # likelier than both: preferred, yet not said
        (edit.paraphrases[0], "Rome"): -1.0,
        (edit.paraphrases[0], "Paris"): -2.0,
        (edit.paraphrases[1], "Rome"): -3.0,
        (edit.paraphrases[1], "Paris"): -2.0,
        ("The capital of Germany is", "Berlin"): -1.0,
        ("The capital of Germany is", "Rome"): -0.5,
    }
    records = [msgspec.structs.replace(edit, neighbours=edit.neighbours[:1])]
    found = values(evaluate(fake(told=told), records))
    assert found == {
        "efficacy": 0.0,
        "efficacy_preferred": 1.0,
        "paraphrase": 0.5,
        "paraphrase_preferred": 0.5,
        "specificity": 0.0,
        "specificity_preferred": 0.0,
        "edit_score": 0.0,
    }


@pytest.mark.parametrize("name", ["causal", "masked", "seq2seq"])
def test_edits_are_measured_on_every_language_model(local: Callable[[str], Model], name: str) -> None:
    found = evaluate(local(name), EDITS)
    assert {"efficacy", "paraphrase", "specificity", "edit_score"} <= set(found.metrics)
    assert ("efficacy_generated" in found.metrics) == (name != "masked")
    for metric in found.metrics.values():
        assert 0 <= metric.low <= metric.value <= metric.high <= 1


def test_what_follows_from_an_edit_is_told_by_text_alone() -> None:
    """Two of three, one edit having both and the other one of its two: (1 + ½) / 2, over edits; they have no rival."""
    first, second = (
        msgspec.structs.replace(edit, paraphrases=(), neighbours=(), portability=pairs)
        for edit, pairs in zip(
            EDITS,
            ((("France's capital lies in", "Italy"),), (("Ada chases", "mice"), ("Ada says", "meow"))),
            strict=True,
        )
    )
    model = fake(said={"France's capital lies in": " Italy.", "Ada chases": " mice", "Ada says": " good day"}, told={})
    found = evaluate(model, [first, second], bootstrap=0).metrics
    assert found["portability_generated"].value == 0.75
    assert not {"portability", "portability_preferred"} & found.keys()


def test_the_first_choice_of_a_local_model_is_what_it_generates(local: Callable[[str], Model]) -> None:
    model = local("causal")
    tokenizer = model.ask(Codec).tokenizer
    prompt = "The capital of France is"
    token = model.ask(Logits).logits(model.ask(Codec).texts([prompt]))[0, -1].argmax().item()
    answer = tokenizer.decode([token]).strip()
    edit = Edit(subject="", relation="", object="Paris", new_object=answer, prompt=prompt)
    if tokenizer(f"{prompt} {answer}")["input_ids"][-1] == token:
        assert evaluate(model, [edit]).metrics["efficacy"].value == 1.0
    said = model.ask(Text).generate([prompt], max_tokens=1)[0]
    assert said.strip() == answer


# ------------------------------------------------------------------------------------------ the call itself


def test_one_seed_gives_one_evaluation_that_survives_its_file(local: Callable[[str], Model]) -> None:
    first = evaluate(local("causal"), FACTS, seed=3)
    assert evaluate(local("causal"), FACTS, seed=3) == first
    assert evaluate(local("causal"), FACTS, seed=3, batch_size=2).metrics == first.metrics
    assert msgspec.json.decode(msgspec.json.encode(first), type=Evaluation) == first


def test_only_what_is_asked_for_is_paid_for() -> None:
    model = fake(told={}, said={})
    assert list(evaluate(model, FACTS, metrics=["mrr"]).metrics) == ["mrr"]
    asked: list[tuple[int, int]] = []
    evaluate(model, FACTS, metrics=["exact_match"], progress=lambda done, total: asked.append((done, total)))
    assert asked[-1][0] <= asked[-1][1]
    with pytest.raises(ConfigError, match=r"no metric bleu for these fact records.*metrics: exact_match, mrr, p_at_1"):
        evaluate(model, FACTS, metrics=["bleu"])


def test_progress_is_told(local: Callable[[str], Model]) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(local("classifier"), LABELS, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_a_change_is_measured_on_the_same_records(local: Callable[[str], Model], tmp_path: Path) -> None:
    other = models.load(tiny.causal(tmp_path / "other", seed=1))
    found = compare(local("causal"), other, TEXTS)
    assert found.change["perplexity"].value == pytest.approx(
        found.after.metrics["perplexity"].value - found.before.metrics["perplexity"].value
    )
    same = compare(other, other, TEXTS).change["perplexity"]
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("model", "records", "says"),
    [
        (
            fake(said={}),
            TEXTS,
            "cannot be evaluated on text records.*needs logits with a codec or logprobs.*gives text",
        ),
        (fake(), FACTS, "needs logits with a codec or logprobs or text.*gives nothing"),
        (fake(said={}, told={}), [Image(image=b"", label="x")], "image records.*gives text, logprobs"),
    ],
)
def test_too_little_access_is_named(model: Model, records: list, says: str) -> None:
    with pytest.raises(AccessError, match=says):
        evaluate(model, records)


def test_an_encoder_is_not_evaluated(local: Callable[[str], Model]) -> None:
    with pytest.raises(AccessError, match="its task is encoder"):
        evaluate(local("encoder"), FACTS)


def test_records_must_be_there_and_of_one_kind() -> None:
    with pytest.raises(DataError, match="no records"):
        evaluate(fake(said={}), [])
    with pytest.raises(DataError, match="several kinds"):
        evaluate(fake(said={}), [FACTS[0], TEXTS[0]])


def test_logits_without_a_codec_are_not_enough() -> None:
    bare = Model("m", "module", {Logits: lambda: None}, lambda: "0" * 64, look=lambda: Facts(task="causal-lm"))
    with pytest.raises(AccessError, match="logits with a codec"):
        evaluate(bare, FACTS)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        (" Paris.", "Paris", True),
        ("Paris", " Paris", True),
        ("Parisian", "Paris", False),
        ("a painter and", "a painter", True),
        ("", "Paris", False),
        ("東京です", "東京", True),
        ("U.S.A.", "U.S.", True),
    ],
)
def test_an_answer_is_heard_as_whole_words(said: str, answer: str, right: bool) -> None:
    assert begins_with(said, answer) is right
