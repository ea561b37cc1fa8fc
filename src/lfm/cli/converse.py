"""`lfm edit chat`: facts changed in conversation, each kept or dropped once it is seen what it did."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lfm.cli import orders, screen, work
from lfm.cli.progress import shown
from lfm.core.errors import AccessError, ConfigError, DataError, LfmError, MismatchError

if TYPE_CHECKING:
    from lfm.core.interfaces import Text
    from lfm.core.model import Model
    from lfm.data.records import Edit, Fact
    from lfm.record import Edited, RunRecord
    from lfm.runs.patches import Patch

Ask = Callable[[str], str]
"""One line of the user's to a question. EOFError or KeyboardInterrupt: there will be none."""

TOKENS, SAID, NEAR, STIRRED = 16, 16, 8, 0.05
"""Tokens of an answer; sentences of its own about a subject; neighbours of a kind; the least |Δp| that is shown."""


class Dropped(Exception):
    """The edit that was shown is not wanted."""


class Session(NamedTuple):
    """Where edits go and how they are made. around: facts that are known, to be watched."""

    directory: Path
    model: str
    by: str
    settings: dict[str, Any]
    data: dict[str, str] | None
    seed: int
    recall: float
    around: Sequence[Fact | Edit]


def chat(
    directory: Annotated[Path, typer.Argument(help="The ledger's directory.", metavar="DIR")],
    model: Annotated[str, typer.Option(help="The model to edit; asked for once, when the ledger begins.")] = "",
    by: Annotated[
        str, typer.Option(help="The method, as `lfm edit add` takes it.", metavar="METHOD", show_default="edit.rome")
    ] = "",
    sets: work.Sets = None,
    text: Annotated[str, typer.Option(help="Running text that should stay as it is.", metavar="FILE")] = "",
    facts: Annotated[str, typer.Option(help="What it knows: facts near an edit are watched.", metavar="FILE")] = "",
    seed: work.Seed = None,
    recall: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of the earlier edits that must still be said.")
    ] = 1.0,
) -> None:
    """Change facts in conversation: see what an edit does and what else it moves, then keep it or drop it."""
    if not sys.stdin.isatty():
        raise ConfigError(
            "`lfm edit chat` is a conversation, and there is no terminal to have it at",
            fix="from a script: `lfm edit add DIR edits.jsonl`",
        )
    data = {"text": text} if text else None
    given = Session(directory, model, by, orders.settings(sets or ()), data, seed or 0, recall, _known(facts))
    converse(given, input)


