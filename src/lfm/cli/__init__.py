"""The command line. Each group of commands is one file; heavy libraries load when a command needs them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from lfm.cli import advising, discover, distilling, edits, machine, made, measure, merging, recipes, tuning, use, work
from lfm.cli.front import Front
from lfm.core.errors import LfmError

gc.set_threshold(50_000)  # every 700 objects, the search for garbage is a tenth of a short command

UNEXPECTED = 70
INTERRUPTED = 130

app = typer.Typer(
    name="lfm",
    cls=Front,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (at any place).")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"lfm {installed('learn-from-model')}")
        raise typer.Exit


for group in (machine, discover, work, tuning, distilling, advising, merging, edits, recipes, measure, made, use):
    group.register(app)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and give its exit code; errors go to stderr as what, why and fix."""
    words = list(arguments)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    try:
        return int(app(words, standalone_mode=False, prog_name="lfm") or 0)
    except LfmError as error:
        if debug:
            raise
        from lfm.cli.screen import complain

        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            complain(error)
        return error.exit_code
    except typer.TyperException as error:
        return _usage(error)
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        first = (str(error).strip().splitlines() or ["no message"])[0]
        sys.stderr.write(
            f"lfm stopped on an unexpected {type(error).__name__}: {first}\nrun with --debug for details\n"
        )
        return UNEXPECTED


def _usage(error: typer.TyperException) -> int:
    from lfm.cli.screen import complain

    if type(error).__name__ == "NoArgsIsHelpError":
        return 0  # the help has been shown
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "lfm"
    complain(LfmError(error.format_message().rstrip("."), fix=f"`{command} --help` shows what it takes"))
    return error.exit_code


def main() -> NoReturn:
    """Entry point of the `lfm` command."""
    if "RANK" in os.environ:  # what torch's C++ has to say would be said by each process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = run(sys.argv[1:])
    gc.freeze()  # the process ends: none of it is looked at again
    sys.exit(code)
