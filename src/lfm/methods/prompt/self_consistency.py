"""Ask several times and take the answer that is given most often.

    answer(x) = argmax_a Σ_{i=1}^n 1[a = final(sᵢ)],   sᵢ sampled after x at a temperature
    P(c | x) = (votes for c + 1) / (votes + classes)

Paper: Self-Consistency Improves Chain of Thought Reasoning, arXiv 2203.11171 (n = 40, unweighted majority; of equal
ones the first given here). The final answer is what `answer` finds last in a sample, else its last line; letter case
and punctuation at its ends do not count. It helps where the right answer is likelier than any other one, and harms
where it is not: n votes sharpen what the model believes. Votes for no class are not counted.

Model: Text. Data: train, optional: its labels are classes; `words` names them too. Result: a program that gives Text
(the answer alone, n queries each) and, where labels are known, Classes. Its answers are the same for the same prompts
in the same order. Errors: ConfigError for an `answer` that is no regular expression.

    lfm run prompt.self_consistency model=model --set samples=5 --set 'answer="Answer: (\\\\w+)"' --out voted
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, final

import msgspec

import lfm.core
from lfm.core import Cost, Data, DataSlot, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot, Text
from lfm.core.errors import ConfigError
from lfm.core.heavy import np
from lfm.core.interfaces import Classes, Said, said_by
from lfm.data.answers import EDGES, begins_with, elected, final_answer
from lfm.data.records import Label
from lfm.data.wording import spaced
from lfm.models.language import cut
from lfm.models.program import program
from lfm.prompting.classifier import labels_of, verbalizer
from lfm.prompting.template import checked, filled

if TYPE_CHECKING:
    from numpy.typing import NDArray

ID = "prompt.self_consistency"


class Config(lfm.core.Config, frozen=True):
    samples: Annotated[int, Meta(ge=1, description="answers that vote; a query each")] = 40
    temperature: Annotated[float, Meta(gt=0, description="that they are sampled at")] = 0.7
    max_tokens: Annotated[int, Meta(ge=1, description="of a sample, its reasoning included")] = 128
    answer: Annotated[
        str, Meta(description="regular expression of the final answer, its first group; the last match")
    ] = ""
    stop: Annotated[tuple[str, ...], Meta(description="what ends a sample")] = ("\n\n",)
    template: Annotated[str, Meta(description="how a record is asked; empty: its own wording")] = ""
    words: Annotated[dict[str, tuple[str, ...]], Meta(description="label → words; the label if absent")] = (
        msgspec.field(default_factory=dict)
    )


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model, labels = inputs.model("model"), known(config, inputs)
    for _ in run.track([ID], "votes"):
        pass
    return program(ID, config, Parts({"model": (model,)}, {}, {"labels": list(labels)}), opened)


def known(config: Config, inputs: Inputs) -> tuple[str, ...]:
    """The classes' labels; none where neither words nor records tell them."""
    records = [*inputs.records("train"), *(Label(text="", label=label) for label in config.words)]
    return labels_of(records) if records else ()


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    votes = Votes(parts.model("model"), config)
    labels = tuple(parts.state["labels"])
    given: dict[type, Callable[[], Any]] = {Text: lambda: votes}
    return given | ({Classes: lambda: VotedClasses(votes, labels, config)} if labels else {})


@final
class Votes:
    """Text that is the answer given most often."""

    def __init__(self, model: Model, config: Config) -> None:
        self._model, self._config = model, config

    def samples(self, prompts: Sequence[str], seed: int) -> list[list[str]]:
        """The final answers to each prompt, in the order given; empty where a sample has none."""
        return [[one.text for one in answers] for answers in self.finals(prompts, seed)]

    def finals(self, prompts: Sequence[str], seed: int) -> list[list[Said]]:
        """As samples, with whether the sample was cut."""
        config = self._config
        said = said_by(
            self._model.ask(Text),
            [prompt for prompt in prompts for _ in range(config.samples)],
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            stop=config.stop,
            seed=seed,
        )
        finals = [Said(final_answer(one.text, config.answer), one.cut) for one in said]
        return [finals[i : i + config.samples] for i in range(0, len(finals), config.samples)]

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [one.text for one in self.said(prompts, **how)]

    def said(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Said]:
        """The answers alone, however many tokens the samples took; a vote has no temperature of its own.

        One is cut where every sample that gave it was.
        """
        found = [vote(answers) for answers in self.finals(prompts, seed)]
        return [Said(cut(spaced(prompt, one.text), stop), one.cut) for prompt, one in zip(prompts, found, strict=True)]


def vote(answers: Sequence[Said]) -> Said:
    """The answer given most often, and whether all who gave it were cut."""
    winner = elected([one.text for one in answers])
    same = [one for one in answers if one.text.strip(EDGES).casefold() == winner.strip(EDGES).casefold()]
    return Said(winner, all(one.cut for one in same))


@final
class VotedClasses:
    """Shares of the votes."""

    def __init__(self, votes: Votes, labels: tuple[str, ...], config: Config) -> None:
        self._votes, self.labels, self._config = votes, labels, config

    def tell(self, records: Sequence[Any]) -> NDArray[np.float64]:
        words = verbalizer(self.labels, self._config.words)
        prompts = [filled(self._config.template, record).prompt for record in records]
        counts = np.zeros((len(prompts), len(words)))
        for row, answers in enumerate(self._votes.samples(prompts, seed=0)):
            for answer in answers:
                if (place := named(answer, words)) is not None:
                    counts[row, place] += 1
        return np.log((counts + 1) / (counts + 1).sum(1, keepdims=True))


def named(answer: str, words: Sequence[Sequence[str]]) -> int | None:
    """The class of which the answer begins with a word; of several the longest."""
    heard = answer.strip(EDGES).casefold()
    found = [(len(word), i) for i, group in enumerate(words) for word in group if begins_with(heard, word.casefold())]
    return max(found)[1] if found else None


def agree(config: Config, inputs: Inputs) -> None:
    try:
        re.compile(config.answer)
    except re.error as error:
        raise ConfigError(f"answer {config.answer!r} is no regular expression", why=str(error)) from None
    if labels := known(config, inputs):
        verbalizer(labels, config.words)
    checked(config.template, fills=False)


def cost(config: Config, sizes: Sizes) -> Cost:
    """Making it asks nothing; each prompt that it is asked later takes `samples` queries."""
    return Cost(steps=1, memory=2 * 4 * sizes.model("model").parameters, disk=5_000, each=config.samples)


METHOD = Method(
    paper="https://arxiv.org/abs/2203.11171",
    config=Config,
    models={"model": Slot((Text,), help="a model of text; an endpoint will do")},
    data={"train": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), optional=True, help="tells the labels")},
    run=run,
    cost=cost,
    agree=agree,
    open=opened,
)
