"""`lfm serve` and `lfm chat`: use a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm.cli import screen
from lfm.cli.progress import shown

if TYPE_CHECKING:
    from lfm.core.model import Model

Ref = Annotated[str, typer.Argument(help="A model: a directory, zoo:NAME, api:URL.", metavar="REF")]


def serve(
    ref: Ref,
    host: Annotated[str, typer.Option(help="127.0.0.1 is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any free one.")] = 8000,
    name: Annotated[str, typer.Option(help="What clients call it.", show_default="by its reference")] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=REF", help="An adapter over it, called NAME; as many as you like, in one memory."),
    ] = None,
) -> None:
    """Put a model behind OpenAI's protocol, for any client, and for lfm as api:URL."""
    from lfm import runs, serve

    refs = _named(adapter or [])

    def announce(url: str) -> None:
        console = screen.err()
        console.print(f"\n  [bold]{ref}[/] is served at [bold cyan]{url}[/]", soft_wrap=True)
        if refs:
            console.print(
                f"  [dim]model:[/]     {called or serve.named(model)}, or an adapter: {', '.join(refs)}", soft_wrap=True
            )
        console.print(f"  [dim]from lfm:[/]  lfm chat api:{url}", soft_wrap=True)
        console.print("  [dim]Ctrl-C stops it[/]\n")

    with shown() as show:
        model = runs.model(ref, show=show)
        adapters = {each: _adapter(given, show) for each, given in refs.items()}
    called = name or (ref if ref.startswith("zoo:") else "")
    serve.serve(model, host, port, name=called, adapters=adapters, announce=announce)


def _adapter(ref: str, show: Any) -> Model | Path:
    """A directory as it lies, since its base is the one that is served; else what the reference means."""
    from lfm import runs

    return Path(ref) if Path(ref).is_dir() else runs.model(ref, show=show)


def _named(adapters: list[str]) -> dict[str, str]:
    """NAME=REF … as name → ref. ConfigError for one that is not, and for a name given twice."""
    from lfm.core.errors import ConfigError

    found: dict[str, str] = {}
    for given in adapters:
        called, equals, ref = given.partition("=")
        if not (called and equals and ref):
            raise ConfigError(f"--adapter {given} names no adapter", fix="--adapter NAME=DIR")
        if called in found:
            raise ConfigError(f"two adapters are called {called!r}", fix="give each its own name")
        found[called] = ref
    return found


def chat(
    ref: Ref,
    prompt: Annotated[str | None, typer.Argument(help="Say this, print the answer, and stop.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Talk to a model. One that was trained to chat is given its chat template, another continues what you write."""
    from lfm import runs
    from lfm.core.interfaces import Text

    with shown() as show:
        model = runs.model(ref, show=show)
        text = model.ask(Text)
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    template = _template(model)
    if prompt is not None:
        print(_say(text, template, [], prompt, options))
        return
    if sys.stdin.isatty():
        how = "it chats" if template else "it continues what you write"
        screen.err().print(f"[dim]{ref}: {how}; an empty line or Ctrl-D ends it[/]", soft_wrap=True)
    turns: list[dict[str, str]] = []
    while True:
        try:
            line = input("› " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        answer = _say(text, template, turns, line, options)
        turns += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        print(answer, flush=True)


def _template(model: Model) -> Any:
    """The tokenizer, if it has a chat template."""
    from lfm.core.interfaces import Codec

    if not model.can(Codec):
        return None
    tokenizer = model.ask(Codec).tokenizer
    return tokenizer if getattr(tokenizer, "chat_template", None) else None


def _say(text: Any, template: Any, turns: list[dict[str, str]], line: str, options: dict[str, Any]) -> str:
    said = line
    if template is not None:
        talk = [*turns, {"role": "user", "content": line}]
        said = template.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return text.generate([said], **options)[0]


def register(app: typer.Typer) -> None:
    panel = "Use"
    app.command("serve", rich_help_panel=panel)(serve)
    app.command("chat", rich_help_panel=panel)(chat)
