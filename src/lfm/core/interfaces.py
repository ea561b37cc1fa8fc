"""What a model can be asked: one protocol an interface, and the values that they tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lfm.core.model import Model

Batch = Mapping[str, "Tensor"]
"""What a module's forward takes by keyword: input_ids, attention_mask, pixel_values, labels, …"""


class Score(NamedTuple):
    """A continuation's tokens and their natural-log probabilities, in order."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.logprobs)


Ranked = Sequence[tuple[str, float]]
"""Next tokens as text with natural-log probability, best first."""


class Said(NamedTuple):
    """What a model said; cut: whether it had more to say, and its limit of tokens ended it."""

    text: str
    cut: bool = False


class Text(Protocol):
    """Text in, text out. One that knows why an answer ended also has `said`, which gives `Said`: see `said_by`."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """One continuation a prompt, without the prompt. Temperature 0 is greedy."""
        ...


def said_by(text: Text, prompts: Sequence[str], **how: Any) -> list[Said]:
    """As Text.generate, with whether each answer was cut; of a model that does not tell, none is said to be."""
    told = getattr(text, "said", None)
    return told(prompts, **how) if told else [Said(one) for one in text.generate(prompts, **how)]


class Logprobs(Protocol):
    """Probabilities of text. A masked model fills the gap between prompt and suffix; a causal one ignores suffixes."""

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        """Log-probability of each continuation after its prompt, token by token."""
        ...

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        """The k most probable next tokens after each prompt (fewer where the model tells fewer)."""
        ...


class Top(Protocol):
    """The next tokens that a model finds most probable, and no others: all that many endpoints tell."""

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        """The k most probable next tokens after each prompt (fewer where the model tells fewer)."""
        ...


class Classes(Protocol):
    """Probabilities of named classes: what a prompted language model tells of records."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, in the order of what is told."""
        ...

    def tell(self, records: Sequence[Any]) -> NDArray[Any]:
        """(n, classes) natural-log probabilities of label or pair records, whatever their labels say."""
        ...


class Vectors(Protocol):
    """Texts as vectors, near one another where texts are alike: what endpoints of embeddings give."""

    def vectors(self, texts: Sequence[str]) -> NDArray[Any]:
        """(n, d) fp32, one row a text."""
        ...


class Codec(Protocol):
    """What turns raw inputs into a batch and back: a tokenizer, an image processor, a feature extractor of sounds."""

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; AccessError where the model takes no text."""
        ...

    def texts(self, texts: Sequence[str], *, add_special: bool = True, max_length: int | None = None) -> Batch:
        """input_ids and attention_mask (B, T), right-padded."""
        ...

    def images(self, images: Sequence[Any]) -> Batch:
        """pixel_values (B, C, H, W) from uint8 arrays (H, W) or (H, W, 3); AccessError where it takes no images."""
        ...

    def sounds(self, sounds: Sequence[Any]) -> Batch:
        """input_values or input_features from (samples, rate); AccessError where it takes no sounds."""
        ...


class Answers(Protocol):
    """What a model told of questions, kept: nothing is computed, and nobody is asked."""

    @property
    def k(self) -> int:
        """How many answers are told at each place: the likeliest, or all that there are."""
        ...

    def __len__(self) -> int:
        """How many questions are answered; `told` knows them by the numbers below that."""
        ...

    def find(self, questions: Sequence[bytes]) -> NDArray[Any]:
        """(n,) by what number `told` knows each question; −1 for one that was never asked.

        CorruptError where the answers to one of them are not what was written.
        """
        ...

    def told(self, numbers: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(N, k) ids and natural-log probabilities at all places of these questions, one question after another.

        What they leave out of 1 is all other answers' together. CorruptError where it is not what was written.
        """
        ...


