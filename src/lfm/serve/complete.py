"""Completions of prompts by whatever interfaces a model gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from lfm.core import interfaces
from lfm.core.heavy import torch
from lfm.core.interfaces import Codec, Embeddings, Logits, Logprobs
from lfm.core.model import Model
from lfm.models.language import cut
from lfm.serve.steps import ByIds, Candidate, Stepper, stepper_for
from lfm.serve.wire import MOST_LOGPROBS, Bad, Embeds, Ids, Prompt, Text

LEAST = -9999.0
"""What stands for the logarithm of nothing, as in OpenAI's protocol."""


@final
@dataclass(frozen=True)
class Asked:
    """How to complete. logprobs: alternatives a token, None for no log-probabilities at all."""

    max_tokens: int
    heat: float = 0.0
    top_p: float = 1.0
    stops: tuple[str, ...] = ()
    seed: int = 0
    n: int = 1
    echo: bool = False
    logprobs: int | None = None
    suffix: str = ""
    also: tuple[str, ...] = ()  # tokens told wherever they rank


@final
@dataclass(frozen=True)
class Token:
    """One token of an answer. logprob None: the first token of a text, which nothing precedes."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()
    offset: int = 0


@final
@dataclass(frozen=True)
class Made:
    """One answer. tokens: where log-probabilities were asked for; of the echoed prompt too."""

    text: str
    finish: str
    tokens: tuple[Token, ...] = ()
    counted: int | None = None  # tokens made, where the model can count


def complete(model: Model, prompts: Sequence[Prompt], asked: Asked) -> list[list[Made]]:
    """n answers to each prompt."""
    context = model.facts.context if asked.max_tokens else 0
    longest = max((count(model, prompt) or 0 for prompt in prompts), default=0) if context else 0
    if context and longest >= context:
        raise Bad(
            f"a prompt of {longest} tokens leaves no room to answer: the model reads {context} at most",
            code="context_length_exceeded",
        )
    told = [_echo(model, prompt, asked) if asked.echo else None for prompt in prompts]
    if asked.max_tokens == 0:
        if not asked.echo:
            raise Bad("max_tokens 0 makes sense with echo only", param="max_tokens")
        answers = [[Made("", "length", (), 0)] * asked.n for _ in prompts]
    elif asked.logprobs is None and asked.top_p == 1 and all(isinstance(prompt, Text) for prompt in prompts):
        answers = _whole(model, [prompt.text for prompt in prompts if isinstance(prompt, Text)], asked)
    else:
        answers = _stepped(model, prompts, asked)
    return [[_joined(head, made) for made in row] for head, row in zip(told, answers, strict=True)]


def count(model: Model, prompt: Prompt) -> int | None:
    """Tokens of a prompt; None where the model does not say what a token is."""
    if isinstance(prompt, Ids):
        return len(prompt.ids)
    if isinstance(prompt, Embeds):
        return len(prompt.rows)
    if Codec in model.gives:
        return len(model.ask(Codec).tokenizer(prompt.text)["input_ids"])
    return len(model.ask(Embeddings).embed([prompt.text])[0]) if Embeddings in model.gives else None


def _whole(model: Model, prompts: Sequence[str], asked: Asked) -> list[list[Made]]:
    """By the model's own generation."""
    if interfaces.Text not in model.gives:
        raise Bad("this model does not generate text: ask for logprobs with max_tokens 1", code="not_offered")
    each = [prompt for prompt in prompts for _ in range(asked.n)]
    how: Any = {"max_tokens": asked.max_tokens, "temperature": asked.heat, "stop": asked.stops, "seed": asked.seed}
    speaker = model.ask(interfaces.Text)
    tells, texts = hasattr(speaker, "said"), interfaces.said_by(speaker, each, **how)
    tokenizer = model.ask(Codec).tokenizer if Codec in model.gives else None
    made = []
    for text, over in texts:
        counted = None
        if tokenizer is not None:  # read again, a text may make more tokens than it was made of
            counted = min(len(tokenizer(text, add_special_tokens=False)["input_ids"]), asked.max_tokens)
        if not tells:
            over = counted is not None and counted >= asked.max_tokens
        made.append(Made(text, "length" if over else "stop", (), counted))
    return [made[i : i + asked.n] for i in range(0, len(made), asked.n)]


def _stepped(model: Model, prompts: Sequence[Prompt], asked: Asked) -> list[list[Made]]:
    """Token by token, all prompts of one kind at once."""
    answers: list[list[Made]] = [[] for _ in prompts]
    for kind in (Text, Ids, Embeds):
        mine = [i for i, prompt in enumerate(prompts) if isinstance(prompt, kind)]
        if mine:
            stepper = stepper_for(model, prompts[mine[0]], suffix=asked.suffix, also=asked.also)
            starts = [stepper.start(prompts[i]) for i in mine for _ in range(asked.n)]
            made = _grow(model, stepper, starts, asked)
            for place, i in enumerate(mine):
                answers[i] = made[place * asked.n : (place + 1) * asked.n]
    return answers


