"""Average the adapters of those domains that a new domain's text is like: no labels, and no training.

    ΔW = 1/|S| Σ_{i∈S} sᵢ BᵢAᵢ
    similarity   S: the `count` domains with the highest cos(mean embedding of i, mean embedding of the text) above 0
    clusters     S: the `count` with the highest Σ_c p(c | text) p(i | c) above 1/n;   either way at least the best one

Paper: AdapterSoup, arXiv 2302.07027, which chooses once for a new domain, by the similarity of sentence embeddings or
by clusters of a Gaussian mixture over all domains' sentences, and finds clusters the better. Here similarity is the
default: domains need be no clusters of the encoder's (measured in docs/areas/reuse.md). Differs from the paper: LoRA
instead of bottleneck adapters, so that the average is that of the changes ΔW, exactly (of rank Σ rᵢ, or cut to
`rank`), where averaging A and B apart would give another; embeddings are the mean of an encoder's last hidden states
(the adapters' base, without an encoder) less their mean over all domains, instead of a sentence encoder's. p(c | ·) is
the mean over texts of the mixture's posterior, p(i | c) that of equal numbers of each domain's texts.

Models: LoRA adapters over one base. Data: `domains`, texts whose `group` names their domain, one an adapter, in the
order in which the adapters are given; `text`, of the new domain. The result is a PEFT adapter over that base. Measured:
each domain's score. Errors: DataError where domains and adapters are not as many; MismatchError as reuse.adapters.

    lfm run reuse.adapter_soup models=math models=news domains=domains.jsonl text=new.jsonl --out soup
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import lfm.core
from lfm.core import (
    Adaptation,
    Codec,
    Cost,
    Data,
    DataSlot,
    Features,
    Inputs,
    Meta,
    Method,
    Model,
    Run,
    Sizes,
    Slot,
    Weights,
)
from lfm.core.errors import DataError
from lfm.core.heavy import torch
from lfm.models import combine

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.data.records import Text

TOGETHER = 32
"""Texts embedded at a time."""


class Config(lfm.core.Config, frozen=True):
    choose: Annotated[Literal["similarity", "clusters"], Meta(description="how adapters are chosen")] = "similarity"
    count: Annotated[int, Meta(ge=1, description="how many to average, at most")] = 3
    clusters: Annotated[int, Meta(ge=0, description="components of the mixture; 0: as many as domains")] = 0
    texts: Annotated[int, Meta(ge=1, description="texts of each domain, and of the new one, that are looked at")] = 100
    length: Annotated[int, Meta(ge=1, description="tokens of a text that are looked at")] = 128
    rank: Annotated[int, Meta(ge=0, description="cut the average to this rank; 0: exact, of the sum of the ranks")] = 0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models = inputs.all("models")
    domains = _domains(config, inputs)
    new = [record.text for record in inputs.records("text")[: config.texts]]
    base = models[0].ask(Adaptation).base
    encoder = (*inputs.all("encoder"), base)[0]

    def embedded() -> dict[str, Tensor]:
        return {str(i): _embed(encoder, texts, config) for i, texts in enumerate([*domains.values(), new])}

    kept = run.step("embed", embedded)
    centre = torch.cat([kept[str(i)] for i in range(len(domains))]).mean(0)
    *known, asked = (kept[str(i)] - centre for i in range(len(domains) + 1))
    similar = config.choose == "similarity"
    scores = _similar(known, asked) if similar else _clustered(known, asked, config, run)
    chance = 0 if similar else 1 / len(scores)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    chosen = [i for i in order[: config.count] if scores[i] > chance] or order[:1]
    run.note(**{f"score of {name}": score for name, score in zip(domains, scores)})
    run.note(chosen=", ".join(list(domains)[i] for i in sorted(chosen)))
    changes, whole = combine.added([models[i] for i in sorted(chosen)], [1 / len(chosen)] * len(chosen))
    if config.rank:
        from lfm.tensors.lowrank import cut

        changes = {name: cut(change, config.rank).change for name, change in changes.items()}
    return base.ask(Weights).adapt(changes, whole)


def _domains(config: Config, inputs: Inputs) -> dict[str, list[str]]:
    """Each domain's texts, in the order in which they first appear."""
    records: Sequence[Text] = inputs.records("domains")
    domains: dict[str, list[str]] = {}
    for record in records:
        texts = domains.setdefault(record.group, [])
        if len(texts) < config.texts:
            texts.append(record.text)
    count = len(inputs.all("models"))
    if len(domains) != count:
        raise DataError(
            f"{count} adapters, and texts of {len(domains)} domains",
            why=f"their groups are {', '.join(map(repr, list(domains)[:6]))}",
            fix="give each text a `group`: one an adapter, in the adapters' order",
        )
    return domains


def _embed(encoder: Model, texts: Sequence[str], config: Config) -> Tensor:
    """(texts, width): the mean of the last hidden states over each text's tokens."""
    rows: list[Tensor] = []
    for start in range(0, len(texts), TOGETHER):
        batch = encoder.ask(Codec).texts(texts[start : start + TOGETHER], max_length=config.length)
        (hidden,) = encoder.ask(Features).features(batch, [("hidden", -1)])
        mask = batch["attention_mask"].to(hidden)[..., None]
        rows.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(rows).float()


def _similar(known: Sequence[Tensor], asked: Tensor) -> list[float]:
    mean = asked.mean(0)
    return [float(torch.cosine_similarity(texts.mean(0), mean, dim=0)) for texts in known]


def _clustered(known: Sequence[Tensor], asked: Tensor, config: Config, run: Run) -> list[float]:
    """Σ_c p(c | text) p(i | c) for each domain i, of a mixture with diagonal covariances over the main directions."""
    from sklearn.mixture import GaussianMixture

    every = torch.cat(list(known)).double()
    components = min(config.clusters or len(known), len(every))
    directions = torch.linalg.svd(every, full_matrices=False)[2][: max(1, min(components, len(every) // 4))]
    places = [(texts.double() @ directions.T).numpy() for texts in known]
    mixture = GaussianMixture(
        components, covariance_type="diag", n_init=3, reg_covar=1e-4, random_state=run.seed_for("mixture") % 2**32
    ).fit((every @ directions.T).numpy())
    held = torch.stack([torch.from_numpy(mixture.predict_proba(place)).mean(0) for place in places])
    of_cluster = held / held.sum(0).clamp_min(1e-12)
    text = torch.from_numpy(mixture.predict_proba((asked.double() @ directions.T).numpy())).mean(0)
    return (of_cluster @ text).tolist()


def agree(config: Config, inputs: Inputs) -> None:
    _domains(config, inputs)
    base = combine.one_base(inputs.all("models"))
    for kind in (Features, Codec):
        (*inputs.all("encoder"), base)[0].ask(kind)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts = (*sizes.models.get("encoder", ()), *sizes.models["models"])[0]
    amount = sizes.data["domains"].tokens + sizes.data["text"].tokens
    size = facts.bytes // 50
    return Cost(flops=2.0 * facts.parameters * amount, steps=amount // 2048, memory=5 * facts.parameters, disk=3 * size)


METHOD = Method(
    paper="arXiv:2302.07027",
    config=Config,
    models={
        "models": Slot((Adaptation,), min=2, max=None, help="LoRA adapters, one a domain"),
        "encoder": Slot((Features, Codec), min=0, help="what embeds the texts; the adapters' base without one"),
    },
    data={
        "domains": DataSlot(Data.UNLABELED, ("text",), help="texts of the adapters' domains, by their group"),
        "text": DataSlot(Data.UNLABELED, ("text",), help="texts of the new domain"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
