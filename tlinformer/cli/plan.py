"""`tlinformer plan`: every byte of an engine, before any is allocated, and a token's cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..config import TLinFormerConfig
from ..terminal import format_bytes, format_rate
from .inputs import AsJson, Threads, check_threads, pick_device

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
# Larger models take long to fill with random weights on a CPU.
_MOST_CPU_WEIGHTS = 2**30

# Shares of a ceiling that nothing reaches, unless something else ran while it was measured.
_TOO_GOOD = 1.25


def parse_tokens(text: str) -> int:
    """'128K' -> 131072; K, M and G are powers of 1024."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    if not match:
        raise ValueError(f"--context is {text!r}; it must be a number of tokens such as 4096 or 1M")
    return int(match[1]) * _UNITS[match[2]]


def read_config(path: Path) -> TLinFormerConfig:
    """The config of a model directory, or in a file; errors name the file."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; name a model directory or a config.json")
    try:
        return TLinFormerConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no usable config.json: {error}") from error


def plan_command(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Model directory, or a config.json.")
    ] = Path("models/tlinformer-prose-8m"),
    model: Annotated[
        Path | None, typer.Option("--model", "--config", metavar="PATH", help="The same.")
    ] = None,
    context: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens a sequence may hold: 4096, 128K, 1M.")
    ] = "128K",
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", metavar="N", help="Sequences.")
    ] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")
    ] = "bfloat16",
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="cpu, cuda (takes a CUDA build), or auto: a GPU if it can."
        ),
    ] = "auto",
    measure: Annotated[
        bool | None,
        typer.Option(
            help="Predict times from short runs with random weights, or do not. By default, where "
            "it fits the device; on a CPU, up to 1 GiB of weights."
        ),
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Show the memory an engine needs, the longest context that fits, and what tokens will cost.

    Memory is planned, not allocated. Times are predicted: of the model's shape, cut to a few blocks
    and short histories, prompts, slides and tokens are timed on the device; their costs grow
    linearly with blocks and history. Beside them stands what the device's bandwidth and product
    rate, measured in the same minute, allow.

    Exit code 1 if the context does not fit.
    """
    from ..plan import fit_device, weights_bytes

    check_threads(threads)
    config = read_config(model or path)
    tokens = parse_tokens(context)
    if device == "auto":
        device = str(pick_device(device, config, dtype))
    sizes: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device}
    fit = fit_device(config, max_context=tokens, **sizes)
    weights = weights_bytes(config, dtype)
    row = 2 * (4 if dtype == "float32" else 2) * config.kv_heads * config.head_dim
    if measure is None:
        measure = bool(fit.available_bytes) and not fit.refusal
        measure &= "cuda" in device or weights <= _MOST_CPU_WEIGHTS
    result: dict[str, Any] = {
        "context": tokens,
        **sizes,
        "bytes": fit.plan.bytes_by_region,
        "cache_bytes": fit.plan.cache_bytes,
        "total_bytes": fit.plan.total_bytes,
        "weights_bytes": weights,
        "standard_transformer_cache_bytes": row * config.num_layers * tokens * batch_size,
        "available_bytes": fit.available_bytes,
        "fits": fit.refusal is None,
        "longest_context": fit.longest_context,
        "prediction": None,
    }
    if measure:
        result["prediction"] = _predict(config, tokens, batch_size, dtype, device, threads)
    if as_json:
        print(json.dumps(result))
    else:
        _show(result, fit.refusal, Console())
    if fit.refusal:
        raise typer.Exit(1)


def _show(result: dict[str, Any], refusal: str | None, console: Console) -> None:
    console.print(_memory_table(result))
    if result["longest_context"] is not None:
        text = f"The longest context that fits: {result['longest_context']:,} tokens."
        console.print(text, highlight=False)
    if refusal:
        text = f"It does not fit: {refusal}"
        console.print(text, style="red", highlight=False, soft_wrap=True)
    if result["prediction"]:
        _show_prediction(result["prediction"], result, console)


