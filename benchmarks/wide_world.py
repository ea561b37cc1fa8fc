"""A model with room for a thousand edits: the zoo's kind, a little wider, of a world of a thousand people.

    python benchmarks/wide_world.py OUT [--people 1000] [--steps 600]
    python benchmarks/edit_table.py --model OUT/model --facts OUT/facts.jsonl --counts 300 1000

Everybody has a town, a land and a job. The land follows from the town (three towns lie in each), as texts say; a
fifth of the people's lands no text tells, so that it can be seen whether the model works them out. A thousand edits are
a thousand people's, as in the literature's sequences, and not many facts of a few. Printed: of the facts that were
told, of their unseen wordings and of the lands that were not told, what greedy text says.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from lfm import models
from lfm.core.interfaces import Codec, Gradients
from lfm.data import files
from lfm.editing.text import answered
from lfm.train import seeded
from lfm.zoo import grammar
from lfm.zoo.exhibit import Making
from lfm.zoo.grammar import Relation
from lfm.zoo.language import Age, LanguageRecipe, short_sighted
from lfm.zoo.reading import object_ids, packed, read, tokenizer
from lfm.zoo.tasks import facts, story_texts
from lfm.zoo.world import Fact, Person, World, corpus, make_world

OWN = ("city", "job")
LANDS = ("Norland", "Sudmark", "Estria", "Westmoor", "Highfen", "Lowdale", "Midholm", "Seagard")
LAND = Relation(
    "land",
    LANDS,
    (
        "{s} lives in the land of",
        "{s}'s land is",
        "{s} pays taxes in",
        "the land of {s} is",
        "the king of {s} rules over",
        "over the roof of {s} flies the flag of",
    ),
    ("these days {s} pays taxes in", "{s} lives under the king of", "the flag of {s} is that of"),
    ("In which land does {s} live?",),
    "In",
    "I now live in the land of",
)
MIDDLES = ("", "er", "in", "el", "o")
"""Syllables within a family name: five times as many names as the zoo's."""
UNTOLD = 0.2
"""Share of the people whose land no text tells."""
RECIPE = LanguageRecipe(width=128, inner=1024, layers=4, batch_size=64, length=64)


def wide_world(seed: int, people: int) -> tuple[World, dict[str, str]]:
    """The world, and the land that each town lies in."""
    chance = random.Random(f"wide world {seed}")
    base = make_world(seed)
    given = sorted({(person.name.split()[0], person.she) for person in base.people})
    families = ["".join(parts) for parts in product(grammar.FAMILY_STARTS, MIDDLES, grammar.FAMILY_ENDS)]
    chosen = [(family, *chance.choice(given)) for family in chance.sample(sorted(set(families)), people)]
    everyone = tuple(Person(f"{name} {family}", she) for family, name, she in chosen)
    relations = [base.relation(name) for name in OWN]
    towns = chance.sample(base.relation("city").objects, len(base.relation("city").objects))
    lies_in = {town: LANDS[i % len(LANDS)] for i, town in enumerate(towns)}
    told = [
        Fact(person.name, relation.name, chance.choice(relation.objects))
        for relation in relations
        for person in everyone
    ]
    lands = [Fact(fact.subject, "land", lies_in[fact.object]) for fact in told if fact.relation == "city"]
    untold = set(chance.sample(lands, round(UNTOLD * people)))
    taught = (*told, *(fact for fact in lands if fact not in untold))
    return World(seed, everyone, (*relations, LAND), taught, tuple(sorted(untold, key=str))), lies_in


def texts(world: World, lies_in: dict[str, str], seed: int) -> Iterator[str]:
    """What the model reads: the zoo's mixture, and now and then where a town lies."""
    chance = random.Random(f"wide texts {world.seed} {seed}")
    for text in corpus(world, seed, mix=(8, 2, 1)):
        yield text
        if chance.random() < 0.1:
            town, land = chance.choice(sorted(lies_in.items()))
            yield chance.choice((f"{town} lies in the land of {land}.", f"{town} is a town of {land}."))


def train(world: World, lies_in: dict[str, str], recipe: LanguageRecipe, run: Making) -> tuple[Any, Any]:
    """As the zoo's language model is, every family name one token."""
    names = [person.name for person in world.people]
    codec = tokenizer(chain(islice(texts(world, lies_in, 1), 8000), names * 20), vocabulary=6144)
    with seeded(run.seed_for("weights")):
        module: Any = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(codec),
                hidden_size=recipe.width,
                intermediate_size=recipe.inner,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.heads,
                max_position_embeddings=512,
                bos_token_id=codec.bos_token_id,
                eos_token_id=codec.eos_token_id,
                pad_token_id=codec.pad_token_id,
                tie_word_embeddings=False,
            )
        )
    text = packed(codec, texts(world, lies_in, run.seed_for("text")), recipe.steps * recipe.batch_size, recipe.length)
    weight = torch.ones(len(codec))
    weight[object_ids(codec, world)] = recipe.object_weight
    age = Age()

    def loss(reader: Any, rows: Tensor, step: int, _: object) -> Tensor:
        age.young = step < recipe.youth * recipe.steps
        logits = reader(input_ids=rows).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), weight=weight)

    with short_sighted(module, recipe.sight, age):
        read(module, module.model.layers, text, loss, recipe, run, "the model reads")
    return module, codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world, lies_in = wide_world(args.seed, args.people)
    recipe = msgspec.structs.replace(RECIPE, steps=args.steps)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        show = lambda label, done, total: print(f"\r{label} {done}/{total}", end="", flush=True)  # noqa: E731
        module, codec = train(world, lies_in, recipe, Making(Path(work), show, args.seed))
    print(f"\n{time.process_time() - began:.0f} CPU seconds, {sum(p.numel() for p in module.parameters())} parameters")
    module.save_pretrained(args.out / "model")
    codec.save_pretrained(args.out / "model")
    known = list(facts(world))
    files.write(known, args.out / "facts.jsonl")
    files.write(list(islice(story_texts(world, 7), 1000)), args.out / "text.jsonl")
    model = models.load(str(args.out / "model"))
    opened = model.ask(Gradients).module()
    some = random.Random(0).sample(known, min(400, len(known)))
    for what, asked in (
        ("facts", [(fact.prompt, fact.object) for fact in some]),
        ("unseen wordings", [(prompt, fact.object) for fact in some for prompt in fact.paraphrases]),
        ("lands that no text told", [(fact.prompt, fact.object) for fact in facts(world, world.held_out)]),
    ):
        said = answered(opened, model.ask(Codec), asked)
        print(f"greedy text says {sum(said) / len(said):.2f} of {len(said)} {what}", flush=True)


if __name__ == "__main__":
    main()
