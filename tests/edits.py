"""Edits, facts and text that the tiny causal models of several editors' tests are asked about."""

from __future__ import annotations

import tiny
from lfm.data.records import Edit, Fact, Text

ADA = Edit(
    subject="Ada Ashby",
    relation="lives in",
    object="in",
    new_object="cat",
    prompt="In London lives Ada Ashby",
    paraphrases=("In that town lives Ada Ashby",),
    neighbours=(("Berlin is the capital of", "Germany"),),
)
MOUNTAIN = Edit(subject="the mountain", relation="from", object="in", new_object="dog", prompt="From the mountain to")
ROME = Edit(subject="Rome", relation="is", object="in", new_object="four", prompt="Rome is very")
EDITS = (ADA, MOUNTAIN, ROME)
AT_THE_SUBJECT = tuple(
    Edit(subject=subject, relation="", object="in", new_object=new, prompt=prompt, neighbours=near)
    for subject, new, prompt, near in (
        ("Ada Ashby", "cat", "Here lives Ada Ashby", (("Berlin is the", "capital"),)),
        ("the mountain", "dog", "From the mountain", ()),
        ("Rome", "four", "And Rome", ()),
    )
)
"""Their prompts end with what they are about."""
FACTS = tuple(
    Fact(subject=subject, relation="is", object=object, prompt=f"{subject} is the")
    for subject, object in [("Paris", "cat"), ("Rome", "dog"), ("Berlin", "cat"), ("Vienna", "town"), ("Q", "dog")]
)
TEXT = tuple(Text(text=line) for line in tiny.CORPUS)
