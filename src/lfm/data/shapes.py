"""Which record a row of named fields is: our own kinds, common column names, and the layouts of public datasets.

Fields of CounterFact: github.com/kmeng01/rome; of LAMA: github.com/facebookresearch/LAMA; of ZsRE: that of the same
editing repository; of Alpaca: github.com/tatsu-lab/stanford_alpaca; of Dolly: databricks-dolly-15k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from lfm.core.errors import DataError
from lfm.data.records import KINDS, Audio, Chat, Completion, Edit, Fact, Image, Label, Message, Pair, Record, Text

EXAMPLES: Mapping[str, Record] = {
    "text": Text(text="Running text, as it comes."),
    "completion": Completion(prompt="Q: two plus two? A:", completion=" four"),
    "chat": Chat(messages=(Message("user", "Two plus two?"), Message("assistant", "Four."))),
    "label": Label(text="what a lovely film", label="positive"),
    "pair": Pair(text="A man sleeps.", text_b="A man is awake.", label="contradiction"),
    "image": Image(image="digits/17.png", label="7"),
    "audio": Audio(audio="words/17.wav", label="yes"),
    "fact": Fact(subject="France", relation="capital", object="Paris", prompt="The capital of France is"),
    "edit": Edit(
        subject="France", relation="capital", object="Paris", new_object="Rome", prompt="The capital of France is"
    ),
}
"""One right record of each kind, as error messages and docs show it."""

IGNORED = frozenset({"id", "idx", "uuid", "index", "__index_level_0__"})
"""Columns that number rows and say nothing of them."""

ALIASES: Mapping[str, tuple[str, ...]] = {
    "text": ("sentence", "content", "document", "review", "sentence1", "premise", "question1", "text_a"),
    "text_b": ("sentence2", "hypothesis", "question2"),
    "label": ("label_text", "labels", "class", "category"),
    "prompt": ("instruction", "question"),
    "completion": ("response", "output", "answer"),
    "image": ("img",),
    "audio": ("sound", "wav"),
}
"""Other names of our fields, as common datasets have them."""


def example(kind: str) -> str:
    """A right line of JSON of that kind."""
    return msgspec.json.encode(EXAMPLES[kind]).decode()


def shape_of(names: set[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """How rows with these fields become records' fields with their kind. DataError if no kind, or several, fit."""
    if "kind" in names:
        return lambda row: row
    for needed, layout in PUBLIC:
        if needed <= names:
            return layout
    known = names - IGNORED
    rename: dict[str, str] = {}
    for field, others in ALIASES.items():
        held = [name for name in others if name in known]
        if len(held) == 1 and (field not in known or held[0] == "label_text"):
            rename[held[0]] = field
    dropped = {"label"} if "label_text" in rename else set()  # the same class as a number
    named = {rename.get(name, name) for name in known - dropped}
    fitting = [kind for kind in KINDS if _required(kind) <= named <= _fields(kind)]
    if len(fitting) != 1:
        raise DataError(
            f"fields {', '.join(sorted(names)) or '(none)'} "
            + (f"fit several kinds: {', '.join(fitting)}" if fitting else "fit no kind of record"),
            why="" if fitting else _nearest(named),
            fix=f'add "kind", or use a line such as {example(_closest(named))}',
        )
    kind = fitting[0]

    def adapt(row: dict[str, Any]) -> dict[str, Any]:
        kept = {rename.get(k, k): v for k, v in row.items() if k not in dropped and k not in IGNORED}
        return {"kind": kind, **kept}

    return adapt


def _fields(kind: str) -> set[str]:
    return {f.encode_name for f in msgspec.structs.fields(KINDS[kind])}


def _required(kind: str) -> set[str]:
    return {f.encode_name for f in msgspec.structs.fields(KINDS[kind]) if f.required}


def _closest(named: set[str]) -> str:
    return min(
        KINDS, key=lambda kind: (len(_required(kind) - named) + len(named - _fields(kind)), list(KINDS).index(kind))
    )


def _nearest(named: set[str]) -> str:
    kind = _closest(named)
    missing, extra = sorted(_required(kind) - named), sorted(named - _fields(kind))
    parts = [f"lacks {', '.join(missing)}"] if missing else []
    parts += [f"does not know {', '.join(extra)}"] if extra else []
    return f"{kind}, the nearest, {' and '.join(parts)}"


# ---------------------------------------------------------------------------------------------- public datasets


def _counterfact(row: dict[str, Any]) -> dict[str, Any]:
    asked = row["requested_rewrite"]
    subject, old = asked["subject"], asked["target_true"]["str"]
    return {
        "kind": "edit",
        "subject": subject,
        "relation": asked.get("relation_id", ""),
        "object": old,
        "new_object": asked["target_new"]["str"],
        "prompt": asked["prompt"].format(subject),
        "paraphrases": row.get("paraphrase_prompts", []),
        # Neighbours share the true object, which an edit of this subject must leave with them.
        "neighbours": [[prompt, old] for prompt in row.get("neighborhood_prompts", [])],
    }


def _zsre(row: dict[str, Any]) -> dict[str, Any]:
    around = [[row["loc"], row["loc_ans"]]] if row.get("loc") and row.get("loc_ans") else []
    return {
        "kind": "edit",
        "subject": row["subject"],
        "relation": row.get("relation", ""),
        "object": row["answers"][0] if row.get("answers") else row.get("pred", ""),
        "new_object": row["alt"],
        "prompt": row["src"],
        "paraphrases": [row["rephrase"]] if row.get("rephrase") else [],
        "neighbours": around,
    }


def _lama(row: dict[str, Any]) -> dict[str, Any]:
    subject = row.get("sub_label") or row.get("sub") or ""
    if row.get("template"):
        sentence = row["template"].replace("[X]", subject).replace("[Y]", "[MASK]")
    else:
        sentence = row.get("masked_sentence") or (row.get("masked_sentences") or [""])[0]
    prompt, blank, suffix = sentence.partition("[MASK]")
    if not blank:
        raise DataError("a LAMA row has no [MASK] in its sentence and no [Y] in its template")
    return {
        "kind": "fact",
        "subject": subject,
        "relation": row.get("predicate_id") or row.get("pred") or "",
        "object": row["obj_label"],
        "prompt": prompt.rstrip(),
        "suffix": suffix,
    }


SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""Roles by the names that exports of conversations give them."""


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    said = row["conversations"]
    told = [(m.get("from") or m.get("role"), m.get("value") or m.get("content") or "") for m in said]
    return {"kind": "chat", "messages": [{"role": SPEAKERS.get(r, r), "content": content} for r, content in told]}


def _instruction(row: dict[str, Any]) -> dict[str, Any]:
    """Alpaca's rows, and Dolly's: what to do, with what, and the answer; a blank line between them."""
    given = [row["instruction"], row.get("input") or row.get("context") or ""]
    said = row["output"] if "output" in row else row["response"]
    return {"kind": "completion", "prompt": "".join(f"{part}\n\n" for part in given if part), "completion": said}


PUBLIC: tuple[tuple[set[str], Callable[[dict[str, Any]], dict[str, Any]]], ...] = (
    ({"requested_rewrite"}, _counterfact),
    ({"src", "alt", "subject"}, _zsre),
    ({"conversations"}, _conversation),
    ({"instruction", "input", "output"}, _instruction),
    ({"instruction", "context", "response"}, _instruction),
    ({"obj_label", "template"}, _lama),
    ({"obj_label", "masked_sentence"}, _lama),
    ({"obj_label", "masked_sentences"}, _lama),
)
