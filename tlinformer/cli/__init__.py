"""The command line: `tlinformer COMMAND`; one module a command.

Exit codes: 0 done, 1 failed at run time, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .eval import eval_command
from .generate import generate_command
from .info import info_command
from .plan import plan_command
from .train import train_command


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would drop its message
            complain(str(error) or "interrupted")
            raise typer.Exit(130) from error


app = typer.Typer(cls=_Group, add_completion=False, pretty_exceptions_enable=False)
app.command("generate")(generate_command)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("plan")(plan_command)
app.command("info")(info_command)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """TLinFormer: linear-time generation over long contexts (arXiv 2508.20407)."""


def complain(message: str) -> None:
    """Prints a message as one line on the standard error stream."""
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False, style="red")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]  # welcome at any place
    try:
        return app(arguments, prog_name="tlinformer", standalone_mode=False) or 0
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command-line parser
            complain(f"error: {error.format_message()} (see tlinformer --help)")
            return 2
        if debug:
            raise
        wrong_input = isinstance(error, (ValueError, FileNotFoundError, FileExistsError))
        kind = "" if wrong_input else f"{type(error).__name__}: "
        complain(f"error: {kind}{error}" + ("" if wrong_input else " (--debug shows where)"))
        return 2 if wrong_input else 1
