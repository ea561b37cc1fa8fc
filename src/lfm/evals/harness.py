"""Tasks of EleutherAI's lm-evaluation-harness on any model that tells log-probabilities or says text.

`pip install learn-from-model[lm-eval]`. The harness brings tasks, prompts and metrics; this file answers its three
kinds of request, for a local checkpoint as its own `hf` model does. One thing differs: where a tokenizer opens every
text with a token of its own, `hf` scores that token too in rolling requests, after another one; here it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from lfm.core.errors import AccessError, DataError, DependencyError
from lfm.core.heavy import torch
from lfm.core.interfaces import Codec, Logits, Logprobs, Text, name_of
from lfm.core.model import Model
from lfm.data.language import context_of
from lfm.evals.estimate import Metric
from lfm.evals.evaluation import Evaluation
from lfm.evals.setting import Sample
from lfm.models.codec import pad, pad_id
from lfm.models.language import batches, spans

NORMAL = 1.959964
"""Standard errors on either side of a mean that make its 95 % interval."""
GENERATED = 256
"""Tokens generated where a task sets no limit; the harness's own default."""


def run(
    model: Model,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    samples: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """The harness's metrics by task, with normal 95 % intervals from its standard errors.

    tasks: names it knows, or task configs. include: a directory of your own task files, searched in place of the
    harness's. Tasks whose data are files need no network. DependencyError if the harness is not installed; AccessError
    names what a task asks and the model does not give.
    """
    try:
        from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DependencyError(
            "the evaluation harness is not installed", why=str(error), fix='pip install "learn-from-model[lm-eval]"'
        ) from None
    answers = Answers(model, progress)

    class Bound(LM):
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return answers.loglikelihood([r.args for r in requests])

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return answers.rolling([r.args[0] for r in requests])

        def generate_until(self, requests: Any) -> list[str]:
            return answers.generate([r.args for r in requests])

    named = all(isinstance(task, Mapping) for task in tasks)
    whole = evaluator.simple_evaluate(
        model=Bound(),
        tasks=[dict(task) if isinstance(task, Mapping) else task for task in tasks],
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=1000,
        task_manager=TaskManager(
            include_path=str(include) if include else None, include_defaults=include is None and not named
        ),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert whole is not None
    return {name: _evaluation(name, whole, answers, seed, samples) for name in whole["results"]}


def _evaluation(name: str, whole: Mapping[str, Any], answers: Answers, seed: int, samples: int) -> Evaluation:
    told = whole["results"][name]
    n = int(whole.get("n-samples", {}).get(name, {}).get("effective", 0))
    metrics: dict[str, Metric] = {}
    for key, value in told.items():
        metric, _, way = key.partition(",")
        if not isinstance(value, int | float) or metric.endswith("_stderr") or not way:
            continue
        error = told.get(f"{metric}_stderr,{way}")
        half = NORMAL * error if isinstance(error, int | float) else 0.0
        title = metric if way == "none" else f"{metric}_{way}"
        basis = f"lm-eval, {way} filter" + ("" if half else "; no standard error")
        metrics[title] = Metric(value=float(value), low=float(value) - half, high=float(value) + half, n=n, basis=basis)
    kept = whole.get("samples", {}).get(name, [])[:samples]
    return Evaluation(
        kind=name,
        access=answers.access,
        headline=next(iter(metrics), ""),
        metrics=metrics,
        samples=tuple(
            Sample(prompt=_prompt(s), answer=str(s.get("filtered_resps", "")), expected=str(s.get("target", "")))
            for s in kept
        ),
        notes=tuple(answers.notes),
        model=answers.model.digest,
        records=n,
        seed=seed,
    )


def _prompt(sample: Mapping[str, Any]) -> str:
    arguments = sample.get("arguments") or [[""]]
    first = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    first = next(iter(first.values())) if isinstance(first, Mapping) else first
    return str(first[0] if isinstance(first, list | tuple) else first)


class Scored(NamedTuple):
    """A continuation's log-probability, and whether greedy decoding would say it."""

    total: float
    greedy: bool


@final
class Answers:
    """The harness's requests put to a model, by logits where it gives them, else by log-probabilities and text."""

    def __init__(self, model: Model, progress: Callable[[int, int], None] | None = None) -> None:
        self.model, self.notes = model, list[str]()
        self._progress = progress
        self._local = model.can(Logits, Codec) and model.facts.task == "causal-lm"
        if not self._local and not model.can(Logprobs) and not model.can(Text):
            raise AccessError(
                "the harness asks for logits with a codec, logprobs or text", why=f"{model.ref} gives none"
            )
        self.access = "logits" if self._local else name_of(Logprobs if model.can(Logprobs) else Text)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation after its context."""
        if self._local:
            return [(found.total, found.greedy) for found in self._by_logits(pairs)]
        scores = self.model.ask(Logprobs).score([p for p, _ in pairs], [c for _, c in pairs])
        return [(s.total, greedy) for s, greedy in zip(scores, self._greedy(pairs, scores), strict=True)]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text, from its opening token on."""
        if not self._local:
            return [s.total for s in self.model.ask(Logprobs).score([""] * len(texts), texts)]
        rows, owners = [], []
        for i, text in enumerate(texts):
            for row in self._windows(text):
                rows.append(row)
                owners.append(i)
        totals = [0.0] * len(texts)
        for owner, found in zip(owners, self._scored(rows), strict=True):
            totals[owner] += found.total
        return totals

    def generate(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Each context continued up to its stop strings."""
        texts = [""] * len(asked)
        ways: dict[tuple[Any, ...], list[int]] = {}
        for i, (_, how) in enumerate(asked):
            until = how.get("until") or ()
            stop = (until,) if isinstance(until, str) else tuple(until)
            heat = float(how.get("temperature", 1.0)) if how.get("do_sample") else 0.0
            ways.setdefault((stop, int(how.get("max_gen_toks", GENERATED)), heat), []).append(i)
        for (stop, tokens, heat), places in ways.items():
            said = self.model.ask(Text).generate(
                [asked[i][0] for i in places], max_tokens=tokens, temperature=heat, stop=stop
            )
            for i, text in zip(places, said, strict=True):
                texts[i] = text
        return texts

    def _greedy(self, pairs: Sequence[tuple[str, str]], scores: Sequence[Any]) -> list[bool]:
        """By the first token where that is the whole continuation; else by what the model says, if it says anything."""
        prompts = list(dict.fromkeys(p for p, _ in pairs))
        top = dict(zip(prompts, self.model.ask(Logprobs).top(prompts, 1), strict=True))
        found = []
        for (prompt, continuation), score in zip(pairs, scores, strict=True):
            first = bool(top[prompt]) and score.logprobs[0] >= top[prompt][0][1] - 1e-6
            if first and len(score.logprobs) > 1:
                if self.model.can(Text):
                    said = self.model.ask(Text).generate([prompt], max_tokens=len(score.logprobs))[0]
                    first = said.startswith(continuation) or said.strip() == continuation.strip()
                elif not self.notes:
                    self.notes.append("whether greedy decoding gives an answer is judged by its first token")
            found.append(first)
        return found

    def _by_logits(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        tokenizer = self.model.ask(Codec).tokenizer
        limit = context_of(tokenizer, self.model.facts)
        rows = []
        for ids, first, last in spans(tokenizer, [p for p, _ in pairs], [c for _, c in pairs], [""] * len(pairs)):
            whole = ids[:last] if first else [self._opening(tokenizer), *ids[:last]]
            kept = whole[-(limit + 1) :] if limit else whole
            rows.append((kept, min(last - first, len(kept) - 1)))
        return self._scored(rows)

    def _windows(self, text: str) -> list[tuple[list[int], int]]:
        """The text in pieces that fit the context, each with as much before it as there is room for."""
        tokenizer = self.model.ask(Codec).tokenizer
        ids = [self._opening(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        limit = context_of(tokenizer, self.model.facts) or len(ids)
        ends = [min(start + limit, len(ids) - 1) for start in range(0, len(ids) - 1, limit)]
        return [(ids[max(0, end - limit) : end + 1], end - start * limit) for start, end in enumerate(ends)]

    def _scored(self, rows: Sequence[tuple[list[int], int]]) -> list[Scored]:
        """Each row's last `count` tokens, given those before them."""
        fill, asked = pad_id(self.model.ask(Codec).tokenizer), self.model.ask(Logits)
        found: list[Scored] = [Scored(0.0, True)] * len(rows)
        done = 0
        for group in batches([len(ids) for ids, _ in rows]):
            logits = asked.logits(pad([rows[i][0][:-1] for i in group], fill))
            for place, i in enumerate(group):
                ids, count = rows[i]
                wanted = torch.tensor(ids[len(ids) - count :], device=logits.device)
                told = logits[place, len(ids) - 1 - count : len(ids) - 1].float().log_softmax(-1)
                each = told.gather(1, wanted[:, None])[:, 0].double()
                found[i] = Scored(float(each.sum()), bool((told.argmax(-1) == wanted).all()))
            done += len(group)
            if self._progress:
                self._progress(done, len(rows))
        return found

    @staticmethod
    def _opening(tokenizer: Any) -> int:
        for candidate in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        raise DataError("an empty context cannot be scored", why="the tokenizer has no opening token")
