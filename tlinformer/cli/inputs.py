"""What commands are given: a prompt, a device, files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

# Options that several commands have.
DeviceName = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, or auto: a GPU if it can.")
]
EngineDtype = Annotated[
    str, typer.Option(metavar="NAME", help="float32 (CPU), bfloat16, float16 (CUDA), or auto.")
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Threads of the CPU (default: all).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def pick_device(device: str, config: Any, dtype: str | None) -> Any:
    """Where to run; "auto" prefers a GPU if this build's CUDA engine takes the model and dtype."""
    import torch

    from ..device import resolve_device
    from ..plan import plan_cache

    if device == "auto" and torch.cuda.is_available():
        try:
            plan_cache(config, max_context=1, dtype=dtype, device="cuda")
        except ValueError:
            device = "cpu"
    return resolve_device(device)


def check_threads(threads: int | None) -> None:
    """Raises ValueError for --threads that this machine has no CPUs for."""
    cpus = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cpus:
        raise ValueError(f"--threads is {threads}; this machine takes 1 to {cpus}, one a CPU")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    from ..data import read_text

    if (prompt is None) == (file is None):
        given = "no prompt" if prompt is None else "both a prompt and --prompt-file are given"
        raise ValueError(
            f'{given}; give one: tlinformer generate "In the beginning", --prompt-file FILE, '
            "or --prompt-file - for standard input"
        )
    if prompt is not None:
        name, raw = "the prompt", prompt.encode("utf-8", "surrogateescape")
    elif str(file) == "-":
        name, raw = "standard input", sys.stdin.buffer.read()
    else:
        name = str(file)
        raw = "".join(read_text(name)).encode()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason}); convert it first") from None
    if not text:
        raise ValueError(f"{name} is empty; give at least one character")
    return text


@contextmanager
def file_errors() -> Iterator[None]:
    """What the system says of a file is a message for people."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(str(error)) from error
