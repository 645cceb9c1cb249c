"""`tlinformer plan`: every byte of an engine, before any is allocated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..config import TLinFormerConfig
from ..terminal import format_bytes

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def parse_tokens(text: str) -> int:
    """'128K' -> 131072; K, M and G are powers of 1024."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    if not match:
        raise ValueError(f"--context is {text!r}; it must be a number of tokens such as 4096 or 1M")
    return int(match[1]) * _UNITS[match[2]]


def plan_command(
    model: Annotated[
        Path, typer.Argument(metavar="PATH", help="Model directory, or a config.json.")
    ] = Path("models/tlinformer-prose-8m"),
    context: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens a sequence may hold: 4096, 128K, 1M.")
    ] = "128K",
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sequences.")] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")
    ] = "bfloat16",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, or cuda (takes a CUDA build).")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the memory an engine needs, region by region, without allocating it."""
    from ..engine import available_memory, plan_cache

    file = model / "config.json" if model.is_dir() else model
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; name a model directory or a config.json")
    try:
        config = TLinFormerConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no usable config.json: {error}") from error
    tokens = parse_tokens(context)
    sizes: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device}
    plan = plan_cache(config, max_context=tokens, **sizes)
    element = 4 if dtype == "float32" else 2
    d, f, kv = config.hidden_size, config.mlp_size, config.kv_heads * config.head_dim
    layer = 5 * d + (d + 1) * (d + 2 * kv) + d * (d + 3 * f)
    weights = element * (config.num_layers * layer + d * (config.vocab_size + 2))
    standard = 2 * element * kv * config.num_layers * tokens * batch_size
    available = available_memory(device)
    refusal = None
    if available:  # 0: unknown
        room = max(1, available - weights)
        try:
            plan_cache(config, max_context=tokens, memory_limit=room, **sizes)
        except RuntimeError as error:
            refusal = str(error)
    result: dict[str, Any] = {
        "context": tokens,
        **sizes,
        "bytes": plan.bytes_by_region,
        "cache_bytes": plan.cache_bytes,
        "total_bytes": plan.total_bytes,
        "weights_bytes": weights,
        "standard_transformer_cache_bytes": standard,
        "available_bytes": available,
        "fits": refusal is None,
    }
    if as_json:
        print(json.dumps(result))
        return
    what = {
        "history": "K and V of the whole history, 1 layer a block",
        "context": "K and V of the compressed history",
        "window": "K and V of the generation window",
        "stream": "the history's activations between blocks",
        "workspace": "activations of the piece under way, logits",
    }
    sequences = f"{batch_size:,} sequence" + ("s" if batch_size > 1 else "")
    table = Table(
        "region", "size", "what it holds", title=f"{sequences} of {tokens:,} tokens, {dtype}"
    )
    table.columns[1].justify = "right"
    for name, size in plan.bytes_by_region.items():
        table.add_row(name, format_bytes(size), what[name])
    table.add_section()
    free = f"of {format_bytes(available)} available" if available else ""
    table.add_row("total", format_bytes(plan.total_bytes), free)
    table.add_row("weights", format_bytes(weights), "borrowed from the model")
    table.add_section()
    table.add_row("Transformer", format_bytes(standard), "cache of one of as many layers")
    console = Console()
    console.print(table)
    if refusal:
        console.print(f"It does not fit: {refusal}", style="red", highlight=False, soft_wrap=True)
