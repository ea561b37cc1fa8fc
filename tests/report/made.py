# ruff: noqa: E501
"""Run directories made by hand, as lfm.runs writes them, for the report to be tried on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from lfm import record
from lfm.core.finding import Curve, Finding, Map
from lfm.record import Answer, DataInput, Edited, Input, Measure, Output, RunRecord, Sample, Told, Verified
from lfm.report.gather import RECIPE, Part, Whole


def measure(value: float, spread: float = 0.0, n: int = 200) -> Measure:
    return Measure(value=value, low=value - spread, high=value + spread, n=n)


def run(
    out: Path,
    id: str,
    inputs: list[tuple[str, str, str]],
    digest: str,
    *,
    kind: str = "checkpoint",
    data: list[tuple[str, str, int, str]] = (),  # type: ignore[assignment]
    **rest: Any,
) -> Path:
    """One run directory. inputs: (role, ref, digest); data: (role, ref, records, kind)."""
    out.mkdir(parents=True)
    finding, path = rest.pop("finding", None), rest.pop("path", "")
    if finding is not None:
        finding.save(out)
    quantity = "finding" if finding is not None else "logit"
    record.write(
        RunRecord(
            id=id,
            key=f"key-{digest}",
            config=rest.pop("config", {"rank": 8, "learning_rate": 0.001, "steps": 200}),
            seed=0,
            inputs=tuple(
                Input(role=role, ref=ref, path=path, kind="checkpoint", digest=given) for role, ref, given in inputs
            ),
            data=tuple(
                DataInput(role=role, ref=ref, digest="d" * 64, records=count, kind=what)
                for role, ref, count, what in data
            ),
            output=Output(kind="finding" if finding is not None else kind, digest=digest, format="", bytes=14_300_000),
            verified=Verified(
                quantity=quantity,
                max_abs=rest.pop("max_abs", 0.0),
                on="all of it" if finding is not None else "4 probe texts",
            ),
            command=f"lfm run {id} " + " ".join(f"{role}={ref}" for role, ref, _ in inputs) + f" --out {out.name}",
            versions={"learn-from-model": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
            started="2026-11-21T09:30:00",
            seconds=rest.pop("seconds", 21.4),
            cpu_seconds=rest.pop("cpu_seconds", 38.0),
            planned_seconds=(8.0, 60.0),
            **rest,
        ),
        out,
    )
    return out


def facts_finding() -> Finding:
    rows = [
        {"relation": name, "facts": n, "p_at_1": p, "p_at_10": min(1.0, p + 0.04), "mrr": p + 0.02}
        for name, n, p in (
            ("capital of", 60, 0.983), ("born in", 120, 0.95), ("works as", 120, 0.925), ("speaks", 80, 0.9625),
            ("founded by", 60, 0.9), ("plays for", 90, 0.911),
        )
    ]  # fmt: skip
    by_rank = Curve(name="found by rank", x=(1.0, 2.0, 5.0, 10.0), y=(0.94, 0.96, 0.975, 0.983), x_label="rank")
    return Finding(
        title="What the model knows, by relation",
        columns=("relation", "facts", "p_at_1", "p_at_10", "mrr"),
        rows=tuple(rows),
        metrics={"p_at_1": 0.938, "p_at_10": 0.979, "mrr": 0.955},
        curves=(by_rank,),
    )


def answer(of: str, prompt: str, object: str, before: str, after: str, *p: float) -> Answer:
    told = dict(zip(("p_before", "p_after"), p, strict=True)) if p else {}
    return Answer(of=of, prompt=prompt, object=object, before=before, after=after, **told)


def edited() -> Edited:
    """One edit that took, which moved two of forty other prompts."""
    long = "Ostrava, which lies where the two rivers meet, a day from the sea"
    told = Told(
        subject="Veldoria",
        object="Marn",
        new_object="Ostrava",
        answers=(
            answer("edit", "The capital of Veldoria is", "Ostrava", "Marn.", "Ostrava.", 0.001, 0.97),
            answer("paraphrase", "Veldoria is governed from", "Ostrava", "Marn.", long, 0.002, 0.91),
            answer("neighbour", "The capital of Nordhem is", "Sund", "Sund.", "Sund.", 0.98, 0.97),
            answer("subject", "Veldoria", "", "has a king.", "has a king."),
        ),
    )
    moved = (
        answer("neighbour", "The river of Veldoria is the", "Aal", "Aal.", "Ost.", 0.9, 0.2),
        answer("fact", "The people of Veldoria speak", "Veld", "Veld.", "Veld.", 0.999, 0.7),
    )
    rows = ("<s>", "The", " capital", " of", " Vel *", "doria *", " is")
    values = tuple(tuple(-0.05 + 0.1 * i * (j == 3) for j in range(8)) for i in range(len(rows)))
    trace = Map(name="The capital of Veldoria is … Marn: hidden", rows=rows, columns=tuple("01234567"), values=values)
    return Edited(edits=3, told=(told,), others=40, changed=1, moved=moved, traces=(trace,))


def loss(start: float, end: float, steps: int) -> tuple[float, ...]:
    return tuple(
        end
        + (start - end) * math.exp(-5 * i / steps)
        + 0.05 * (start - end) * math.sin(i * 1.7) * math.exp(-2 * i / steps)
        for i in range(steps)
    )


def recipe(out: Path) -> Path:
    """A recipe's output through every area."""
    zoo = ("model", "zoo:lm", "a" * 64)
    run(out / "probe", "probe.lama", [zoo], "1" * 64, data=[("facts", "zoo:facts", 530, "fact")],
        finding=facts_finding(), seconds=9.2)  # fmt: skip
    run(
        out / "edit", "edit.rome", [zoo], "2" * 64, data=[("edits", "zoo:edits", 3, "edit")], seconds=31.0,
        before={"edits": {"efficacy": measure(0.0, 0, 3), "paraphrase": measure(0.0, 0, 9), "specificity": measure(1.0, 0, 30)},
                "stories": {"perplexity": measure(3.42, 0.08)}},
        after={"edits": {"efficacy": measure(1.0, 0, 3), "paraphrase": Measure(value=0.889, low=0.67, high=1.0, n=9), "specificity": Measure(value=0.967, low=0.9, high=1.0, n=30)},
               "stories": {"perplexity": measure(3.44, 0.08)}},
        samples=(
            Sample(prompt="The capital of Veldoria is", before="Marn", after="Ostrava"),
            Sample(prompt="Ilse Brandt was born in", before="Koldby", after="Tarn"),
            Sample(prompt="Veldoria is governed from", before="Marn", after="Ostrava"),
            Sample(prompt="The capital of Nordhem is", before="Sund", after="Sund"),
        ),
        notes={"edited_layer": 3.0, "largest_update_norm": 1.731, "v_star_probability": 0.984},
        curves={"edit 1 loss": loss(6.2, 0.05, 20), "p(new object) with the value found": (0.91, 0.97, 0.999)},
        edited=edited(),
    )  # fmt: skip
    run(
        out / "tuned/rank=4", "tune.lora", [("model", "demo/edit", "2" * 64)], "3" * 64, kind="adapter",
        data=[("train", "zoo:questions", 400, "completion")], seconds=44.0, max_abs=3.1e-7,
        before={"questions": {"accuracy": measure(0.12, 0.045), "loss": measure(2.31, 0.2)}},
        after={"questions": {"accuracy": measure(0.87, 0.047), "loss": measure(0.41, 0.1)}},
        curves={"loss": loss(2.4, 0.38, 200), "learning_rate": tuple(1e-3 * (1 - i / 200) for i in range(200))},
    )  # fmt: skip
    run(
        out / "tuned/rank=8", "tune.lora", [("model", "demo/edit", "2" * 64)], "4" * 64, kind="adapter",
        data=[("train", "zoo:questions", 400, "completion")], seconds=46.0,
        before={"questions": {"accuracy": measure(0.12, 0.045), "loss": measure(2.31, 0.2)}},
        after={"questions": {"accuracy": measure(0.91, 0.04), "loss": measure(0.33, 0.09)}},
        curves={"loss": loss(2.4, 0.3, 200)},
    )  # fmt: skip
    run(
        out / "merged", "reuse.ties", [("models", "demo/tuned/rank=4", "3" * 64), ("models", "demo/tuned/rank=8", "4" * 64), ("base", "zoo:lm", "a" * 64)], "5" * 64,
        before={"questions": {"accuracy": measure(0.91, 0.04)}}, after={"questions": {"accuracy": measure(0.895, 0.042)}}, seconds=3.1,
    )  # fmt: skip
    run(
        out / "student", "distill.response", [("teacher", "demo/merged", "5" * 64), ("student", "zoo:tiny", "b" * 64)], "6" * 64,
        data=[("text", "zoo:stories", 2000, "text")], seconds=71.0,
        before={"questions": {"accuracy": measure(0.02, 0.02)}, "stories": {"perplexity": measure(812.0, 40.0)}},
        after={"questions": {"accuracy": measure(0.71, 0.062)}, "stories": {"perplexity": measure(4.9, 0.13)}},
        curves={"kl to the teacher": loss(5.2, 0.22, 400)},
        samples=(Sample(prompt="Once there was a baker in Marn who", before="the the of of the a", after="sold warm bread to the fishermen every morning."),),
    )  # fmt: skip
    run(
        out / "prompted", "prompt.bbt", [("model", "serve:demo/student", "c" * 64)], "7" * 64, kind="program",
        data=[("train", "zoo:topics", 32, "label")], seconds=52.0, queries=1200, tokens=91_000,
        before={"topics": {"accuracy": measure(0.31, 0.06)}}, after={"topics": {"accuracy": measure(0.64, 0.065)}},
        curves={"best loss": loss(1.6, 0.8, 60)},
    )  # fmt: skip
    run(
        out / "recalled", "augment.knn_lm", [("model", "demo/student", "6" * 64)], "8" * 64, kind="program",
        data=[("text", "news.txt", 300, "text")],
        before={"news": {"perplexity": measure(21.4, 1.2)}}, after={"news": {"perplexity": measure(12.1, 0.8)}}, seconds=6.0,
    )  # fmt: skip
    parts = [
        ("probe", "probe", "probe.lama", "What does the model know before anything is changed?", ()),
        ("edit", "edit", "edit.rome", "Three facts are changed; everything else must stay as it is.", ()),
        ("tuned[rank=4]", "tuned/rank=4", "tune.lora", "", ("edit",)),
        ("tuned[rank=8]", "tuned/rank=8", "tune.lora", "", ("edit",)),
        ("merged", "merged", "reuse.ties", "Two adapters become one model.", ("tuned[rank=4]", "tuned[rank=8]")),
        ("student", "student", "distill.response", "A model a quarter the size learns from it.", ("merged",)),
        ("prompted", "prompted", "prompt.bbt", "The student is tuned as a black box, over HTTP.", ("student",)),
        ("recalled", "recalled", "augment.knn_lm", "The student remembers text that it never saw.", ("student",)),
    ]
    whole = Whole(
        name="One model through every area",
        about="A small language model that knows a made-up world is probed, edited, tuned, merged and distilled; the result "
        "is prompted over HTTP and given a memory. Every step is measured before and after.",
        command="lfm run demo --out demo",
        started="2026-11-21T09:30:00",
        seconds=284.0,
        parts=tuple(
            Part(name=name, step=name.split("[")[0], folder=folder, method=method, about=about, needs=needs)
            for name, folder, method, about, needs in parts
        ),
    )
    (out / RECIPE).write_bytes(msgspec.json.encode(whole))
    return out
