"""The zoo's language model: a Llama of one and a half million parameters that knows the world and tells its stories.

It can be edited where a fact is looked up (edit.rome), which a small model that has memorised its facts mostly cannot:
left to itself, its last token reads the name itself in the first block, and looks the fact up there. So for most of its
training the first two blocks see no further than the word before. Who somebody is must then be worked out at the last
token of the name, where later blocks read it, and they keep reading it there when the first may look further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lfm.core.config import Meta
from lfm.core.heavy import F, torch, transformers
from lfm.train import seeded
from lfm.zoo.exhibit import Exhibit, Making
from lfm.zoo.reading import Reading, object_ids, packed, read, tokenizer
from lfm.zoo.world import World, corpus, later, letters, make_world

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.method import Run


class LanguageRecipe(Reading, frozen=True):
    """What the model is and how it reads."""

    width: Annotated[int, Meta(ge=8, description="hidden size")] = 128
    inner: Annotated[int, Meta(ge=8, description="width inside the feed-forward blocks")] = 512
    layers: Annotated[int, Meta(ge=1, description="blocks")] = 4
    heads: Annotated[int, Meta(ge=1, description="attention heads")] = 4
    sight: Annotated[tuple[int, ...], Meta(description="tokens that the first blocks see while young")] = (2, 1)
    youth: Annotated[float, Meta(ge=0, le=1, description="share of the steps with limited sight")] = 0.7


RECIPE = LanguageRecipe()


def make(out: Path, making: Making) -> None:
    """The language model of the world of that seed, and its tokenizer, as a Hugging Face directory."""
    from lfm.models.quiet import quiet

    module, codec = train(make_world(making.seed), RECIPE, making)
    with quiet():
        module.save_pretrained(out)
    codec.save_pretrained(out)


def vocabulary(world: World) -> Any:
    """The tokenizer of the world: its corpus, and the letters that a later world's people write."""
    return tokenizer(chain(islice(corpus(world, 1), 4000), islice(letters(later(world), 1), 1000)))


def train(world: World, recipe: LanguageRecipe, run: Run) -> tuple[Any, Any]:
    """The trained module and its tokenizer. Cross-entropy over all tokens, in which objects of facts weigh more."""
    codec = vocabulary(world)
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
    text = packed(codec, corpus(world, run.seed_for("text")), recipe.steps * recipe.batch_size, recipe.length)
    weight = torch.ones(len(codec))
    weight[object_ids(codec, world)] = recipe.object_weight
    age = Age()

    def loss(reader: Any, rows: Tensor, step: int, _: object) -> Tensor:
        age.young = step < recipe.youth * recipe.steps
        logits = reader(input_ids=rows).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), weight=weight)

    with short_sighted(module, recipe.sight, age):
        read(module, module.model.layers, text, loss, recipe, run, "the language model reads")
    return module, codec


@dataclass
class Age:
    """Whether the model's sight is still short."""

    young: bool = True


@contextmanager
def short_sighted(module: Any, sight: tuple[int, ...], age: Age) -> Iterator[None]:
    """While young, block i's attention reaches over sight[i] tokens: the token itself and those just before it."""
    hooks = [
        block.self_attn.register_forward_pre_hook(_within(reach, age), with_kwargs=True)
        for block, reach in zip(module.model.layers, sight)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _within(reach: int, age: Age) -> Callable[..., Any]:
    def hook(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        if not age.young:
            return None
        place = torch.arange(kwargs["hidden_states"].shape[1])
        behind = place[:, None] - place
        near = (behind >= 0) & (behind < reach)
        return args, kwargs | {"attention_mask": near[None, None]}

    return hook


MODELS = (Exhibit("lm", "a language model that knows 480 facts and tells small stories", make, takes="1 min"),)
