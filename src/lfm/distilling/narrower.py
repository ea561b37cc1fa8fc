"""Students cut out of teachers: which blocks, neurons, heads and channels matter least, and the model without them.

No architecture is known here: which dimensions of which weights go together is found by following one forward pass
(lfm.models.symmetry), and what is cut is built anew by its own config, so that it loads as any other of its kind.
Sources: importance by activations, all axes from forward passes alone, Minitron 2407.14679; a block's influence, one
less the cosine of what it reads and writes, ShortGPT 2403.03853. Minitron takes the length over a batch and the mean
over its places; here it is the mean over all places.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lfm.core.errors import ModelError
from lfm.core.heavy import F, torch
from lfm.distilling.inside import counted, mapped
from lfm.models import device, forward, layers, structure
from lfm.models.symmetry import Group, Place, symmetry
from lfm.models.told import on_meta
from lfm.train import seeded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch

Importance = Literal["activation", "magnitude"]

NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size")
"""What configs call the number of a feed-forward layer's neurons."""
CHANNELS = ("hidden_size", "word_embed_proj_dim", "embedding_size")
HEADS = ("num_attention_heads", "num_key_value_heads")


class Shares(NamedTuple):
    """Of each how much is kept, in (0, 1]. Heads that share keys are kept or cut together."""

    neurons: float = 1.0
    heads: float = 1.0
    channels: float = 1.0


class Cut(NamedTuple):
    """A group of which some elements go: where it is read in the model, and which are kept, in order."""

    group: Group
    at: Tensor
    site: tuple[str, str]


# ---------------------------------------------------------------------------------------------- depth


def influences(module: nn.Module, batches: Sequence[Batch]) -> list[float]:
    """Of each block 1 − the mean cosine of what it reads and what it writes, over all places: from 0, does nothing."""
    names = layers.countable(module)
    sites = [(kind, name) for name in names for kind in ("before", "hidden")]
    seen = _watched(module, sites, batches)
    return [
        1 - float(F.cosine_similarity(seen[2 * i], seen[2 * i + 1], dim=-1).mean().clamp(max=1))
        for i in range(len(names))
    ]


def without_idle_blocks(module: nn.Module, count: int, batches: Sequence[Batch]) -> nn.Module:
    """The module, changed in place, with the `count` blocks of most influence. ModelError where it has fewer."""
    found = influences(module, batches)
    if not 1 <= count <= len(found):
        raise ModelError(f"{count} blocks cannot be kept of {len(found)}", fix=f"layers={len(found)} or fewer")
    best = sorted(range(len(found)), key=lambda i: -found[i])[:count]
    return layers.with_blocks(module, sorted(best))


# ---------------------------------------------------------------------------------------------- width


def narrower(module: nn.Module, shares: Shares, importance: Importance, batches: Sequence[Batch]) -> nn.Module:
    """A module of the same class with the most important of these, and their weights; the same number in each block.

    ModelError where they cannot be told apart, or where the class's config cannot say what would be left.
    """
    config: Any = getattr(module, "config", None)
    if config is None:
        raise ModelError(
            f"{type(module).__name__} cannot be made narrower", why="no config of transformers describes it"
        )
    first = {key: value[:2].to(device()) for key, value in batches[0].items()}
    module.to(device())
    groups = symmetry(module, first).groups
    found = [(group, place) for group in groups for place in group.places]
    described = copy.deepcopy(config)
    dropped: dict[tuple[str, int], set[int]] = {}
    for axis, share in zip(Shares._fields, shares):
        if share == 1:
            continue
        cuts = [_cut(module, found, axis, block) for block in structure.all_blocks(module)]
        if axis == "channels":  # one stream through all blocks
            every = _scores(module, cuts, importance, batches)
            scores = [torch.stack(every).sum(0)]
            cuts = cuts[:1]
        else:
            scores = _scores(module, cuts, importance, batches)
        sizes = {cut.group.size for cut in cuts}
        if len(sizes) != 1:
            raise ModelError(f"blocks have {sorted(sizes)} {axis}", why="one config tells the number for all of them")
        held = sizes.pop()
        step = _together(described, held) if axis == "channels" else 1
        kept = step * max(1, round(share * held / step))
        for cut, score in zip(cuts, scores):
            out = torch.ones(held, dtype=torch.bool).scatter(0, score.topk(kept).indices, False)
            for place in cut.group.places:
                gone = dropped.setdefault((place.name, place.dim), set())
                gone |= set(place.at[out].reshape(-1).tolist())
        _describe(described, axis, held, kept)
    return _built(module, described, dropped)