def _predict(
    config: TLinFormerConfig,
    tokens: int,
    batch_size: int,
    dtype: str,
    device: str,
    threads: int | None,
) -> dict[str, Any]:
    """What events cost at the end of the context, and where that comes from."""
    import torch

    from ..plan import DTYPES
    from ..predict import measure_costs

    if threads:
        torch.set_num_threads(threads)
    history = (tokens - 1) // config.generation_window * config.generation_window
    with Console(stderr=True).status(f"measuring on {device}"):
        costs = measure_costs(
            config, longest=history, batch_size=batch_size, dtype=DTYPES[dtype], device=device
        )
    found = costs.at(history)
    events = {
        name: {
            "milliseconds": event.microseconds / 1e3,
            "bytes": event.bytes,
            "flops": event.flops,
            "bound": event.bound,
            "share": event.share,
        }
        for name, event in found.events.items()
    }
    amortised = found.amortised_seconds * 1e3
    given = {"probed_histories": costs.histories, "ceilings": costs.ceilings}
    return {"history": history, **events, "amortised_milliseconds": amortised, **given}


def _memory_table(result: dict[str, Any]) -> Table:
    what = {
        "history": "K and V of the whole history, 1 layer a block",
        "context": "K and V of the compressed history",
        "window": "K and V of the generation window",
        "stream": "the history's activations between blocks",
        "workspace": "activations of the piece under way, logits",
    }
    sequences = f"{result['batch_size']:,} sequence" + ("s" if result["batch_size"] > 1 else "")
    title = f"{sequences} of {result['context']:,} tokens, {result['dtype']}, {result['device']}"
    table = Table("region", "size", "what it holds", title=title)
    table.columns[1].justify = "right"
    for name, size in result["bytes"].items():
        table.add_row(name, format_bytes(size), what[name])
    table.add_section()
    available = result["available_bytes"]
    free = f"of {format_bytes(available)} available" if available else ""
    table.add_row("total", format_bytes(result["total_bytes"]), free)
    table.add_row("weights", format_bytes(result["weights_bytes"]), "borrowed from the model")
    table.add_section()
    standard = format_bytes(result["standard_transformer_cache_bytes"])
    table.add_row("Transformer", standard, "cache of one of as many layers")
    return table


def _show_prediction(p: dict[str, Any], result: dict[str, Any], console: Console) -> None:
    title = f"predicted with {p['history']:,} tokens of history"
    table = Table("event", "ms", "GB", "TFLOP", "bound by", "of the ceiling", title=title)
    for column in table.columns[1:4]:
        column.justify = "right"
    names = {"prefill": "the prompt", "slide": "a token that slides", "hit": "a token between"}
    for name, words in names.items():
        if event := p.get(name):
            numbers = event["milliseconds"], event["bytes"] / 1e9, event["flops"] / 1e12
            shown = (f"{number:,.3f}" for number in numbers)
            table.add_row(words, *shown, event["bound"], f"{event['share']:.0%}")
    table.add_row("a token, amortised", f"{p['amortised_milliseconds']:,.3f}")
    console.print(table)
    rate = format_rate(result["batch_size"] * 1e3 / p["amortised_milliseconds"])
    bandwidth, products = (p["ceilings"][f"{of}_per_second"] / 1e9 for of in ("bytes", "flops"))
    longest = max(p["probed_histories"])
    shares = [event["share"] for name in names if (event := p.get(name))]
    console.print(
        f"{rate} tokens/s. Times from runs of up to {longest:,} tokens on {result['device']}; "
        f"ceilings measured there: reads {bandwidth:,.1f} GB/s, products {products:,.0f} GFLOP/s.",
        highlight=False,
        soft_wrap=True,
    )
    if max(shares) > _TOO_GOOD:
        console.print("The machine was busy in between: measure again.", style="yellow")
