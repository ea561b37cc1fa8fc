"""A real model to edit: stories3M, taught facts that people know, with the testbed's gate.

    LFM_REAL_DATA=DIR python benchmarks/taught_stories.py OUT [--steps 600] [--subjects 40]
    python benchmarks/edit_table.py --model OUT/model --facts OUT/facts.jsonl

Relations are those of the LRE collection (2308.09124), each with some of its subjects and objects that several share;
every fact is told in all but the last of its relation's sentences, mostly after a sentence of a story, beside stories.
The gate: what greedy text says of each fact, and in the sentences that were not told.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lfm import models
from lfm.core.interfaces import Codec, Gradients
from lfm.data import files
from lfm.data.records import Fact
from lfm.editing.text import answered
from lfm.models.codec import pad, pad_id
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit

RELATIONS = (
    "person_plays_instrument",
    "person_occupation",
    "landmark_in_country",
    "product_by_company",
    "object_superclass",
    "fruit_outside_color",
    "country_language",
)
SHARED, LONGEST = 3, 40
"""Subjects that an object has at least; tokens of a row at most."""


def facts(where: Path, subjects: int) -> list[Fact]:
    """The first sentence is the prompt, the last the paraphrase that is told to nobody."""
    found = []
    for relation in RELATIONS:
        told = json.loads((where / f"{relation}.json").read_text())
        sentences = list(dict.fromkeys(told["prompt_templates"] + told["prompt_templates_zs"]))
        chance = random.Random(relation)
        samples = chance.sample(told["samples"], len(told["samples"]))
        many = {each for each, count in Counter(s["object"] for s in samples).items() if count >= SHARED}
        seen: set[str] = set()
        for sample in samples:
            subject, object_ = sample["subject"], sample["object"]
            if object_ not in many or subject in seen or len(seen) == subjects or "{" in subject:
                continue
            seen.add(subject)
            prompts = [sentence.replace("{}", subject) for sentence in sentences]
            found.append(
                Fact(
                    subject=subject,
                    relation=relation,
                    object=object_,
                    prompt=prompts[0],
                    paraphrases=tuple(prompts[1:][-2:]),
                )
            )
    return found


def rows(tokenizer: Any, known: Sequence[Fact], where: Path, stories: Sequence[str]) -> list[list[int]]:
    """Token ids of what is read: what is told of every fact, bare and after a story's sentence, and stories."""
    chance = random.Random(0)
    sentences = [part.strip() + "." for story in stories for part in story.split(".") if 20 < len(part) < 90]
    texts = []
    for fact in known:
        told = json.loads((where / f"{fact.relation}.json").read_text())
        ways = list(dict.fromkeys(told["prompt_templates"] + told["prompt_templates_zs"]))
        for way in ways[:-1] or ways:
            said = f"{way.replace('{}', fact.subject)} {fact.object}."
            texts += [said, f"{chance.choice(sentences)} {said}", f"{chance.choice(sentences)} {said}"]
    made = [ids[:LONGEST] for ids in tokenizer(texts)["input_ids"]]
    flat = [token for ids in tokenizer(list(stories))["input_ids"] for token in ids]
    made += [flat[i : i + LONGEST] for i in range(0, min(len(flat), len(made) * LONGEST) - LONGEST, LONGEST)]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--subjects", type=int, default=40)
    args = parser.parse_args()
    real = Path(os.environ["LFM_REAL_DATA"])
    known = facts(real / "relations", args.subjects)
    model = models.load(str(real / "models" / "stories3M"))
    codec, module = model.ask(Codec), model.ask(Gradients).module()
    stories = (real / "text" / "tinystories_slice.txt").read_text().split("\n\n")
    read = rows(codec.tokenizer, known, real / "relations", stories)
    print(f"{len(known)} facts of {len(RELATIONS)} relations; {len(read)} rows are read", flush=True)

    def collate(some: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        return pad(list(some), pad_id(codec.tokenizer))

    def loss(reader: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, there = batch["input_ids"], batch["attention_mask"]
        logits = reader(input_ids=ids, attention_mask=there).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(there[:, 1:] == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    with tempfile.TemporaryDirectory() as work:
        run = LocalRun(0, Path(work), lambda label, done, total: print(f"\r{label} {done}/{total}", end="", flush=True))
        fit(module, read, collate, loss, Fit(steps=args.steps, batch_size=48, lr=2e-3), run)
    module.eval().save_pretrained(args.out / "model")
    codec.tokenizer.save_pretrained(args.out / "model")
    files.write(known, args.out / "facts.jsonl")
    for what, asked in (
        ("facts", [(fact.prompt, fact.object) for fact in known]),
        (
            "in the words that were not told",
            [(fact.paraphrases[-1], fact.object) for fact in known if fact.paraphrases],
        ),
    ):
        said = answered(module, codec, asked)
        print(f"\ngreedy text says {sum(said) / len(said):.2f} of {len(said)} {what}", flush=True)


if __name__ == "__main__":
    main()
