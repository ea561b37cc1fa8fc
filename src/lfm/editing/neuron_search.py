"""How a neuron for an edit is found: it must fire where the object is not said yet, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from lfm.core.heavy import F, nn, torch
from lfm.core.interfaces import Batch
from lfm.core.method import Run
from lfm.data.records import Edit
from lfm.editing import asking, form, memory, neurons, recall
from lfm.editing.rows import IGNORED
from lfm.models import forward, structure
from lfm.models.resume import activations, recording, resumed
from lfm.train import Fit, fit

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.editing.asking import Asked
    from lfm.editing.setting import Setting
    from lfm.models.resume import Begun

TOP = 1000
"""Of the memory's losses the largest so many count (the authors' code)."""


LEAK = 0.0041
RIDGE = 0.1
"""Of the squares of how far others lie from a mistake, what a key's own square weighs as it begins."""
ROUNDS, TINY = 30, 1e-12
LEAST = 0.2
"""Least that a key is stretched from: where others cannot be told from the mistake, stretching tells them no better."""


class Losses(NamedTuple):
    """Weights of the activation's and the memory's loss. margin: what others' pre-activations must stay below, negated,
    and what the mistake's must exceed them by."""

    activation: float
    memory: float
    margin: float


class Place(NamedTuple):
    """Where edits' objects are not said yet: n mistakes, by row (n,) and token (n,); x (n, width) what is read there;
    own (n, M, width) what must not make each fire, beside the text, and how many of these there are (n,)."""

    rows: Asked
    begun: Begun | None
    row: Tensor
    token: Tensor
    x: Tensor
    own: Tensor
    many: Tensor


def places(here: Setting, block: int, edits: Sequence[Edit], run: Run) -> Place:
    """The tokens of each edit's object that the model, given those before, does not say; at least the first. In an
    encoder, which says nothing, the subject's last."""
    rows, site = asking.of(here, block, edits), form.at(here.module, "ffn_in", block)
    with torch.no_grad(), recording(here.module, block) as begun, structure.watch(here.module, [site]) as x:
        said = forward(here.module, rows.batch).argmax(-1).cpu()
    wrong = rows.leads
    if rows.leads.shape == said.shape:
        wrong = rows.leads & (said != rows.labels)
        wrong = torch.where(wrong.any(1, keepdim=True), wrong, rows.kept)
    row, token = wrong.nonzero(as_tuple=True)
    read = x[0].float().cpu()
    rest = rows.real & ~rows.leads
    beside = [_beside(here, block, edit, read[i, rest[i]], run) for i, edit in enumerate(edits)]
    long = max(1, *map(len, beside))
    own = torch.stack([F.pad(each, (0, 0, 0, long - len(each))) for each in beside])
    count = torch.tensor([len(each) for each in beside])
    return Place(rows, begun[0] if begun else None, row, token, read[row, token], own[row], count[row])


def _beside(here: Setting, block: int, edit: Edit, before: Tensor, run: Run) -> Tensor:
    """(M, width): what is read at the prompt's other tokens, and where the prompt has another subject."""
    return torch.cat([before, *asking.read_at(here, "ffn_in", block, recall.others_of(here, edit, run))])


def pushed(pre: Tensor, others: Tensor, losses: Losses) -> Tensor:
    """(n,) what a neuron loses with these pre-activations at its mistake (n,) and elsewhere (m, n), −∞ where none is.

    a log(1 + e^{−pre}) + m (log(1 + mean of the TOP largest e^{other − pre + margin}) + the same of
    e^{other + margin}): small losses are the paper's, large ones pull no harder than others.
    """
    top = others.topk(min(TOP, len(others)), dim=0).values
    count = math.log(len(top))
    near, far = ((top + losses.margin + more).logsumexp(0) - count for more in (-pre, torch.zeros_like(pre)))
    return losses.activation * F.softplus(-pre) + losses.memory * (F.softplus(near) + F.softplus(far))


def begin(x: Tensor, others: Tensor, far: float) -> tuple[Tensor, Tensor]:
    """(key, bias) of a neuron that is at `far` on x (width,), and at −far on the nearest of the others (m, width).

    The direction is that of a support vector machine of squared hinges, by Newton's method (Keerthi and DeCoste 2005):
    again and again least squares over those that lie less than one below x. Where some cannot be told from x, those
    stay above −far.
    """
    apart = (others - x).cpu().double()
    key = torch.zeros(len(x), dtype=torch.double)
    ridge = (RIDGE * apart.square().mean() + TINY) * torch.eye(len(x), dtype=torch.double)
    active = torch.ones(len(apart), dtype=torch.bool)
    for _ in range(ROUNDS):
        some = apart[active]
        key = -torch.linalg.solve(some.T @ some + ridge, some.sum(0))
        before, active = active, apart @ key > -1
        if torch.equal(before, active) or not active.any():
            break
    below = -(apart @ key).max().clamp(max=-LEAST)
    key = (2 * far / below * key).to(x)
    return key, far - key @ x


def quiet(act: Callable[[Tensor], Tensor]) -> float:
    """The margin from which on down an activation stays within what GELU has at the authors' −3; 1 where it is less."""
    below = torch.arange(1.0, 20.0, 0.5)
    loud = below[act(-below).abs() > LEAK]
    return float(loud.max()) + 0.5 if len(loud) else 1.0