def _grow(model: Model, stepper: Stepper, states: list[Any], asked: Asked) -> list[Made]:
    end = model.ask(Codec).tokenizer.eos_token if Codec in model.gives else None
    going, starts = list(range(len(states))), list(states)
    texts, ends = [""] * len(states), ["length"] * len(states)
    tokens: list[list[Token]] = [[] for _ in states]
    random, k = torch.Generator().manual_seed(asked.seed), asked.logprobs or 0
    for step in range(asked.max_tokens):
        ranked = stepper.candidates([states[i] for i in going], MOST_LOGPROBS if asked.heat > 0 else max(k, 1))
        for i, row in zip(list(going), ranked, strict=True):
            chosen = _choose(row, asked, random)
            top = tuple((c.text, c.logprob) for place, c in enumerate(row) if place < k or c.text in asked.also)
            if chosen.text == end:
                if not tokens[i]:  # an answer that is empty still tells what it was probably not
                    tokens[i].append(Token("", chosen.logprob, top, 0))
                ends[i] = "stop"
                going.remove(i)
                continue
            tokens[i].append(Token(chosen.text, chosen.logprob, top, len(texts[i])))
            texts[i] = stepper.said(starts[i], states[i], texts[i], chosen)
            if cut(texts[i], asked.stops) != texts[i]:
                texts[i], ends[i] = cut(texts[i], asked.stops), "stop"
                tokens[i] = [token for token in tokens[i] if token.offset < len(texts[i])]
                going.remove(i)
            elif step + 1 < asked.max_tokens:
                states[i] = stepper.grown(states[i], chosen)
        if not going:
            break
    told = asked.logprobs is not None
    return [
        Made(text, finish, tuple(row) if told else (), len(row))
        for text, finish, row in zip(texts, ends, tokens, strict=True)
    ]


def _choose(row: list[Candidate], asked: Asked, random: torch.Generator) -> Candidate:
    """Greedy, or sampled from the least set of candidates whose probability reaches top_p."""
    if asked.heat <= 0:
        return row[0]
    weights = torch.tensor([c.logprob for c in row], dtype=torch.float64).div(asked.heat).softmax(0)
    if asked.top_p < 1:
        before = weights.cumsum(0) - weights
        weights = weights.where(before < asked.top_p, torch.zeros_like(weights))
    return row[int(torch.multinomial(weights, 1, generator=random))]


def _echo(model: Model, prompt: Prompt, asked: Asked) -> Made:
    """The prompt as the beginning of the answer, with the log-probabilities of its own tokens."""
    if isinstance(prompt, Embeds):
        raise Bad("prompt_embeds cannot be echoed: they are not text", param="echo")
    text = prompt.text if isinstance(prompt, Text) else model.ask(Codec).tokenizer.decode(list(prompt.ids))
    if asked.logprobs is None or not text:
        return Made(text, "")
    if model.can(Codec, Logits) and model.facts.task in ("causal-lm", ""):
        return Made(text, "", _echoed_ids(model, prompt, asked.logprobs))
    if isinstance(prompt, Text) and Logprobs in model.gives:
        (score,) = model.ask(Logprobs).score([""], [text])
        offsets = placed(score.tokens, text)
        return Made(
            text,
            "",
            tuple(
                Token(text[a:b], max(p, LEAST), ((text[a:b], max(p, LEAST)),), a)
                for (a, b), p in zip(offsets, score.logprobs, strict=True)
            ),
        )
    raise Bad("this model does not give log-probabilities", param="logprobs", code="not_offered")


def _echoed_ids(model: Model, prompt: Prompt, k: int) -> tuple[Token, ...]:
    tokenizer, stepper = model.ask(Codec).tokenizer, ByIds(model)
    if isinstance(prompt, Ids):
        ids = list(stepper.start(prompt))
        ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        whole = tokenizer.decode(ids)
    else:
        assert isinstance(prompt, Text)
        encoded = tokenizer(prompt.text, return_offsets_mapping=True)
        ids, spans, whole = list(encoded["input_ids"]), [tuple(s) for s in encoded["offset_mapping"]], prompt.text
    opening = tokenizer.bos_token_id
    before = 0
    if isinstance(prompt, Text) and opening is not None and spans and spans[0][1] > spans[0][0]:
        ids, before = [opening, *ids], 1  # so that the first token is scored as Logprobs scores it
    (row,) = stepper.logits([ids])
    found = []
    for i in range(before, len(ids)):
        a, b = spans[i - before]
        if isinstance(prompt, Text) and a == b:
            continue  # a special token that is no part of the text
        if i == 0:
            found.append(Token(whole[a:b], None, (), a))
            continue
        top = tuple((c.text, max(c.logprob, LEAST)) for c in stepper.ranked(row[i - 1], max(k, 1)))
        found.append(Token(whole[a:b], max(float(row[i - 1][ids[i]]), LEAST), top, a))
    return tuple(found)


def placed(tokens: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where each token lies in the text, (start, end). Bad if the tokens do not spell it."""
    spans, place = [], 0
    for token in tokens:
        plain = token.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
        form = next((f for f in (plain, plain.lstrip(" "), token) if f and text.startswith(f, place)), None)
        if form is None:
            raise Bad("this model's tokens cannot be placed in the text: ask /score instead", param="echo")
        spans.append((place, place + len(form)))
        place += len(form)
    return spans


def _joined(head: Made | None, made: Made) -> Made:
    if head is None:
        return made
    shifted = tuple(replace(token, offset=token.offset + len(head.text)) for token in made.tokens)
    return replace(made, text=head.text + made.text, tokens=head.tokens + shifted)


def finite(value: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return None if value is None else max(value, LEAST) if math.isfinite(value) else LEAST
