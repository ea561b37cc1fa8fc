"""Generators of pictures, made from a shape alone, and what their pictures should be to a teacher and its student.

    L_G = oh · CE(t, y) + adv · (−D(t, s)) + bn · R + bal · Σ p̄ log p̄ − act · |f|

t, s: logits of teacher and student; D: KL(t ‖ s), or what a method gives in its place; y: the class asked for, or else
the teacher's own choice; R: how far the teacher's statistics are from those of its training data; p̄: the teacher's mean
answer; f: what its last layer reads. The terms and their weights are those of DAFL (1904.01186), ZSKT (1905.09768), DFQ
(2005.04136), CMI (2105.08584) and FastDFKD (2112.06253), checked against the two benchmarks' code (zju-vipa/CMI,
zju-vipa/Fast-Datafree).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import F, nn, torch
from lfm.distilling import statistics
from lfm.models.layers import last_linear
from lfm.train import seeded, state_of
from lfm.train.losses import balance, kl

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.distilling.datafree import Scene
    from lfm.train.state import State

SMALLEST = 8
"""Pixels a side, at most, of what a generator's first layer makes."""
MOMENTS = (0.5, 0.999)
"""Adam's β for generators, as DCGAN's (1511.06434)."""


def generator(shape: tuple[int, int, int], latent: int, width: int = 64) -> nn.Sequential:
    """z (B, latent) → pictures (B, C, H, W) in 0 … 1, of any shape (C, H, W); weights from torch's own generator.

    A linear layer makes 2·width channels of at most 8 pixels a side, which are doubled (twice at least), each time with
    a 3 × 3 convolution, batch norm and a leaky rectifier; the last has width channels.
    """
    channels, *side = shape
    doublings = max(2, math.ceil(math.log2(max(side) / SMALLEST)))
    sizes = [tuple(math.ceil(n / 2**left) for n in side) for left in range(doublings, -1, -1)]
    wide = 2 * width
    layers: list[nn.Module] = [
        nn.Linear(latent, wide * math.prod(sizes[0])),
        nn.Unflatten(1, (wide, *sizes[0])),
        nn.BatchNorm2d(wide),
    ]
    for size in sizes[1:]:
        out = width if size == sizes[-1] and len(layers) > 3 else wide
        layers += [
            nn.Upsample(size),
            nn.Conv2d(wide, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())


class Terms(NamedTuple):
    """The weights of L_G's terms."""

    adv: float = 0.0
    bn: float = 0.0
    oh: float = 0.0
    bal: float = 0.0
    act: float = 0.0


class Pace(NamedTuple):
    """Of making one batch: steps, and Adam's rates for the generator and for z."""

    steps: int
    lr: float = 1e-3
    lr_z: float = 1e-3


Gap = Callable[["Tensor", "Tensor"], "Tensor"]
"""D: the teacher's logits, the student's → how far they are apart, one number a row."""


def divergent(told: Tensor, answered: Tensor) -> Tensor:
    """KL(t ‖ s), in nats, without a bound."""
    return kl(F.log_softmax(told, -1), F.log_softmax(answered, -1))


def wanted(
    terms: Terms,
    told: Tensor,
    *,
    gap: Gap = divergent,
    classes: Tensor | None = None,
    answered: Tensor | None = None,
    strange: Tensor | None = None,
    features: Tensor | None = None,
    agreed: bool = False,
) -> Tensor:
    """L_G, a scalar, of a teacher's logits (B, classes). A term of weight 0 is not computed, and its input not read.

    classes: (B,) those asked for. answered: the student's logits. strange: R. features: (B, …). agreed: only pictures
    of which both say the same class count as adversarial, and the mean is over all of them (2105.08584).
    """
    loss = told.new_zeros(())
    if terms.oh:
        loss = loss + terms.oh * F.cross_entropy(told, told.argmax(-1) if classes is None else classes)
    if terms.adv:
        assert answered is not None
        apart = gap(told, answered)
        if agreed:
            apart = apart * (told.argmax(-1) == answered.argmax(-1))
        loss = loss - terms.adv * apart.mean()
    if terms.bn:
        assert strange is not None
        loss = loss + terms.bn * strange
    if terms.bal:
        loss = loss + terms.bal * balance(told)
    if terms.act:
        assert features is not None
        loss = loss - terms.act * features.abs().mean()
    return loss


def new(scene: Scene, latent: int, width: int, seed: int) -> nn.Sequential:
    """A generator of the scene's pictures, on its device, with weights of that seed."""
    with seeded(seed):
        return generator(scene.frame.shape, latent, width).to(scene.frame.low.device)


class Going(NamedTuple):
    """One generator that goes on. made: pictures of it as it is; stepped: it takes a step down what judges them."""

    made: Callable[[], Tensor]
    stepped: Callable[[], None]
    state: State


def going(
    scene: Scene, judged: Callable[[Tensor], Tensor], lr: float, batch_size: int, latent: int, width: int, seed: int
) -> Going:
    """A new generator, in training mode: its batch norms go by the batch. latent, width: as of `generator`."""
    net = new(scene, latent, width, seed).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=MOMENTS)

    def made() -> Tensor:
        return scene.frame.scaled(net(torch.randn(batch_size, latent).to(scene.frame.low.device)))

    def stepped() -> None:
        optimizer.zero_grad()
        judged(made()).backward()
        optimizer.step()

    return Going(made, stepped, state_of(net, "", optimizer))


