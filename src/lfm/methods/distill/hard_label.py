"""Train a student on the classes that a teacher names and nothing else, with no data and so many questions.

    entropy:   x ← generator trained on the student, then up the student's entropy;   L = CE(s(x), class named)
    boundary:  x ← noise, away from the nearest decision;   L = CE + T² KL(softmax(soft label / T) ‖ s_T),
               soft label of class c ∝ 1 / distance to where the teacher says c

Paper: Data-free hard-label robustness stealing, arXiv 2312.05924 (`entropy`); Zero-shot knowledge distillation from a
decision-based black-box model, 2106.03310 (`boundary`). In `entropy` the generator wants the student sure of a drawn
class and all classes as frequent, its pictures are moved by signs to where the student is least sure, and the teacher
is asked about those. `queries` is never passed, and spent to within one picture's worth; what was answered is kept, so
that a killed run pays no question twice.

Differs: `noise` of the questions, half unless told, as far as `bank` keeps them, are first asked about plain noise, and
every class that was named is drawn as often; without, a teacher of digits named two classes for nine in ten pictures,
and students stayed at chance. `entropy` asks once about each picture (there: again at each of the student's steps, 38
million questions for CIFAR-10), and does not turn or crop them. `boundary` asks some tens of questions a picture
(there: up to 5000 for each of 40 moves, 20,000 for each soft label), a fixed number, so that the budget says how many
pictures there are; all that was asked about is learned, what lies on the way with its class alone; a move is `move`
times the root of a picture's size, 1.4 on 28 × 28, and left out where the class would change (there .5, halved until it
stays); soft labels are scaled to `sharp`, on average, for a picture's own class. What either reaches, and how far noise
alone comes: docs/distilling.md.

Models: teacher (Logits, of which only the largest is read; or Classes alone, which is shown pictures of 256 shades, of
the student's size where it says none), student (Gradients), each with Codec or with `image`, `mean` and `std`. Data:
none. Errors: MismatchError and ConfigError before any weight is read; ConfigError where `queries` are too few;
DivergedError.

    lfm run distill.hard_label teacher=big student=small --set queries=300 --set rounds=4 --set steps=20 --out taught
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from lfm.core import Codec, Cost, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError
from lfm.core.heavy import F, torch
from lfm.core.interfaces import Classes
from lfm.data.records import Image
from lfm.distilling import datafree, deciding, generator
from lfm.distilling.datafree import PIXELS, DataFree, Scene, Teacher
from lfm.distilling.generator import Pace
from lfm.distilling.telling import TOLD, gap
from lfm.train import state_of
from lfm.train.losses import balance, entropy
from lfm.train.state import State

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.distilling.bank import Bank
    from lfm.distilling.pictures import Frame

NAMED = "named"
"""In the bank: the class that the teacher named."""
CHUNK = 256
"""Pictures that the teacher is given at a time."""
AT_ONCE = 4
"""Batches that the generator makes at a time."""


class Config(DataFree, frozen=True):
    kind: Annotated[Literal["entropy", "boundary"], Meta(description="what is asked about")] = "entropy"
    queries: Annotated[int, Meta(ge=1, description="most pictures that the teacher is asked about")] = 20000
    bank: Annotated[int, Meta(ge=0, description="pictures kept at most; 0: what a GiB holds of those asked about")] = 0
    noise: Annotated[float, Meta(ge=0, le=1, description="of entropy: share of `queries` for noise, at first")] = 0.5
    rounds: Annotated[int, Meta(ge=1, description="of entropy: batches of questions, spread over the steps")] = 40
    generator_steps: Annotated[int, Meta(ge=1, description="of entropy: the generator's steps a round")] = 10
    generator_lr: Annotated[float, Meta(gt=0, description="of entropy: rate of the generator (Adam)")] = 2e-3
    latent_lr: Annotated[float, Meta(gt=0, description="of entropy: rate of z")] = 1e-2
    bal: Annotated[float, Meta(ge=0, description="of entropy: weight of classes being as frequent")] = 1.3
    smooth: Annotated[float, Meta(ge=0, lt=1, description="of entropy: share of other classes in those drawn")] = 0.2
    climbs: Annotated[int, Meta(ge=0, description="of entropy: steps up the student's entropy")] = 10
    climb: Annotated[float, Meta(ge=0, description="of entropy: size of those steps, in units of white")] = 0.03
    latent: Annotated[int, Meta(ge=1, description="of entropy: numbers that a picture is made from")] = 256
    width: Annotated[int, Meta(ge=1, description="of entropy: channels of the generator's last layer")] = 64
    tries: Annotated[int, Meta(ge=1, description="of boundary: noise asked about for each picture kept")] = 4
    moves: Annotated[int, Meta(ge=0, description="of boundary: moves away from the nearest decision")] = 3
    ways: Annotated[int, Meta(ge=1, description="of boundary: directions tried before each")] = 4
    move: Annotated[float, Meta(gt=0, description="of boundary: length of a move, by the sides' root, of white")] = 0.05
    halvings: Annotated[int, Meta(ge=1, description="of boundary: halvings of a distance")] = 6
    refine: Annotated[int, Meta(ge=0, description="of boundary: directions drawn to come nearer; 0: none")] = 0
    sharp: Annotated[float, Meta(gt=0, description="of boundary: mean soft label of the own class")] = 10.0


Ask = Callable[["Tensor", str], "Tensor"]
"""(pictures (n, C, H, W), a name for the question) → their classes (n,); each picture is a query."""


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    scene = datafree.scene(config, teacher, student, run, Teacher(lambda images: named(teacher, scene.frame, images)))
    enough(config, scene.classes)

    def ask(images: Tensor, name: str) -> Tensor:
        """What was answered under that name, or is now; kept as it comes. Counted either way: it is one question."""
        before = scene.asked.queries
        parts = [
            run.once(f"{name} {i * CHUNK}", lambda part=part: scene.asked(part).cpu())
            for i, part in enumerate(images.split(CHUNK))
        ]
        scene.asked.queries = before + len(images)
        return torch.cat(parts).to(images.device)

    synthesise, beside = (exploring if config.kind == "entropy" else measuring)(config, scene, ask, run)

    def loss(rows: Batch) -> Tensor:
        answered = scene.answer(rows[PIXELS])
        hard = F.cross_entropy(answered, rows[NAMED])
        return hard + gap(answered, rows, config.temperature, config.divergence) if TOLD in rows else hard

    kept = msgspec.structs.replace(config, bank=room(config, scene.frame.shape))
    datafree.distil(scene, synthesise, kept, run, loss=loss, beside=beside, even=NAMED)
    return student.ask(Gradients).rewrap(scene.student)


def room(config: Config, shape: tuple[int, ...]) -> int:
    """How many pictures (C, H, W) are kept: as told, or all that a GiB holds (a batch at least)."""
    held = 2**30 // (4 * math.prod(shape))
    return config.bank or max(config.batch_size, min(config.queries, held))


def named(teacher: Model, frame: Frame, images: Tensor) -> Tensor:
    """The number of the class (n,) that the teacher names of pictures (n, C, H, W): all that is read of its answer."""
    if not datafree.names(teacher):
        return teacher.ask(Logits).logits({PIXELS: images}).argmax(-1).to(images.device)
    told = teacher.ask(Classes).tell([Image(image=picture, label="") for picture in frame.shown(images)])
    return torch.from_numpy(told.argmax(-1)).to(images.device)


Made = tuple[Callable[[int, "Bank"], "Batch | None"], Mapping[str, State]]


def exploring(config: Config, scene: Scene, ask: Ask, run: Run) -> Made:
    """Rounds of pictures about which the student is least sure; the last one's number is what is left of the budget."""
    place = scene.frame.low.device
    net = generator.new(scene, config.latent, config.width, run.seed_for("generator")).train()
    first = min(noisy(config), room(config, scene.frame.shape))  # what gives way before a step is learned by nobody
    left = config.queries - first
    rounds = min(config.rounds, left, config.steps)
    ends = [left * (i + 1) // rounds for i in range(rounds)]
    begins = {config.steps * i // rounds: i for i in range(rounds)}
    pace = Pace(config.generator_steps, config.generator_lr, config.latent_lr)

    def synthesise(step: int, bank: Bank) -> Batch | None:
        draw = run.generator("noise")
        for done in range(0, first if step == 0 else 0, CHUNK):
            unit = deciding.noise(min(CHUNK, first - done), scene.frame.shape, draw)
            images = scene.frame.scaled(unit.to(place))
            bank.add({PIXELS: images, NAMED: ask(images, f"noise {done}")})
        if step not in begins:
            return None
        number = begins[step]
        many = ends[number] - (ends[number - 1] if number else 0)
        once = AT_ONCE * config.batch_size
        images = torch.cat([pictures(min(once, many - done)) for done in range(0, many, once)])
        return {PIXELS: images, NAMED: ask(images, f"named {number}")}

    def pictures(many: int) -> Tensor:
        wanted = torch.randint(scene.classes, (many,)).to(place)
        z = torch.randn(max(many, 2), config.latent).to(place).requires_grad_()  # a batch norm wants two

        def loss(images: Tensor) -> tuple[Tensor, Batch]:
            told = scene.answer(images)[:many]
            return drawn(told, wanted, config.smooth, config.bal), {PIXELS: images.detach()[:many]}

        # z has a rate of its own and starts anew; the generator goes on, its moments do not
        best, _ = generator.found(lambda: scene.frame.scaled(net(z)), loss, net, z, pace)
        return least_sure(best[PIXELS], scene, config.climbs, config.climb)

    return synthesise, {"generator": state_of(net, "")}


def noisy(config: Config) -> int:
    """Of `entropy`'s questions, those about noise."""
    return int(config.noise * config.queries)


def drawn(told: Tensor, classes: Tensor, smooth: float, bal: float) -> Tensor:
    """KL(smoothed class ‖ softmax(told)) + bal · Σ p̄ log p̄: what `entropy`'s generator goes down."""
    wanted = torch.full_like(told, smooth / (told.shape[-1] - 1)).scatter(1, classes[:, None], 1 - smooth)
    return F.kl_div(F.log_softmax(told, -1), wanted, reduction="batchmean") + bal * balance(told)


def least_sure(images: Tensor, scene: Scene, climbs: int, climb: float) -> Tensor:
    """Pictures after so many steps of signs up the entropy of the student's answers, between black and white."""
    spread = scene.frame.high - scene.frame.low
    images = scene.frame.clamp(images + 0.001 * spread * torch.randn(images.shape).to(images))
    for _ in range(climbs):
        images.requires_grad_(True)
        slope = torch.autograd.grad(entropy(scene.answer(images)), images)[0]
        images = scene.frame.clamp(images.detach() + climb * spread * slope.sign())
    return images.detach()


def measuring(config: Config, scene: Scene, ask: Ask, run: Run) -> Made:
    """All pictures and their soft labels, before the student's first step."""

    def synthesise(step: int, bank: Bank) -> Batch | None:
        return measured(config, scene, ask, bank, run) if step == 0 else None

    return synthesise, {}


def each(config: Config, classes: int) -> int:
    """Questions that a picture takes in `boundary`."""
    move = config.ways * (1 + config.halvings) + 1
    label = config.halvings + (config.refine + 1 + config.halvings if config.refine else 0)
    return config.tries + config.moves * move + (classes - 1) * label


def measured(config: Config, scene: Scene, ask: Ask, bank: Bank, run: Run) -> Batch:
    """Noise of all classes that is found, moved away from decisions, with the distances to others as soft labels.

    All else that is asked about on the way goes into the bank with the class named alone: it is paid for.
    """
    frame, draw = scene.frame, run.generator("boundary")
    many = config.queries // each(config, scene.classes)
    asked = 0

    def decide(unit: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        images = frame.scaled(unit.clamp(0, 1))
        told = ask(images, f"decided {asked}")
        alone = config.sharp * F.one_hot(told, scene.classes).to(images)
        bank.add({PIXELS: images, NAMED: told, TOLD: alone})
        return told

    x = deciding.noise(many * config.tries, frame.shape, draw).to(frame.low)
    own = decide(x)
    kept = deciding.rarest(own, many)
    x, own = x[kept], own[kept]
    length = config.move * math.sqrt(math.prod(frame.shape))
    for _ in range(config.moves):
        x = deciding.away(decide, x, own, ways=config.ways, halvings=config.halvings, length=length, generator=draw)
    found = deciding.distances(
        decide, x, own, scene.classes, halvings=config.halvings, refine=config.refine, generator=draw
    )
    logits = deciding.soft(found, own)
    mean = logits.max(-1).values.mean().clamp(min=1e-12)
    return {PIXELS: frame.scaled(x), NAMED: own, TOLD: config.sharp * logits / mean}


def agree(config: Config, inputs: Inputs) -> None:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    datafree.agree(config, teacher, student)
    if config.kind == "entropy":
        datafree.unread(config, ("temperature", "divergence"), "what kind=entropy learns is the class that was named")
    if datafree.names(teacher) and config.image and config.image[0] not in (1, 3):
        raise ConfigError(
            f"pictures of {config.image[0]} channels cannot be shown",
            why="a teacher that names classes is shown grey ones or coloured ones",
            fix="image=[1,28,28] or image=[3,32,32], or as the student reads them",
        )
    if classes := len(datafree.labels_of(teacher)) or len(student.facts.labels):
        enough(config, classes)


def enough(config: Config, classes: int) -> None:
    """ConfigError where the budget is too small for what is to be asked."""
    left, rounds = config.queries - noisy(config), min(config.rounds, config.steps)
    if config.kind == "entropy" and 0 < left < rounds:
        raise ConfigError(
            f"{config.queries} queries are too few for {rounds} rounds",
            why=f"{left} are left to them by noise={config.noise:g}",
            fix=f"rounds={left}",
        )
    if config.kind == "boundary" and config.queries < (least := 2 * each(config, classes)):
        raise ConfigError(f"{config.queries} queries measure fewer than two pictures", fix=f"queries={least} or more")


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    asked = config.queries
    if config.kind == "boundary" and teacher.labels:
        asked -= asked % each(config, len(teacher.labels))
    kept = room(config, datafree.size_of(config, teacher, student))
    return datafree.costs(msgspec.structs.replace(config, bank=kept), teacher, student, 0, 0, asked)


METHOD = Method(
    paper="arXiv:2312.05924",
    config=Config,
    models={
        "teacher": Slot(
            (), any_of=(Classes, Logits), also=(Codec,), help="the classifier of images whose classes are learned"
        ),
        "student": Slot((Gradients,), also=(Codec,), help="the classifier that learns them"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