class Logits(Protocol):
    """A forward pass without gradients."""

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V) for language models, (B, classes) for classifiers; fp32."""
        ...


class Embeddings(Protocol):
    """A language model that accepts input embeddings in place of tokens. A masked one answers at its mask."""

    def table(self) -> Tensor:
        """(V, d) input embeddings."""
        ...

    def embed(self, texts: Sequence[str], suffixes: Sequence[str] = ()) -> list[Tensor]:
        """Each text's input embeddings (t, d), special tokens as the model's tokenizer adds them.

        Of a masked model, a mask and the suffix come after the text; others ignore suffixes.
        """
        ...

    def next_from(self, embeds: Sequence[Tensor], k: int, also: Sequence[str] = ()) -> list[Ranked]:
        """The k most probable next tokens after each sequence of embeddings (t, d), and those of `also` by rank."""
        ...


class Injection(Protocol):
    """A language model that adds a prompt to what each of its blocks reads, an encoder's where there is one."""

    def spread(self, prompt: Tensor, embeds: Sequence[Tensor]) -> tuple[float, ...]:
        """Standard deviations of what the second and later blocks read after that prompt (t, d), outliers clipped."""
        ...

    def told(self, prompts: Tensor, embeds: Sequence[Tensor], tokens: Sequence[str]) -> Tensor:
        """(prompts, texts, tokens) log-probabilities, up to a constant a text, after prompts (c, blocks, t, d)."""
        ...

    def next_from(self, prompt: Tensor, embeds: Sequence[Tensor], k: int, also: Sequence[str] = ()) -> list[Ranked]:
        """As Embeddings tells it, with a prompt (blocks, t, d)."""
        ...

    def prefix(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each block's keys and values (heads, t, size) that say the same; AccessError where it is no causal model."""
        ...


class Features(Protocol):
    """Activations inside the model. Sites are those of lfm.models.structure: ("hidden"|"ffn_in"|"ffn_key", block)."""

    def features(self, batch: Batch, sites: Sequence[tuple[str, int]]) -> list[Tensor]:
        """One (B, T, width) tensor a site, fp32. Blocks count from 0; negative ones from the end."""
        ...


class Gradients(Protocol):
    """The module itself, to differentiate and to train."""

    def module(self) -> nn.Module:
        """A fresh fp32 copy in eval mode; changing it changes no input."""
        ...

    def skeleton(self) -> nn.Module:
        """The module on the meta device: its layers and their shapes. No weight is read; ModelError if not known."""
        ...

    def rewrap(self, module: nn.Module) -> Model:
        """A model like this one (same codec, config and storage dtype) with that module's weights."""
        ...


class LazyTensor(Protocol):
    """A tensor that is read, or computed, only when asked."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor:
        """The whole tensor, on the CPU, in its stored dtype."""
        ...


class LowRank(NamedTuple):
    """A change of a layer's weight: B (out, r) times A (r, in). transposed: the weight is stored (in, out).

    An embedding's is stored (tokens, width), so it is transposed: B (width, r), A (r, tokens). A convolution's is
    stored (out, in, *kernel): A (r, in · |kernel|), flat.
    """

    b: Tensor
    a: Tensor
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    embedding: bool = False


class Weights(Protocol):
    """Named tensors as stored."""

    def tensors(self) -> Mapping[str, LazyTensor]: ...

    def replace(self, tensors: Mapping[str, LazyTensor | Tensor]) -> Model:
        """The same architecture and files with these tensors in place of those of the same names.

        Stored in the dtype each name has now. MismatchError for an unknown name or another shape.
        """
        ...

    def config(self) -> Mapping[str, Any]:
        """The architecture's description, config.json; empty for a bare state dict."""
        ...

    def files(self) -> Mapping[str, Path]:
        """The small files that go with the weights (tokenizer, processor, chat template), by name."""
        ...

    def assemble(
        self, tensors: Mapping[str, LazyTensor | Tensor], config: Mapping[str, Any], files: Mapping[str, Path]
    ) -> Model:
        """Another model: these tensors and no others, as they are, with that description and those files."""
        ...

    def update(self, changes: Mapping[str, LowRank]) -> Model:
        """The model with W + BA for each named module's weight; it can also be saved as a PEFT LoRA adapter."""
        ...

    def layout(self) -> Layout:
        """What kind of layer each weight belongs to, by the architecture. Nothing is read; ModelError if not known."""
        ...

    def adapt(self, changes: Mapping[str, LowRank], whole: Mapping[str, LazyTensor | Tensor] | None = None) -> Model:
        """An adapter over this model: W + BA for each named module's weight, and whole tensors by their own names.

        MismatchError for a whole tensor that no PEFT adapter can carry.
        """
        ...


class Layout(NamedTuple):
    """kinds: module → linear, conv1d (a linear one stored (in, out)), embedding, convolution. tied: tensor → stored.

    tensors: what is stored, in the order of the architecture, with shapes. by_token: those with a row for each token.
    renamed: a tensor's name in the module → the name that checkpoints have for it, where that is another.
    """

    kinds: Mapping[str, str]
    tied: Mapping[str, str]
    tensors: Mapping[str, tuple[int, ...]] = {}
    by_token: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = {}


class Adaptation(Protocol):
    """What a LoRA adapter changes, as it is stored: no module is built, and the base's weights are not read."""

    @property
    def base(self) -> Model:
        """The model that it is over. MismatchError if that is not the one it was made for."""
        ...

    def changes(self) -> Mapping[str, LowRank]:
        """Each adapted module's change, its scale in B: α/r, or α/√r. MismatchError for tensors that fit no LoRA."""
        ...

    def whole(self) -> Mapping[str, LazyTensor]:
        """Tensors that it holds as a whole, by their names in the module: trained biases, modules_to_save."""
        ...


INTERFACES: Mapping[str, type] = {
    "text": Text,
    "classes": Classes,
    "vectors": Vectors,
    "top": Top,
    "logprobs": Logprobs,
    "answers": Answers,
    "codec": Codec,
    "logits": Logits,
    "embeddings": Embeddings,
    "injection": Injection,
    "features": Features,
    "gradients": Gradients,
    "weights": Weights,
    "adaptation": Adaptation,
}
"""Every interface by the name that the command line uses, from the least access to the most."""


def name_of(kind: type) -> str:
    """The interface's name as users meet it."""
    return next((name for name, known in INTERFACES.items() if known is kind), kind.__name__.lower())


def names_of(kinds: Iterable[type]) -> list[str]:
    """Interface names, from the least access to the most; what programs of one method give comes last."""
    wanted = {name_of(kind) for kind in kinds}
    return [name for name in INTERFACES if name in wanted] + sorted(wanted - INTERFACES.keys())
