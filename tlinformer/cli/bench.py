"""`tlinformer bench`: how fast a model reads, slides and generates, and what bounds it."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..terminal import format_rate
from .inputs import AsJson, DeviceName, EngineDtype, Threads, check_threads, pick_device
from .plan import parse_tokens

SUITES = ("decode", "prefill", "batch", "cache", "memory", "trace", "state", "train-step")


def run_suite(arguments: list[str]) -> int:
    """Runs a suite of the repository's benchmarks/: where the package lies in a clone, or here.

    Returns:
        Its exit code.

    Raises:
        FileNotFoundError: where there is no clone.
    """
    clones = [Path(__file__).resolve().parents[2], Path.cwd()]
    found = [clone for clone in clones if (clone / "benchmarks/parts.sh").is_file()]
    if not found:
        raise FileNotFoundError(
            f"the suite {arguments[0]} is in the repository: clone it, and call this in its folder"
        )
    folder = found[0] / "benchmarks"
    sys.argv = [str(folder), *arguments]
    try:
        runpy.run_path(str(folder), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def bench_command(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="Holds config.json and model.safetensors.")
    ] = Path("models/tlinformer-prose-8m"),
    model: Annotated[Path | None, typer.Option("--model", metavar="DIR", help="The same.")] = None,
    context: Annotated[
        str, typer.Option(metavar="N", help="Tokens of history, whole windows: 16384, 128K, 1M.")
    ] = "16K",
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens timed between slides (default: 100).")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", metavar="N", help="Sequences.")
    ] = 1,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 is greedy.")] = 0.0,
    roofline: Annotated[
        bool,
        typer.Option("--roofline", help="What each verb took beside what this machine can do."),
    ] = False,
    device: DeviceName = "auto",
    dtype: EngineDtype = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Time a prefill of random tokens, the token that slides, and those between slides.

    In a clone, `tlinformer bench decode`, prefill, batch, cache, memory, trace, state and
    train-step measure beside other models and implementations; --help after their names says more.
    """
    import torch

    from ..engine import Engine, SamplingParams
    from ..model import TLinFormerForCausalLM
    from ..roofline import compare, measure_ceilings, run

    check_threads(threads)
    model = model or path
    if not model.exists():
        raise FileNotFoundError(
            f"{model} is neither a model directory nor a suite: {', '.join(SUITES)}"
        )
    loaded = TLinFormerForCausalLM.from_pretrained(model)
    window, kind = loaded.config.generation_window, None if dtype == "auto" else dtype
    tokens = min(100, window - 1) if tokens is None else tokens
    if not 1 <= tokens < window:
        raise ValueError(f"--tokens is {tokens}; between two slides are 1 to {window - 1}")
    history = parse_tokens(context) // window * window
    if not history:
        raise ValueError(f"--context is {context}; it must be at least a window, {window}")
    loaded.to(pick_device(device, loaded.config, kind))
    if threads:
        torch.set_num_threads(threads)
    engine = Engine(loaded, max_context=history + 1 + tokens, batch_size=batch_size, dtype=kind)
    with Console(stderr=True).status(f"reading {history:,} tokens, twice, and going on from them"):
        ceilings = measure_ceilings(engine.device) if roofline else None
        stages = run(engine, history, tokens, SamplingParams(temperature=temperature), roofline)
    for stage in stages if ceilings else ():
        for verb in stage.verbs:
            compare(verb, ceilings or {})
    result: dict[str, Any] = {
        "model": model.resolve().name,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "history": history,
        "ceilings": ceilings,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }
    if as_json:
        print(json.dumps(result))
    else:
        _show(result, Console())


def _show(result: dict[str, Any], console: Console) -> None:
    title = "{model}, {dtype}, {device}, batch {batch_size}, {history:,} tokens of history"
    table = Table("stage", "tokens", "ms", "tokens/s", title=title.format_map(result))
    for stage in result["stages"]:
        rate = result["batch_size"] * stage["tokens"] / stage["seconds"]
        milliseconds = f"{stage['seconds'] * 1e3:,.2f}"
        table.add_row(stage["stage"], f"{stage['tokens']:,}", milliseconds, format_rate(rate))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    if not result["ceilings"]:
        return
    bandwidth, rate = (result["ceilings"][f"{k}_per_second"] / 1e9 for k in ("bytes", "flops"))
    console.print(
        f"measured in this run: reads {bandwidth:,.1f} GB/s, products {rate:,.0f} GFLOP/s",
        highlight=False,
    )
    for stage in result["stages"]:
        console.print(_roofline(stage))


def _roofline(stage: dict[str, Any]) -> Table:
    title = f"{stage['stage']}: {stage['seconds'] * 1e6:,.0f} us"
    table = Table("verb", "calls", "us", "MB", "GFLOP", "bound by", "share", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    rest = stage["seconds"] * 1e6
    for verb in stage["verbs"]:
        rest -= verb["microseconds"]
        share = "" if verb["share"] is None else f"{verb['share']:.0%}"
        numbers = verb["bytes"] / 1e6, verb["flops"] / 1e9
        table.add_row(
            verb["verb"],
            f"{verb['calls']:,}",
            f"{verb['microseconds']:,.0f}",
            *(f"{number:,.2f}" if number else "" for number in numbers),
            verb["bound"],
            share,
        )
        for kernel in verb["kernels"]:
            count, took = f"{kernel['calls']:,}", f"{kernel['microseconds']:,.0f}"
            table.add_row(f"  {kernel['name'][:40]}", count, took, style="dim")
    table.add_row("outside", "", f"{rest:,.0f}", style="dim")
    return table