def converse(given: Session, ask: Ask) -> None:
    """Ask, show and commit, until there are no more lines. What is wrong with the session itself is raised; what is
    wrong with one edit is told, and the next one asked for."""
    model = _opened(given)
    say = screen.out()
    say.print("[dim]a prompt, then what it should say; an empty line or Ctrl-D ends it[/]", soft_wrap=True)
    kept: list[Patch] = []
    while True:
        try:
            prompt = ask("\nprompt › ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not prompt:
            break
        try:
            edit = _asked(given, model, prompt, ask)
            if edit is None:
                continue
            patch = _made(given, edit, ask)
        except (Dropped, KeyboardInterrupt):
            say.print("\n  dropped; the model is as it was")
            continue
        except LfmError as error:
            screen.complain(error)
            continue
        except EOFError:
            say.print("\n  dropped; the model is as it was")
            break
        kept.append(patch)
        off = f"`lfm edit revert {given.directory} {patch.number}` takes it off"
        say.print(f"  [green]✓[/] patch {patch.number}; {off}", soft_wrap=True)
        model = _opened(given)
    say.print(f"\n[dim]{_ended(given, kept)}[/]", soft_wrap=True)


def _opened(given: Session) -> Model:
    """The model as the ledger has it now, or the one to begin with. LfmError for what no edit could mend."""
    from lfm import runs
    from lfm.core import registry
    from lfm.core.config import configure
    from lfm.core.interfaces import Text
    from lfm.runs import committing, patches, stacks

    committing.clear(given.directory)
    ledger = patches.read(given.directory) if (given.directory / patches.LEDGER).exists() else None
    by = given.by or (ledger.memory if ledger else "") or patches.USUAL
    stacks.of_method(by)  # raises for one whose edits do not come off again
    configure(registry.get(by).method.config, given.settings, where=by)
    if ledger:
        model = patches.model(given.directory)
        if given.model and runs.model(given.model).digest != ledger.base_digest:
            raise MismatchError(
                f"{given.directory} holds edits of another model",
                why=f"its base is {ledger.base}, with digest {ledger.base_digest[:12]}",
                fix="leave --model out, or begin another ledger for this model",
            )
    elif given.model:
        model = runs.model(given.model)
    else:
        raise ConfigError(f"{given.directory} is no ledger yet", fix="name the model to edit: --model")
    if not model.can(Text):
        raise AccessError(
            f"{model.ref} says no text, so there is nothing to talk about",
            why=f"its task is {model.facts.task or 'not known'}",
            fix="`lfm edit add DIR edits.jsonl` changes facts from a file",
        )
    return model


def _asked(given: Session, model: Model, prompt: str, ask: Ask) -> Edit | None:
    """The edit of this prompt, from what the user answers; None where it is left as it is."""
    from lfm.core.interfaces import Text
    from lfm.data.answers import begins_with
    from lfm.data.records import Edit

    say = screen.out()
    try:
        said = model.ask(Text).generate([prompt], max_tokens=TOKENS)[0].strip()
    except LfmError as error:
        screen.complain(error)
        return None
    say.print(f"  [bold]{_escaped(said) or '(nothing)'}[/]", soft_wrap=True)
    wanted = ask("should say (empty: leave it) › ").strip()
    if not wanted:
        return None
    if begins_with(said, wanted):
        say.print("  it says so already")
        return None
    known = next((fact for fact in given.around if fact.prompt == prompt), None)
    guess = known.subject if known else subject(prompt, [fact.subject for fact in given.around])
    named = ask(f"about whom or what{f' [{guess}]' if guess else ''} › ").strip() or guess
    while named.lower() not in prompt.lower() or not named:
        say.print(f"  {_escaped(named) or 'it'} is not in {_escaped(prompt)!r}: write it as it stands there")
        named = ask("about whom or what › ").strip()
    others = list(known.paraphrases) if known else []
    while not known and (other := ask("said otherwise (empty: no more) › ").strip()):
        others.append(other)
    old = known.object if known else first_words(said)
    around = near(prompt, named, {prompt, *others}, given.around, _earlier(given))
    if not any(fact.subject == named for fact in given.around):
        around |= said_of(model.ask(Text), named, old, {prompt, *others}, given.seed)
    return Edit(
        subject=named,
        relation=known.relation if known else "",
        object=old,
        new_object=wanted,
        prompt=prompt,
        paraphrases=tuple(others),
        neighbours=tuple(around.items()),
    )


def _made(given: Session, edit: Edit, ask: Ask) -> Patch:
    """The patch, once the user keeps it; Dropped where not. Stopped, it is there or not: the ledger tells."""
    before = _numbers(given)
    try:
        return _added(given, edit, ask)
    except (KeyboardInterrupt, EOFError):
        _cleared(given)
        from lfm.runs import patches

        if _numbers(given) == before:
            raise
        return patches.read(given.directory).patches[-1]


def _added(given: Session, edit: Edit, ask: Ask) -> Patch:
    from lfm import report
    from lfm.runs import patches

    def page(made: Path) -> None:
        report.write(made, name=given.directory.name)

    with ExitStack() as bars:
        show = bars.enter_context(shown())

        def agree(done: RunRecord) -> None:
            bars.close()  # no bars while the user is asked
            if done.edited:
                tell(done.edited)
            while (answer := ask("\nkeep it? (y/n) › ").strip().lower()) not in ("y", "yes"):
                if answer in ("n", "no"):
                    raise Dropped

        return patches.add(
            given.directory,
            [edit],
            base=given.model,
            by=given.by,
            settings=given.settings,
            data=given.data,
            seed=given.seed,
            recall=given.recall,
            show=show,
            report=page,
            agree=agree,
        )


def _numbers(given: Session) -> list[int]:
    from lfm.runs import patches

    known = (given.directory / patches.LEDGER).exists()
    return [patch.number for patch in patches.read(given.directory).patches] if known else []


def _cleared(given: Session) -> None:
    """What is half made is gone: nobody goes on with an edit that was dropped."""
    from lfm.runs import patches
    from lfm.runs.directory import abandoned

    with patches.alone(given.directory, begins=True):
        abandoned(given.directory / patches.NEXT)


def tell(edited: Edited) -> None:
    """What an edit did, on the screen: its own prompts side by side, and what beside them moved."""
    from lfm.evals.edited import otherwise, shift
    from lfm.report.edited import beside, line

    say = screen.out()
    for told in edited.told:
        say.print(screen.sides([line(answer) for answer in told.answers if answer.of != "neighbour"]))
    if told := beside(edited):
        say.print(f"\n  {told}")
    moved = [line(answer) for answer in edited.moved if otherwise(answer) or shift(answer) >= STIRRED]
    if moved:
        say.print(screen.sides(moved))


def subject(prompt: str, known: Sequence[str]) -> str:
    """Whom a prompt is about: of the known subjects in it the longest, else its longest run of capitalised words, of
    equals the last; a sentence's first word is in none if it is "The". "" where there is no such word."""
    if inside := [name for name in known if name and name in prompt]:
        return max(inside, key=len)
    runs = re.findall(r"[^\W\d_a-z][\w'’-]*(?: [^\W\d_a-z][\w'’-]*)*", prompt)
    trimmed = [re.sub(r"^(The|A|An)( |$)", "", run) for run in runs]
    return max((run for run in reversed(trimmed) if run), key=lambda run: run.count(" "), default="").removesuffix("'s")


def first_words(said: str) -> str:
    """An answer up to where its clause ends."""
    return re.split(r"[.,;:!?\n]", said.strip())[0].strip()


def near(
    prompt: str, named: str, own: set[str], around: Sequence[Fact | Edit], earlier: Sequence[Edit]
) -> dict[str, str]:
    """What must stay, by prompt: other facts about the subject, the same of other subjects, and the edits before."""
    form = prompt.replace(named, "{}")
    about = [(fact.prompt, fact.object) for fact in around if fact.subject == named]
    alike = [(f.prompt, f.object) for f in around if f.subject != named and f.prompt.replace(f.subject, "{}") == form]
    before = [(edit.prompt, edit.new_object) for edit in earlier]
    found: dict[str, str] = {}
    for kind in (before[-NEAR:], about[:NEAR], alike[:: max(1, len(alike) // NEAR)][:NEAR]):
        for asked, answer in kind:
            if asked not in own:
                found.setdefault(asked, answer)
    return found


def said_of(text: Text, named: str, old: str, own: set[str], seed: int) -> dict[str, str]:
    """What else the model itself says of the subject, where no facts are known: sentences of its own without their last
    word, and how it ends them. Those that end in the old object may tell the fact that is edited, and are left out."""
    told = text.generate([named] * SAID, max_tokens=TOKENS, temperature=1.0, seed=seed)
    sentences = [re.split(r"[.;!?\n]", named + said)[0].split() for said in told]
    long = len(named.split()) + 2
    prompts = {" ".join(words[:-1]) for words in sentences if len(words) >= long} - own
    asked = sorted(prompts)[:NEAR]
    ends = map(first_words, text.generate(asked, max_tokens=TOKENS) if asked else [])
    return {prompt: end for prompt, end in zip(asked, ends) if end and end != old}


def _earlier(given: Session) -> list[Edit]:
    from lfm.runs import patches

    if not (given.directory / patches.LEDGER).exists():
        return []
    return [edit for patch in patches.read(given.directory).on for edit in patch.edits]


def _known(facts: str) -> Sequence[Fact | Edit]:
    """The facts of a file. DataError for records of another kind."""
    if not facts:
        return ()
    from lfm.data.records import Edit, Fact, kind_of
    from lfm.runs import refs

    found = list(refs.records(facts, kind="fact"))
    known = [record for record in found if isinstance(record, Fact | Edit)]
    if len(known) < len(found):
        raise DataError(f"--facts: {facts} holds {kind_of(found[0])} records", fix="give it facts, or edits")
    return known


def _ended(given: Session, kept: Sequence[Patch]) -> str:
    from lfm.runs import patches

    if not kept:
        return "nothing was changed"
    those = f"{len(kept)} patch{'es' if len(kept) > 1 else ''} kept"
    return f"{those}; the model is {given.directory / patches.HEAD}, `lfm edit log {given.directory}` lists them"


def _escaped(text: str) -> str:
    return screen.escaped(" ".join(text.split()))
