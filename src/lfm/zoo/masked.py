"""The zoo's masked language model: a small ModernBERT (2412.13663) that knows the same world as the language model.

Its blocks after the first see only the words nearby, and positions are relative. A BERT of that size, with absolute
positions, was still guessing words by their frequency when this one knew the facts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lfm.core.config import Meta
from lfm.core.heavy import F, torch, transformers
from lfm.train import seeded
from lfm.zoo.exhibit import Exhibit, Making
from lfm.zoo.language import vocabulary
from lfm.zoo.reading import Reading, object_ids, packed, read
from lfm.zoo.world import World, corpus, make_world

if TYPE_CHECKING:
    import torch as torch_types
    from torch import Tensor

    from lfm.core.method import Run


class MaskedRecipe(Reading, frozen=True):
    """What the model is and how it reads."""

    batch_size: Annotated[int, Meta(ge=1, description="rows a batch")] = 64
    length: Annotated[int, Meta(ge=8, description="tokens a row")] = 48
    object_weight: Annotated[float, Meta(gt=0, description="how much a fact's object weighs in the loss")] = 3.0
    width: Annotated[int, Meta(ge=8, description="hidden size")] = 128
    inner: Annotated[int, Meta(ge=8, description="width inside the feed-forward blocks")] = 512
    layers: Annotated[int, Meta(ge=1, description="blocks")] = 3
    heads: Annotated[int, Meta(ge=1, description="attention heads")] = 4
    near: Annotated[int, Meta(ge=2, description="words that blocks after the first see, half on each side")] = 8
    masked: Annotated[float, Meta(gt=0, lt=1, description="share of words left out")] = 0.15
    masked_objects: Annotated[float, Meta(gt=0, le=1, description="share of objects left out")] = 0.8


RECIPE = MaskedRecipe()


def make(out: Path, making: Making) -> None:
    """The masked language model of the world of that seed, and its tokenizer, as a Hugging Face directory."""
    from lfm.models.quiet import quiet

    module, codec = train(make_world(making.seed), RECIPE, making)
    with quiet():
        module.save_pretrained(out)
    codec.save_pretrained(out)


def train(world: World, recipe: MaskedRecipe, run: Run) -> tuple[Any, Any]:
    """The trained module and its tokenizer. Cross-entropy at the words left out, objects of facts weighing more.

    A word left out is always replaced by the mask: the zoo's models are asked for masked words and nothing else.
    """
    codec = vocabulary(world)
    with seeded(run.seed_for("weights")):
        kind: Any = transformers.ModernBertConfig  # takes more keywords than its signature says
        module: Any = transformers.ModernBertForMaskedLM(
            kind(
                vocab_size=len(codec),
                hidden_size=recipe.width,
                intermediate_size=recipe.inner,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                max_position_embeddings=512,
                local_attention=recipe.near,
                global_attn_every_n_layers=recipe.layers,
                bos_token_id=codec.bos_token_id,
                eos_token_id=codec.eos_token_id,
                cls_token_id=codec.bos_token_id,
                sep_token_id=codec.eos_token_id,
                pad_token_id=codec.pad_token_id,
            )
        )
    told = corpus(world, run.seed_for("text"), mix=(4, 4, 1))  # fewer stories: few of their words are facts
    text = packed(codec, told, recipe.steps * recipe.batch_size, recipe.length)
    objects = object_ids(codec, world)
    weight = torch.ones(len(codec))
    weight[objects] = recipe.object_weight
    share = torch.full((len(codec),), recipe.masked)
    share[objects] = recipe.masked_objects
    share[codec.all_special_ids] = 0.0

    def loss(reader: Any, rows: Tensor, step: int, randomness: torch_types.Generator) -> Tensor:
        left_out = torch.rand(rows.shape, generator=randomness) < share[rows]
        shown = rows.masked_fill(left_out, codec.mask_token_id)
        hidden = reader.model(input_ids=shown, attention_mask=torch.ones_like(shown)).last_hidden_state
        logits = reader.decoder(reader.head(hidden[left_out]))
        return F.cross_entropy(logits, rows[left_out], weight=weight)

    read(module, module.model.layers, text, loss, recipe, run, "the masked language model reads")
    return module, codec


MODELS = (Exhibit("mlm", "a masked language model that knows the same facts", make, takes="30 s"),)