def found(
    make: Callable[[], Tensor],
    loss: Callable[[Tensor], tuple[Tensor, Batch]],
    net: nn.Module,
    z: Tensor,
    pace: Pace,
    beside: Sequence[torch.optim.Optimizer] = (),
) -> tuple[Batch, list[Tensor]]:
    """The rows of least loss on the way that net and z take down it, and the sum of net's gradients on that way.

    make: pictures of net and z as they are. loss: pictures → a scalar, and rows to keep. beside: what else it trains.
    The sum is first-order MAML's gradient for where net began (2112.06253).
    """
    groups = [{"params": [*net.parameters()]}, {"params": [z], "lr": pace.lr_z}]
    optimizers = [torch.optim.Adam(groups, lr=pace.lr, betas=MOMENTS), *beside]
    sums = [torch.zeros_like(p) for p in net.parameters()]
    least, best = math.inf, {}
    for _ in range(pace.steps):
        value, rows = loss(make())
        if not best or value.item() < least:
            least, best = value.item(), rows
        for optimizer in optimizers:
            optimizer.zero_grad()
        value.backward()
        for total, parameter in zip(sums, net.parameters()):
            if parameter.grad is not None:
                total += parameter.grad
        for optimizer in optimizers:
            optimizer.step()
    return best, sums


@contextmanager
def judge(scene: Scene, terms: Terms, *, gap: Gap = divergent, agreed: bool = False) -> Iterator[Callable[..., Tensor]]:
    """(pictures, the classes asked for or None, adversarial=True) → L_G, with a gradient for the pictures.

    adversarial=False leaves adv out, as before a student knows anything. R is of the teacher's batch norms, and 0 of a
    teacher that has none.
    """
    module = scene.module
    assert module is not None
    with (
        statistics.matched(module, statistics.stored(module) if terms.bn else {}) as strange,
        read_by([module.get_submodule(last_linear(module))] if terms.act else []) as features,
    ):

        def judged(images: Tensor, classes: Tensor | None = None, adversarial: bool = True) -> Tensor:
            told = scene.asked(images)
            now = terms if adversarial else terms._replace(adv=0.0)
            return wanted(
                now,
                told,
                gap=gap,
                classes=classes,
                answered=scene.answer(images) if now.adv else None,
                strange=strange().to(told) if terms.bn else None,
                features=features[0] if terms.act else None,
                agreed=agreed,
            )

        yield judged


@contextmanager
def read_by(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What each layer reads, by its place; every forward pass inside the block puts in anew."""
    heard: list[Tensor] = [torch.empty(0)] * len(layers)

    def put(place: int, _: Any, given: Any) -> None:
        heard[place] = given[0]

    handles = [layer.register_forward_pre_hook(partial(put, place)) for place, layer in enumerate(layers)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def cropped(images: Tensor, least: float) -> Tensor:
    """A part of the pictures, of so much of the area at least, as large as the whole; the same place in all of them."""
    height, width = images.shape[-2:]
    side = math.sqrt(least + (1 - least) * torch.rand(()).item())
    tall, wide = max(1, round(side * height)), max(1, round(side * width))
    top, left = (int(torch.randint(0, room + 1, ())) for room in (height - tall, width - wide))
    part = images[..., top : top + tall, left : left + wide]
    return F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
