"""What it saves to read once what is read again: words after one text, and demonstrations before many texts.

CPU seconds of `score`, with and without, in turn in one run.

OMP_NUM_THREADS=1 python benchmarks/prompt_sharing.py --model zoo:lm --data zoo:moods
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from lfm import runs
from lfm.core.interfaces import Codec, Logits, Logprobs, Score
from lfm.core.model import Model
from lfm.data.wording import wording
from lfm.models.language import CausalLogprobs

WORDS = ["good", "bad", "great", "poor", "happy", "sad", "fine", "wrong"]
WORDS += ["red", "blue", "green", "big", "small", "old", "new", "long"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:lm")
    parser.add_argument("--data", default="zoo:moods")
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = runs.model(given.model)
    texts = [wording(record).prompt for record in runs.records(given.data)[: given.records]]
    print("what is read                     alone      shared     times faster (least, most)  apart by")
    for count in (2, 4, 16):
        prompts = [text for text in texts for _ in range(count)]
        words = [f" {word}" for _ in texts for word in WORDS[:count]]
        said(f"{count} words after each text", model, prompts, words, given.rounds)
    for count in (2, 3):
        shown = "".join(f"{text} {word}. " for text, word in zip(texts, WORDS[:count]))
        rest = texts[count:]
        prompts = [shown + text for text in rest for _ in WORDS[:2]]
        said(
            f"{count} demonstrations before each",
            model,
            prompts,
            [f" {w}" for _ in rest for w in WORDS[:2]],
            given.rounds,
        )


def said(name: str, model: Model, prompts: list[str], words: list[str], rounds: int) -> None:
    apart = CausalLogprobs(model.ask(Logits).logits, model.ask(Codec), context=lambda: model.facts.context)
    taken: list[tuple[float, float]] = []
    gap = 0.0
    for _ in range(rounds):  # one after the other, so that both meet the same machine
        (a, alone), (b, shared) = (timed(reader, prompts, words) for reader in (apart, model.ask(Logprobs)))
        gap = max(abs(x.total - y.total) for x, y in zip(alone, shared, strict=True))
        taken.append((a, b))
    ratios = [a / b for a, b in taken]
    print(
        f"{name:32}  {statistics.median(a for a, _ in taken):7.3f} s  {statistics.median(b for _, b in taken):7.3f} s  "
        f"{statistics.median(ratios):5.1f} ({min(ratios):.1f} to {max(ratios):.1f})  {gap:.1e}"
    )


def timed(reader: Any, prompts: list[str], words: list[str]) -> tuple[float, list[Score]]:
    began = time.process_time()
    found = reader.score(prompts, words)
    return time.process_time() - began, found


if __name__ == "__main__":
    main()
