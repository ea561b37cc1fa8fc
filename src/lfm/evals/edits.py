"""Edits: did the fact change, does it hold when said otherwise, and is everything around it as it was.

efficacy, paraphrase, specificity: the wanted object is likelier than its rival and is the model's first choice. Wanted
is the new object on the edit's own prompt and its paraphrases, and the neighbour's own object on its neighbours.
…_preferred: likelier than its rival alone (the success scores of ROME, arXiv 2202.05262); edit_score is the harmonic
mean of these. …_generated: greedy text from the bare prompt begins with it, as whole words; nothing of the answer is
given away, as it is when each token is scored after the right ones before it. portability_generated: the same of what
follows from the new fact; it has no rival, and so is measured in text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from lfm.core.heavy import np
from lfm.core.interfaces import Logits, Text
from lfm.data.answers import begins_with, room
from lfm.data.facts import Question, log_probabilities
from lfm.data.records import Edit, Fact
from lfm.evals.estimate import Measure, harmonic_mean, mean
from lfm.evals.setting import Found, Sample, Setting


class Asked(NamedTuple):
    """One prompt of one edit: the object that it should have, and the rival that it should not."""

    edit: int
    prompt: str
    suffix: str
    wanted: str
    rival: str


def measure(setting: Setting) -> Found:
    """Efficacy, paraphrase and specificity of each edit, averaged over its prompts and then over edits."""
    edits = [cast("Edit", r) for r in setting.records]
    found = Found()
    preferred: list[Measure] = []
    for name, asked in _asked(edits).items():
        if not asked:
            continue
        rivalled = name != "portability"
        wanted = {key: rivalled and setting.wants(key) for key in (name, f"{name}_preferred", "edit_score")}
        if setting.access is not Text and any(wanted.values()):
            likelier = _likelier(setting, asked)
            basis = "the wanted object likelier than its rival"
            success = _averaged(f"{name}_preferred", asked, likelier, len(edits), basis)
            preferred.append(success)
            if wanted[name]:
                first, how = _first_choice(setting, asked)
                found.measures.append(_averaged(name, asked, likelier & first, len(edits), f"{basis}, and {how}"))
            if wanted[success.name]:
                found.measures.append(success)
        if setting.model.can(Text) and setting.wants(f"{name}_generated"):
            said = setting.said([a.prompt for a in asked], min(room([a.wanted for a in asked]), 64))
            hits = np.array([begins_with(s, a.wanted) for s, a in zip(said, asked, strict=True)])
            basis = "greedy text that begins with the wanted object, as whole words"
            found.measures.append(_averaged(f"{name}_generated", asked, hits, len(edits), basis))
            found.samples.extend(
                Sample(prompt=a.prompt, answer=s, expected=a.wanted)
                for a, s in zip(asked[: 1 if name == "paraphrase" else setting.samples], said, strict=False)
            )
    if len(preferred) == 3 and setting.wants("edit_score"):
        basis = "harmonic mean of the three _preferred"
        found.measures.append(harmonic_mean("edit_score", preferred, basis))
    return found


def _asked(edits: Sequence[Edit]) -> dict[str, list[Asked]]:
    return {
        "efficacy": [Asked(i, e.prompt, e.suffix, e.new_object, e.object) for i, e in enumerate(edits)],
        "paraphrase": [
            Asked(i, p, e.suffix, e.new_object, e.object) for i, e in enumerate(edits) for p in e.paraphrases
        ],
        "portability": [Asked(i, p, e.suffix, o, "") for i, e in enumerate(edits) for p, o in e.portability],
        "specificity": [Asked(i, p, e.suffix, o, e.new_object) for i, e in enumerate(edits) for p, o in e.neighbours],
    }


def _averaged(name: str, asked: Sequence[Asked], hits: Any, edits: int, basis: str) -> Measure:
    """The mean over an edit's prompts, then over the edits that have any."""
    owners = np.array([a.edit for a in asked])
    total = np.bincount(owners, weights=np.asarray(hits, dtype=np.float64), minlength=edits)
    count = np.bincount(owners, minlength=edits)
    return mean(name, np.where(count > 0, total / np.maximum(count, 1), np.nan), basis)


def _likelier(setting: Setting, asked: Sequence[Asked]) -> Any:
    pairs = [Question(a.prompt, a.suffix, (a.wanted, a.rival)) for a in asked]
    told = log_probabilities(setting.logprobs(), pairs, done=setting.done)
    return np.array([wanted > rival for wanted, rival in told])


def _first_choice(setting: Setting, asked: Sequence[Asked]) -> tuple[Any, str]:
    """Whether each token of the wanted object is the likeliest; its first, if the model tells only the next token."""
    if setting.access is Logits:
        facts = [Fact(subject="", relation="", object=a.wanted, prompt=a.prompt, suffix=a.suffix) for a in asked]
        task = setting.task_of(facts)
        hits = np.zeros(len(facts), dtype=bool)
        for places, logits, batch in setting.logits(task, facts):
            right = task.truth([facts[i] for i in places])
            hits[places] = [p == t for p, t in zip(task.predict(logits, batch), right, strict=True)]
        return hits, "each of its tokens the first choice"
    top = setting.logprobs().top([a.prompt for a in asked], 1, [a.suffix for a in asked])
    setting.done(len(asked))
    heard = [ranked[0][0].strip() if ranked else "" for ranked in top]
    hits = np.array([bool(h) and a.wanted.strip().startswith(h) for h, a in zip(heard, asked, strict=True)])
    return hits, "its first token the first choice"
