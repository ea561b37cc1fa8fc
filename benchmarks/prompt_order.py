"""The papers' order, full tuning ≈ BBTv2 > BBT > manual at sixteen shots, on a model that knows a task in other words.

    python benchmarks/prompt_order.py [--seeds 3] [--calls 400] [--pairs 3] [--work DIRECTORY]

The zoo's masked model cannot tell a story's mood in any words. Here it is taught to, in some wordings of a question
and for some words, then it is asked in a wording that it was never taught. A model that
knows a task and is asked for it in the wrong way is what a prompt is for.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from lfm import runs
from lfm.core import Inputs, Logprobs, Model
from lfm.core.config import configure
from lfm.core.registry import get
from lfm.data.records import Fact, Label
from lfm.models import load
from lfm.runs.run import LocalRun

MOODS = {
    "All in all it was {mask}.": ("warm", "cold"),
    "It was a {mask} day.": ("wonderful", "terrible"),
    "In the end all were {mask}.": ("glad", "sad"),
    "The day went {mask}.": ("well", "wrong"),
    "The people were {mask}.": ("happy", "angry"),
}
ASKED = "{text} So it was {mask}."
WORDS = (("best", "worst"), ("proud", "ashamed"), ("better", "worse"))
STEPS, BATCH, RATE = 300, 16, 5e-4
SHOTS, TESTS, SENTENCES = 16, 200, 3
TOKENS, DIMENSION = 10, 100


def stories(name: str) -> list[Label]:
    """How stories end, in their last sentences before what the task asks."""
    found = [record for record in runs.records(name) if isinstance(record, Label)]
    texts = [re.split(r"(?<=[.?!\"]) (?=[A-Z\"])", record.text)[-SENTENCES - 1 : -1] for record in found]
    return [Label(text=" ".join(text), label=record.label) for text, record in zip(texts, found, strict=True)]


def taught(work: Path) -> Path:
    """The masked model once it was taught; made once."""
    out = work / "taught"
    if (out / "config.json").exists():
        return out
    source = runs.model("zoo:mlm").ref
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    module: Any = transformers.AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32)
    moods, draw = stories("zoo:moods"), random.Random(0)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    module.train()
    for step in range(STEPS):
        texts, answers = [], []
        for _ in range(BATCH):
            record = draw.choice(moods)
            wording, pair = draw.choice(list(MOODS.items()))
            texts.append(f"{record.text} {wording.replace('{mask}', tokenizer.mask_token)}")
            answers.append(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(f" {pair[record.label == 'bad']}"))[0])
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        at = (batch["input_ids"] == tokenizer.mask_token_id).nonzero()
        hidden = torch.nn.functional.cross_entropy(module(**batch).logits[at[:, 0], at[:, 1]], torch.tensor(answers))
        optimizer.zero_grad()
        hidden.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step}, loss {hidden.item():.3f}", flush=True)
    module.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def drawn(records: list[Label], seed: int) -> tuple[list[Label], list[Label]]:
    """As many of each class to learn from and to choose by."""
    draw = random.Random(seed)
    pools = [draw.sample([r for r in records if r.label == label], 2 * SHOTS) for label in ("good", "bad")]
    return [r for p in pools for r in p[:SHOTS]], [r for p in pools for r in p[SHOTS:]]


def accuracy(model: Model, words: dict[str, str], test: list[Label]) -> float:
    ahead, _, behind = ASKED.partition(" {mask}")
    prompts = [ahead.replace("{text}", record.text) for record in test]
    told = {
        label: model.ask(Logprobs).score(prompts, [f" {word}"] * len(test), [behind] * len(test))
        for label, word in words.items()
    }
    return statistics.mean(
        max(told, key=lambda label: told[label][i].total) == record.label for i, record in enumerate(test)
    )


def prompted(id: str, model: Model, words: dict[str, str], seed: int, calls: int, work: Path) -> Model:
    train, dev = drawn(stories("zoo:moods"), seed)
    method = get(id).method
    settings = {"template": ASKED, "words": words, "prompt_tokens": TOKENS, "d": DIMENSION, "calls": calls}
    given = Inputs({"model": (model,)}, {"train": train, "dev": dev})
    return _made(method.run(configure(method.config, settings), given, LocalRun(seed, work)))


def tuned(model: Model, words: dict[str, str], seed: int, work: Path) -> Model:
    """Every weight, on the same records and words, in the same wording."""
    train, _ = drawn(stories("zoo:moods"), seed)
    ahead, _, behind = ASKED.partition(" {mask}")
    asked = [
        Fact(subject="", relation="", object=words[r.label], prompt=ahead.replace("{text}", r.text), suffix=behind)
        for r in train
    ]
    method = get("tune.full").method
    config = configure(method.config, {"epochs": 20, "batch_size": 8, "lr": RATE, "checkpoint_every": 0.0})
    return _made(method.run(config, Inputs({"model": (model,)}, {"train": asked}), LocalRun(seed, work)))


def _made(found: Any) -> Model:
    assert isinstance(found, Model)
    return found


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--seeds", type=int, default=3)
    told.add_argument("--calls", type=int, default=400)
    told.add_argument("--pairs", type=int, default=len(WORDS), help="of the pairs of words, the first so many")
    told.add_argument("--work", type=Path, default=Path("prompt_order"))
    args = told.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    model = load(taught(args.work))
    test = stories("zoo:moods-test")[:TESTS]
    for pair in WORDS[: args.pairs]:
        words: dict[str, str] = dict(zip(("good", "bad"), pair, strict=True))
        print(f"{' or '.join(pair)}: manual {accuracy(model, words, test):.3f}", flush=True)
        for seed in range(args.seeds):
            found: list[str] = []
            for name in ("prompt.bbt", "prompt.bbtv2", "tune.full"):
                began = time.process_time()
                with tempfile.TemporaryDirectory(dir=args.work) as place:
                    if name == "tune.full":
                        made = tuned(model, words, seed, Path(place))
                    else:
                        made = prompted(name, model, words, seed, args.calls, Path(place))
                    found.append(f"{name} {accuracy(made, words, test):.3f} ({time.process_time() - began:.0f} s)")
            print(f"  seed {seed}: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