def _cut(module: nn.Module, found: Sequence[tuple[Group, Place]], axis: str, block: str) -> Cut:
    """The group that a block's layer reads on that axis, and how its elements lie on what the layer reads."""
    ffn = structure.feed_forward(module, block)
    if axis == "heads":
        name, site = structure.attention_out(module, block), ("attention_key", block)
    else:
        name, site = (ffn.down, ("ffn_key", block)) if axis == "neurons" else (ffn.up, ("ffn_in", block))
    dim = 0 if structure.transposed(module.get_submodule(name)) else 1
    width = int(module.get_submodule(name).weight.shape[dim])  # type: ignore[union-attr,index,arg-type]
    for group, place in found:
        # of heads the outermost group is that of whole ones; all of the layer's inputs must be its elements'
        whole = (place.name, place.dim) == (f"{name}.weight", dim) and place.at.numel() == width
        if whole and (axis != "heads" or place.at.shape[1] > 1):
            return Cut(group, place.at, site)
    raise ModelError(
        f"the {axis} of {block} cannot be told apart in {type(module).__name__}",
        why=f"following a forward pass showed no {axis} that {name} reads one by one",
    )


def _scores(module: nn.Module, cuts: Sequence[Cut], importance: Importance, batches: Sequence[Batch]) -> list[Tensor]:
    """(elements,) of each cut, on the CPU: the length of an element's activations, or of its weights."""
    if importance == "activation":
        seen = _watched(module, [cut.site for cut in cuts], batches)
        return [x[:, cut.at.reshape(-1)].unflatten(1, cut.at.shape).norm(dim=2).mean(0) for cut, x in zip(cuts, seen)]
    weights = dict(module.named_parameters()) | dict(module.named_buffers())
    found = []
    for cut in cuts:
        total = torch.zeros(cut.group.size)
        for place in cut.group.places:
            squares = weights[place.name].detach().float().cpu().square()
            squares = squares.movedim(place.dim, 0).reshape(squares.shape[place.dim], -1).sum(1)
            total += squares[place.at.reshape(-1)].unflatten(0, place.at.shape).sum(1)
        found.append(total.sqrt())
    return found


def _watched(module: nn.Module, sites: Sequence[tuple[str, str]], batches: Sequence[Batch]) -> list[Tensor]:
    """(places, width) fp32 at each site over all batches, padding left out, on the CPU."""
    found: list[list[Tensor]] = [[] for _ in sites]
    mode = module.training
    module.to(device()).eval()
    answers = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    for batch in batches:
        rows = len(next(iter(batch.values())))
        with torch.no_grad(), structure.watch(module, sites) as seen:
            forward(module, batch)
        for place, value in enumerate(seen):
            x = mapped(value, rows).float().cpu()
            reads = ".encoder." in f".{sites[place][1]}."  # what is asked; the decoder's places are the answer's
            mask = counted(batch, x.shape[1], "seq2seq-lm" if answers and not reads else "")
            found[place].append(x.flatten(0, 1) if mask is None else x[mask.cpu()])
    module.train(mode)
    return [torch.cat(parts) for parts in found]


def _together(config: Any, held: int) -> int:
    """Channels that can only be kept together: most configs of transformers want as many for each of their heads."""
    heads = getattr(config, "num_attention_heads", 1)
    return heads if isinstance(heads, int) and held % heads == 0 else 1


def _describe(config: Any, axis: str, held: int, kept: int) -> None:
    """Write the new number into the config, under the names that it has for it."""
    told = config.to_dict()
    if axis == "heads":
        width = config.hidden_size // config.num_attention_heads
        if "head_dim" in told:
            config.head_dim = told["head_dim"] or width
        for name in HEADS:
            if getattr(config, name, None) is not None:
                setattr(config, name, getattr(config, name) * kept // held)
        return
    if axis == "channels" and "head_dim" in told:
        config.head_dim = told["head_dim"] or config.hidden_size // config.num_attention_heads
    for name in NEURONS if axis == "neurons" else CHANNELS:
        if hasattr(config, name) and getattr(config, name) in (held, None):
            setattr(config, name, kept)


def _built(module: nn.Module, config: Any, dropped: Mapping[tuple[str, int], set[int]]) -> nn.Module:
    """The class's own module by that config, with what is left of the weights."""
    from huggingface_hub.errors import StrictDataclassError

    left: dict[str, Tensor] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        value = tensor.detach()
        for dim in range(value.ndim):
            if gone := dropped.get((name, dim)):
                rest = [i for i in range(value.shape[dim]) if i not in gone]
                value = value.index_select(dim, torch.tensor(rest, device=value.device))
        left[name] = value
    try:
        config.validate()  # as it will be when it is read again
        made: Any = on_meta(lambda: type(module)(config))
    except (ValueError, RuntimeError, ArithmeticError, StrictDataclassError) as error:  # heads of no width, say
        raise _unsayable(module, str(error.__cause__ or error).splitlines()[0]) from None
    stored = set(made.state_dict())
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if name in stored and (name not in left or left[name].shape != tensor.shape):
            shape = tuple(left[name].shape) if name in left else "none"
            raise _unsayable(module, f"{name} would be {shape}, by its config it is {tuple(tensor.shape)}")
    with seeded(0):
        new = type(module)(config)
    with torch.no_grad():
        for name, tensor in [*new.named_parameters(), *new.named_buffers()]:
            if name in stored:
                tensor.copy_(left[name])
    return new.train(module.training).requires_grad_(True)


def _unsayable(module: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"the config of {type(module).__name__} cannot say what would be left",
        why=why,
        fix="fewer neurons can always be said; where a head is as wide as channels over heads, cut both by one share",
    )
