"""`tlinformer doctor`: what keeps a model from being fast, fitting or good, and what to change."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..terminal import progress_bar
from .inputs import AsJson, DeviceName, EngineDtype, pick_device
from .plan import parse_tokens

_STYLES = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}


def doctor_command(
    model: Annotated[
        Path, typer.Option(metavar="DIR", help="Holds config.json and model.safetensors.")
    ] = Path("models/tlinformer-prose-8m"),
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out text (.txt, .txt.xz, .txt.gz).")
    ] = None,
    context: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens a sequence is to hold: 4096, 128K, 1M.")
    ] = "4096",
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", metavar="N", help="Sequences wanted.")
    ] = 1,
    max_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Score so many tokens from the text's start.")
    ] = 16384,
    device: DeviceName = "auto",
    dtype: EngineDtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Look for the ways in which a model's windows, memory or use go wrong.

    reuse: does nearly every token recompute the history? memory: do the context and the batch fit
    the device? history window: is the loss lower with more rows of compressed history? generation
    window: does the loss rise towards the end of the window? The last two need --text.

    Exit code 1 if there is a problem; a warning is none.
    """
    from ..doctor import check_memory, examine
    from ..engine import engine_dtype
    from ..model import TLinFormerForCausalLM

    kind = None if dtype == "auto" else dtype
    loaded = TLinFormerForCausalLM.from_pretrained(model)
    place = pick_device(device, loaded.config, kind)
    name = engine_dtype(next(loaded.parameters()).dtype, kind, place.type)
    sizes: dict[str, Any] = {"max_context": parse_tokens(context), "batch_size": batch_size}
    before = check_memory(loaded.config, dtype=name, device=place, **sizes)
    if before.figures.get("longest_context") == 0:  # nothing could run there
        checks = [before]
    else:
        # Scoring on a CPU wants float32.
        loaded = loaded.float() if place.type == "cpu" else loaded.to(place, _torch_dtype(name))
        read = _read(model, text, max_tokens) if text else None
        words = "scoring the text with several windows" if text else "running a short prompt"
        with Console(stderr=True).status(words):
            checks = examine(loaded, dtype=name, tokens=read, **sizes)
    if as_json:
        result = {"model": str(model), "device": str(place), "dtype": name, **sizes}
        print(json.dumps(result | {"checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        table = Table("check", "status", "evidence", "what to change")
        for check in checks:
            status = f"[{_STYLES[check.status]}]{check.status}[/]"
            table.add_row(check.name, status, check.evidence, check.advice)
        Console().print(table)
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(1)


def _torch_dtype(name: str) -> Any:
    from ..plan import DTYPES

    return DTYPES[name]


def _read(model: Path, text: Path, most: int) -> Any:
    """The first tokens of a text, at most so many to be scored."""
    from ..data import load_tokenizer, tokenize_files

    with progress_bar(Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
        file = tokenize_files(load_tokenizer(model), [text], Path(folder) / "text.bin", progress)
        return file.array()[: most + 1].copy()
