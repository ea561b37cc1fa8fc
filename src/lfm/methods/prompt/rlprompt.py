"""Learn to write a prompt of a few tokens: a policy over a frozen small model, by soft Q-learning from scores alone.

    π(z_t | z_{<t}) = softmax(W_head · MLP_θ(h_t)) within its top k,    prompt z of 5 tokens after the text
    R(z) = mean over records of λ · (p(y) − max_{c ≠ y} p(c)),  λ = 200 where that is positive, else 180
    r = 5 · (R − mean of the batch's prompts) / std;   θ by path consistency against a slowly following target θ̄

Paper: RLPrompt, arXiv 2205.12548, and its code (mingkaid/rl-prompt): MLP of one hidden layer of 2048 with ReLU, begun
at almost nothing; 16 prompts a step; Adam 5e-5, gradients clipped at 5; θ̄ ← θ̄ + 0.001 (θ − θ̄). Every `dev_every` steps
the greedy prompt is held against the dev records, by R; no prompt at all is a candidate, so that the kept one is never
worse on the records that choose. Tokens that are special, or that hold a brace, are never drawn.

Model: Logprobs, Top (bounds, of which the middle is taken) or Text (p is then 0 or 1). Policy: Gradients and Codec of a
causal language model, which may be another, local one; the model itself by default. Data: train to be rewarded by, dev
to choose by (else what train has beyond `examples`, else train). Result: a program of the prompt and the model, which
gives Classes. Errors: AccessError where nobody can be the policy; ConfigError for a template without {prompt}.

    lfm run prompt.rlprompt model=model train=train.jsonl --set steps=4 --set prompts=4 --set hidden=16 --out prompted
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

import lfm.core
from lfm import prompting
from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import AccessError, ConfigError
from lfm.core.heavy import np
from lfm.data.records import Label, Pair
from lfm.models.program import program
from lfm.prompting.classifier import Classifier, Prompt, labels_of, questions, read, verbalizer
from lfm.prompting.examples import ask_ahead
from lfm.prompting.policy import Policy
from lfm.prompting.reading import Reader
from lfm.prompting.replaying import replayed
from lfm.prompting.shots import shots
from lfm.prompting.template import checked

if TYPE_CHECKING:
    from numpy.typing import NDArray

ID = "prompt.rlprompt"
GAP = "{prompt}"
SHAPED = 5.0
"""What a standard deviation of rewards counts."""


class Config(lfm.core.Config, frozen=True):
    length: Annotated[int, Meta(ge=1, description="tokens of the prompt")] = 5
    steps: Annotated[int, Meta(ge=1, description="of the policy's training")] = 12000
    prompts: Annotated[int, Meta(ge=2, description="drawn a step")] = 16
    batch: Annotated[int, Meta(ge=1, description="records that a step's prompts are rewarded by")] = 16
    top_k: Annotated[int, Meta(ge=1, description="tokens among which each is drawn")] = 256
    lr: Annotated[float, Meta(gt=0, description="Adam's")] = 5e-5
    hidden: Annotated[int, Meta(ge=1, description="width of the policy's MLP")] = 2048
    follow: Annotated[float, Meta(gt=0, le=1, description="of the difference that the target makes up a step")] = 0.001
    right: Annotated[float, Meta(gt=0, description="λ of a margin that is right")] = 200.0
    wrong: Annotated[float, Meta(gt=0, description="λ of a margin that is wrong")] = 180.0
    dev_every: Annotated[int, Meta(ge=1, description="steps between looks at the dev records")] = 10
    template: Annotated[str, Meta(description="how a record is asked: {text}, {text_b}, {prompt}, {mask}")] = (
        "{text} {prompt} {mask}"
    )
    words: Annotated[dict[str, tuple[str, ...]], Meta(description="label → words; the label if absent")] = (
        msgspec.field(default_factory=dict)
    )
    examples: Annotated[int, Meta(ge=2, description="most records to be rewarded by, and to choose by")] = 32


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    train, rest = shots(inputs, config.examples, run.seed_for("examples"))
    dev = rest or train
    labels = labels_of(train, dev)
    bare = Prompt(words=verbalizer(labels, config.words))
    reader = Reader(model)
    policy = Policy(
        (inputs.all("policy") or (model,))[0],
        length=config.length,
        hidden=config.hidden,
        lr=config.lr,
        follow=config.follow,
        seed=run.seed_for("policy"),
    )

    def rewarded(texts: Sequence[str], records: Sequence[Label | Pair]) -> list[float]:
        prompts = [worded(bare, config.template, text) for text in texts]
        return rewards(reader, prompts, records, labels, config).tolist()

    def act(step: int, known: list[float] | None) -> list[float]:
        start = step * config.batch % len(train)
        records = (train * 2)[start : start + min(config.batch, len(train))]
        actions, seen = policy.draw(config.prompts, config.top_k, run.generator("draw", step))
        values = known or rewarded([policy.text(row) for row in actions], records)
        policy.learn(actions, seen, shaped(values))
        return values

    kept, best = "", run.step("none", lambda: rewarded([""], dev))[0]
    first, marks = best, {"": best}
    for start in run.track(range(0, config.steps, config.dev_every), f"{config.dev_every} steps"):
        steps = range(start, min(start + config.dev_every, config.steps))
        for values in replayed(run, f"steps {start}", steps, act):
            run.curve("train reward", float(np.mean(values)))
        text = policy.text(policy.greedy())
        if text not in marks:
            marks[text] = run.step(f"dev {start}", lambda text=text: rewarded([text], dev))[0]
        run.curve("dev reward", marks[text])
        if marks[text] > best:
            kept, best = text, marks[text]
    run.note(prompt=kept, reward_before=first, reward_after=best)
    classifier = Classifier(labels=labels, prompts=(worded(bare, config.template, kept),))
    return program(ID, config, Parts({"model": (model,)}, {}, msgspec.to_builtins(classifier)), opened)


def worded(bare: Prompt, template: str, text: str) -> Prompt:
    """The template with the prompt in its place; without one, the space before it goes too."""
    return msgspec.structs.replace(bare, template=template.replace(GAP if text else f" {GAP}", text).replace(GAP, ""))


def rewards(
    reader: Reader, prompts: Sequence[Prompt], records: Sequence[Label | Pair], labels: Sequence[str], config: Config
) -> NDArray[np.float64]:
    """R of each prompt."""
    ask_ahead(reader, prompts, [records] * len(prompts))
    shares = np.exp(np.stack([read(reader, prompt, records).logp for prompt in prompts]))
    return margins(shares, [labels.index(record.label) for record in records], config).mean(1)


def margins(shares: NDArray[np.float64], right: Sequence[int], config: Config) -> NDArray[np.float64]:
    """(prompts, n) λ · (p(y) − max of the others) from (prompts, n, classes)."""
    rows, places = np.arange(len(right)), np.array(right)
    others = shares.copy()
    others[:, rows, places] = -1.0
    gap = shares[:, rows, places] - others.max(2)
    return gap * np.where(gap > 0, config.right, config.wrong)


def shaped(values: Sequence[float]) -> list[float]:
    """Rewards of a step's prompts in standard deviations from their mean, times SHAPED."""
    array = np.array(values)
    return (SHAPED * (array - array.mean()) / (array.std() + 1e-4)).tolist()


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The model behind the saved prompt."""
    return prompting.interfaces(parts.model("model"), msgspec.convert(parts.state, Classifier))


def agree(config: Config, inputs: Inputs) -> None:
    model = inputs.model("model")
    verbalizer(labels_of(inputs.records("train"), inputs.records("dev")), config.words)
    if config.template.count(GAP) != 1:
        raise ConfigError(f"template {config.template!r} has no place for the prompt", fix=f"name {GAP} in it, once")
    checked(config.template.replace(GAP, ""), fills=model.facts.task == "masked-lm")
    policy = (inputs.all("policy") or (model,))[0]
    if not policy.can(Gradients, Codec) or policy.facts.task != "causal-lm":
        here = policy.can(Gradients, Codec)
        raise AccessError(
            f"{policy.ref} cannot be the policy",
            why=f"it is a model for {policy.facts.task}, and no causal language model"
            if here
            else "that takes the module of a causal language model, and of this model answers alone are given",
            fix="add policy=REF, a small local one",
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    """The most that it can take; a prompt that is drawn again is not asked again."""
    facts, train = sizes.model("model"), sizes.data["train"]
    policy = sizes.models.get("policy", sizes.models["model"])[0]
    rows = min(train.records, config.examples, config.batch)
    dev = min(sizes.data["dev"].records if "dev" in sizes.data else train.records, config.examples)
    looks = 2 + config.steps // config.dev_every
    asked = (config.steps * config.prompts * rows + looks * dev) * questions(sizes, config.words)
    tokens = int(asked * (train.tokens / max(train.records, 1) + config.length + len(config.template)))
    walked = config.steps * config.prompts * config.length**2
    return Cost(
        flops=2.0 * facts.parameters * tokens + 4.0 * policy.parameters * walked,
        steps=config.steps,
        memory=4 * (2 * facts.parameters + policy.parameters + 8 * config.hidden * policy.width),
        disk=20_000,
        queries=asked,
        tokens=tokens,
    )


METHOD = Method(
    paper="https://arxiv.org/abs/2205.12548",
    config=Config,
    models={
        "model": Slot((), any_of=prompting.ACCESS, also=(Gradients, Codec), help="the model to prompt"),
        "policy": Slot((Gradients, Codec), min=0, help="a small language model that writes; the model by default"),
    },
    data={
        "train": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), help="a few examples of each class"),
        "dev": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), optional=True, help="to choose the best prompt by"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=opened,
)
