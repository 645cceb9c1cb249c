"""The commands under one name. What takes long to import, they import when they run."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from .bench import bench_command
from .doctor import doctor_command
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
            raise typer.Abort from error


app = typer.Typer(cls=_Group, add_completion=False, pretty_exceptions_enable=False)
app.command("generate")(generate_command)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("bench")(bench_command)
app.command("plan")(plan_command)
app.command("doctor")(doctor_command)
app.command("info")(info_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tlinformer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """TLinFormer: linear-time generation over long contexts (arXiv 2508.20407)."""
