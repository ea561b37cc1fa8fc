"""Running text and completions: perplexity, bits per byte, and whether the completion is what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lfm.core.errors import AccessError
from lfm.core.heavy import np
from lfm.core.interfaces import Codec, Logits, Text
from lfm.data.answers import room, same
from lfm.data.language import halves
from lfm.data.records import Chat, Completion, Record
from lfm.data.records import Text as Running
from lfm.data.task import fit
from lfm.evals.estimate import Measure, mean, ratio
from lfm.evals.scoring import losses
from lfm.evals.setting import Found, Sample, Setting

if TYPE_CHECKING:
    pass

CONTINUED = 32
"""Tokens of a sample's continuation."""


def measure(setting: Setting) -> Found:
    """Text: perplexity and bits per byte. Completions: exact match of what is generated, and their perplexity.
    Conversations: the perplexity of the assistant's turns."""
    return _text(setting) if isinstance(setting.records[0], Running) else _completions(setting)


def _text(setting: Setting) -> Found:
    texts = [cast("Running", r).text for r in setting.records]
    found = Found()
    if setting.access is Logits:
        loss, tokens, bytes_ = _text_by_logits(setting, texts, found.notes)
    else:
        if setting.model.facts.task == "masked-lm":
            raise AccessError(
                "a masked model's texts are measured by logits alone",
                why="its log-probabilities are of what fills a blank",
            )
        split = halves if setting.model.facts.task == "seq2seq-lm" else _whole
        given, asked = zip(*map(split, texts), strict=True)
        scores = setting.logprobs().score(given, asked)
        setting.done(len(texts))
        loss = np.array([-s.total for s in scores])
        tokens = np.array([len(s.logprobs) for s in scores])
        bytes_ = np.array([len(t.encode()) for t in asked])
    task = setting.model.facts.task
    masked = task == "masked-lm"
    basis = {
        "masked-lm": "a masked token, 15 % of each text masked at once",
        "seq2seq-lm": "a token of each text's second half, given its first",
    }.get(task, "a token")
    basis += f"; {int(tokens.sum())} tokens of the model's own tokenizer"
    made = [_perplexity("masked_perplexity" if masked else "perplexity", loss, tokens, basis)]
    if not masked:
        halved = " of the second halves" if task == "seq2seq-lm" else ""
        made.append(
            ratio("bits_per_byte", loss / np.log(2), bytes_, basis=f"{int(bytes_.sum())} bytes of UTF-8{halved}")
        )
    found.measures.extend(m for m in made if setting.wants(m.name))
    if setting.model.can(Text) and setting.samples:
        openings = [_opening(text) for text in texts[: setting.samples]]
        for opening, said in zip(openings, setting.said(openings, CONTINUED), strict=True):
            found.samples.append(Sample(prompt=opening, answer=said))
    return found


def _text_by_logits(setting: Setting, texts: Sequence[str], notes: list[str]) -> tuple[Any, Any, Any]:
    """Summed losses, scored tokens and bytes (n,) of each text, long ones read in pieces."""
    codec, facts = setting.model.ask(Codec), setting.model.facts
    pieces: list[Record] = []
    owner: list[int] = []
    for i, record in enumerate(setting.records):
        parts = fit([record], codec, facts)
        pieces += parts
        owner += [i] * len(parts)
    if len(pieces) > len(texts):
        notes.append(
            f"{len(pieces) - len(texts)} cuts: texts longer than the model's context are read in pieces, "
            "each without what came before it"
        )
    task = setting.task_of(pieces)
    loss, tokens, _ = losses(setting, task, pieces)
    scored = np.array([_scored_bytes(cast("Running", p).text, codec.tokenizer, facts.task) for p in pieces])
    whole = [np.zeros(len(texts)) for _ in range(3)]
    for total, part in zip(whole, (loss, tokens, scored), strict=True):
        np.add.at(total, owner, part)
    return whole[0], whole[1], whole[2]


def _scored_bytes(text: str, tokenizer: Any, task: str) -> int:
    """The bytes of the text that its scored tokens spell: not its first token's where no opening token comes before."""
    if task == "seq2seq-lm":
        return len(halves(text)[1].encode())
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    opened = bool(encoded["special_tokens_mask"] and encoded["special_tokens_mask"][0])
    return len(text.encode()) if opened or not text else len(text[encoded["offset_mapping"][0][1] :].encode())


def _completions(setting: Setting) -> Found:
    records = [cast("Completion", r) for r in setting.records]
    found = Found()
    chats = isinstance(records[0], Chat)
    what = "turn" if chats else "completion"
    generates = not chats and setting.model.can(Text) and setting.wants("exact_match")
    if generates:
        lines = any("\n" in r.completion.strip() for r in records)
        stop = () if lines else ("\n",)
        limit = min(room([r.completion for r in records]), 256)
        said = setting.said([r.prompt for r in records], limit, stop)
        hits = [same(s, r.completion) for s, r in zip(said, records, strict=True)]
        basis = "greedy text up to " + ("its end" if lines else "a line's end")
        found.measures.append(mean("exact_match", np.array(hits, dtype=np.float64), basis))
        for r, s in zip(records[: setting.samples], said, strict=False):
            found.samples.append(Sample(prompt=r.prompt, answer=s, expected=r.completion))
    if setting.access is Text:
        return found
    if setting.access is Logits:
        loss, tokens, right = losses(setting, setting.task_of(records), records)
        if setting.wants("forced_match"):
            basis = f"every token of the {what} the first choice, given the right ones before it"
            found.measures.append(mean("forced_match", right, basis))
    else:
        scores = setting.logprobs().score([r.prompt for r in records], [r.completion for r in records])
        setting.done(len(records))
        loss = np.array([-s.total for s in scores])
        tokens = np.array([len(s.logprobs) for s in scores])
    if setting.wants("perplexity"):
        basis = f"a token of the {what}s; {int(tokens.sum())} tokens of the model's own tokenizer"
        found.measures.append(_perplexity("perplexity", loss, tokens, basis))
    return found


def _perplexity(name: str, loss: Any, tokens: Any, basis: str) -> Measure:
    def exp(values: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.exp(values)

    return ratio(name, loss, tokens, after=exp, basis=basis)


def _whole(text: str) -> tuple[str, str]:
    return "", text


def _opening(text: str) -> str:
    """The first third of a text, at most twelve words of it."""
    words = text.split()
    return " ".join(words[: max(1, min(12, len(words) // 3))])