def calibrated(
    here: Setting, block: int, edits: Sequence[Edit], slots: int, weight: float, config: Fit, run: Run, name: str
) -> dict[str, Tensor]:
    """keys, biases (0) and values of slots that all edits share, trained on their new objects (2210.03329); weight is
    that of what they write elsewhere, its square over the layer's."""
    width = structure.feed_forward(here.module, structure.all_blocks(here.module)[block]).width
    act = structure.activation(here.module, structure.all_blocks(here.module)[block])
    texts = torch.cat(recall.read(here, "ffn_in", block, here.text))
    texts = texts[:: -(-len(texts) // TOP)].to(next(here.module.parameters()).device)
    unit = float(texts.square().mean().sqrt() * width)
    key = torch.randn(slots, width, generator=run.generator("slots")) * (width**0.5)
    trained = nn.ParameterDict({"key": nn.Parameter(key), "value": nn.Parameter(torch.zeros(slots, width))})
    written = torch.cat(recall.read(here, "ffn_out", block, here.probe))
    scale = float(written.square().mean().sqrt())
    prefixes = here.prefixes

    def found(trained: Any) -> tuple[Tensor, Tensor]:
        return trained["key"] / unit, trained["value"] * scale

    def loss(trained: nn.Module, batch: Batch) -> Tensor:
        keys, values = found(trained)
        off = neurons.beside(here.module, block, lambda x: act(F.linear(x.to(keys), keys)) @ values)
        try:
            told = asking.answer_logprobs(forward(here.module, batch), batch["labels"])
        finally:
            off()
        beside = (act(F.linear(texts, keys)) @ values).square().mean() / scale**2
        return -(told / (batch["labels"] != IGNORED).sum(1)).mean() + weight * beside

    def collate(worded: Sequence[Edit]) -> Batch:
        asked = asking.of(here, block, worded)
        return {**asked.batch, "labels": asked.labels}

    worded = [replace(edit, prompt=prefix + edit.prompt) for edit in edits for prefix in prefixes]
    fit(trained, worded, collate, loss, config, run, name=name)
    keys, values = (tensor.detach().cpu() for tensor in found(trained))
    return {"keys": keys, "biases": torch.zeros(slots), "values": values}


def search(
    here: Setting, block: int, edits: Sequence[Edit], text: Tensor, losses: Losses, config: Fit, run: Run, name: str
) -> dict[str, Tensor]:
    """owner, keys, biases and values of the edits' neurons, and the probability (n_edits,) of each new object with its
    own. Each edit's are found as if it were alone; text (m, width) is what must not make them fire."""
    where = places(here, block, edits, run)
    home = next(here.module.parameters()).device
    act = structure.activation(here.module, structure.all_blocks(here.module)[block])
    x, own, text = where.x.to(home), where.own.to(home), text.to(home)
    real = (torch.arange(own.shape[1]) < where.many[:, None]).to(home)
    row, token = where.row.to(home), where.token.to(home)
    # what text says of the fact itself lies nearer than any other subject: there it should fire
    near = torch.where(real, (own - x[:, None]).norm(dim=2), torch.inf).amin(1)
    near = torch.where(real.any(1), near, 0.0)  # nothing of its own: all of the text is held
    held = memory.distances(text, x) >= near
    with resumed(here.module, where.begun):
        (out,) = activations(here.module, where.rows.batch, [form.at(here.module, "ffn_out", block)])
    scale = out[row, token].float().norm(dim=1, keepdim=True)
    norm, width = x.norm(dim=1, keepdim=True), x.shape[1]
    unit = norm * width**0.5
    start, bias = zip(
        *(begin(x[i], torch.cat([text[held[:, i]], own[i][real[i]]]), losses.margin) for i in range(len(x))),
        strict=True,
    )
    # entries of about 1, whatever the model's scale: one rate suits all
    trained = nn.ParameterDict(
        {
            "key": nn.Parameter(torch.stack(start) * unit),
            "bias": nn.Parameter(torch.stack(bias)),
            "value": nn.Parameter(torch.zeros_like(x)),
        }
    )
    mine = row == torch.arange(len(edits), device=home)[:, None]  # (rows, n): whose neuron it is
    asked = where.rows.lengths.to(home)

    def found(trained: Any) -> tuple[Tensor, Tensor, Tensor]:
        return trained["key"] / unit, trained["bias"], trained["value"] * scale / width**0.5

    def told(trained: Any) -> Tensor:
        keys, biases, values = found(trained)

        def more(read: Tensor) -> Tensor:
            return (act(F.linear(read.to(keys), keys, biases)) * mine[:, None]) @ values

        off = neurons.beside(here.module, block, more)
        try:
            with resumed(here.module, where.begun):
                return asking.answer_logprobs(forward(here.module, where.rows.batch), where.rows.labels)
        finally:
            off()

    def loss(trained: nn.Module, _: Any) -> Tensor:
        keys, biases, _ = found(trained)
        pre = (x * keys).sum(1) + biases
        beside = torch.where(real, (own * keys[:, None]).sum(2) + biases[:, None], -torch.inf)
        others = torch.cat([torch.where(held, F.linear(text, keys, biases), -torch.inf), beside.T])
        return -(told(trained) / asked).sum() + pushed(pre, others, losses).sum()

    fit(trained, [0], lambda _: {}, loss, config, run, name=name)
    with torch.no_grad():
        keys, biases, values = (tensor.detach().cpu() for tensor in found(trained))
        probability = told(trained).exp().cpu()
    return {"owner": where.row, "keys": keys, "biases": biases, "values": values, "probability": probability}
