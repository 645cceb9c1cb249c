"""`tlinformer eval`: perplexity of text under a model."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..terminal import progress_bar


def eval_command(
    text: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Text files (.txt, .txt.xz, .txt.gz), or one .bin token file; a directory before "
            "them is --model.",
            show_default=False,
        ),
    ],
    model: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Holds config.json, model.safetensors, tokenizer.json."),
    ] = Path("models/tlinformer-prose-8m"),
    sequence_length: Annotated[
        int, typer.Option(min=1, help="Tokens in a chunk; a token sees only its own chunk.")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks scored at once.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Score only so many tokens from the start.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json or GPT-2's vocabulary directory (default: the model's)."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 autocast on CUDA), bfloat16 or float32.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Score text: perplexity and bits per byte.

    Every token but the first is scored once, given the tokens before it in its own chunk.
    """
    import torch

    from ..data import TokenFile, load_tokenizer, token_byte_lengths, tokenize_files
    from ..device import resolve_device
    from ..evaluation import evaluate
    from ..recipe import autocast_dtype, load_model

    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype is {dtype!r}; it must be auto, bfloat16 or float32")
    if len(text) > 1 and text[0].is_dir():
        model, *text = text
    for path in text:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is no file; name text files, and a model before them or with --model"
            )
    place = resolve_device(device)
    loaded = load_model(str(model), dtype=torch.float32, device=place)
    vocabulary = load_tokenizer(tokenizer or model)
    console = Console(stderr=True)
    with progress_bar(console) as progress, tempfile.TemporaryDirectory() as folder:
        if text[0].suffix == ".bin" and len(text) == 1:
            file = TokenFile.load(text[0])
        else:
            file = tokenize_files(vocabulary, text, Path(folder) / "text.bin", progress)
        tokens = file.array()[:max_tokens]
        task = progress.add_task("scoring", total=len(tokens) - 1)
        began = time.perf_counter()
        result: dict[str, Any] = evaluate(
            loaded,
            tokens,
            sequence_length,
            batch_size=batch_size,
            byte_lengths=token_byte_lengths(vocabulary),
            dtype=autocast_dtype(dtype, place),
            on_progress=lambda count: progress.advance(task, count),
        )
        result["seconds"] = time.perf_counter() - began
    if as_json:
        print(json.dumps({"model": str(model), "text": [str(path) for path in text], **result}))
        return
    table = Table("perplexity", "bits per byte", "loss", "tokens", "sequence length", "tokens/s")
    table.add_row(
        f"{result['perplexity']:.2f}",
        f"{result['bits_per_byte']:.4f}" if result["bits_per_byte"] else "-",
        f"{result['loss']:.4f}",
        f"{result['tokens']:,}",
        f"{sequence_length:,}",
        f"{result['tokens'] / result['seconds']:,.0f}",
    )
    Console().print(table)
