"""`tlinformer generate`: continue a prompt, however long."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..data import load_tokenizer, read_text


def generate_command(
    prompt: Annotated[str | None, typer.Argument(help="The prompt's text.")] = None,
    model: Annotated[
        Path, typer.Option(help="Model directory: config.json, model.safetensors, tokenizer.json.")
    ] = Path("models/tlinformer-prose-8m"),
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Read the prompt from a file (.txt, .txt.xz, .txt.gz), or - for stdin."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Keep the smallest set whose probability reaches this.")
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the likeliest's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens already there become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    stop_at_end: Annotated[
        bool, typer.Option(help="Stop where the model ends the document.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto (the model's), bfloat16 (half the memory) or float32.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: all).")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")
    ] = False,
) -> None:
    """Continue a prompt: text to standard output, progress and a summary to standard error."""
    from ..engine import Engine, SamplingParams
    from ..model import TLinFormerForCausalLM

    if (prompt is None) == (prompt_file is None):
        raise ValueError("give either a prompt or --prompt-file (- reads standard input)")
    if prompt is None:
        text = sys.stdin.read() if str(prompt_file) == "-" else "".join(read_text(str(prompt_file)))
    else:
        text = prompt
    tokenizer = load_tokenizer(model)
    loaded = TLinFormerForCausalLM.from_pretrained(model)
    vocabulary, known = loaded.config.vocab_size, tokenizer.get_vocab_size()
    if known > vocabulary:
        raise ValueError(f"{model}: the tokenizer has {known} tokens, the model {vocabulary}")
    ids = tokenizer.encode(text).ids
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    engine = Engine(
        loaded,
        max_context=len(ids) + max_new_tokens,
        dtype=None if dtype == "auto" else dtype,
        num_threads=threads,
    )
    end = tokenizer.token_to_id("<|endoftext|>")
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_token_ids=[end] if stop_at_end and end is not None else [],
    )
    console = Console(stderr=True)
    prefill_seconds = _prefill(engine, ids, console)
    stream = _TextStream(tokenizer, None if as_json else sys.stdout)
    began = time.perf_counter()
    new = engine.generate(max_new_tokens, sampling, on_token=stream.add)[0].tolist()
    decode_seconds = time.perf_counter() - began
    summary = _summary(engine, len(ids), len(new), prefill_seconds, decode_seconds)
    if as_json:
        print(json.dumps({"text": tokenizer.decode(new, skip_special_tokens=False), **summary}))
    else:
        print(flush=True)
        console.print(_table(summary))


class _TextStream:
    """Writes tokens as text as soon as they make up whole characters."""

    def __init__(self, tokenizer: Any, file: Any) -> None:
        self._tokenizer, self._file = tokenizer, file
        self._pending: list[int] = []

    def add(self, _sequence: int, token: int) -> None:
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(self._pending) < 8:  # in the middle of a character
            return
        self._pending.clear()
        if self._file is not None:
            print(text, end="", flush=True, file=self._file)


def _prefill(engine: Any, ids: list[int], console: Console) -> float:
    import torch

    columns = (
        TextColumn("reading [bold]{task.fields[read]:,}[/] of {task.fields[tokens]:,} tokens"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0, read=0, tokens=len(ids))
        began = time.perf_counter()
        engine.prefill(
            torch.tensor([ids]),
            progress=lambda share: progress.update(
                task, completed=share, read=int(share * len(ids))
            ),
        )
        return time.perf_counter() - began


def _summary(
    engine: Any, prompt: int, new: int, prefill_seconds: float, decode_seconds: float
) -> dict[str, Any]:
    config, stats = engine.config, engine.stats
    element = engine.dtype.itemsize
    standard = 2 * element * config.kv_heads * config.head_dim * config.num_layers * (prompt + new)
    return {
        "prompt_tokens": prompt,
        "new_tokens": new,
        "prefill_seconds": prefill_seconds,
        "prefill_tokens_per_second": prompt / prefill_seconds,
        "decode_seconds": decode_seconds,
        "decode_tokens_per_second": new / decode_seconds,
        "hits": stats.hits,
        "slides": stats.slides,
        "cache_bytes": stats.cache_bytes,
        "standard_transformer_cache_bytes": standard,
    }


def _table(s: dict[str, Any]) -> Table:
    def mib(size: int) -> str:
        return f"{size / 2**20:,.1f} MiB"

    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row(
        "prompt",
        f"{s['prompt_tokens']:,} tokens in {s['prefill_seconds']:.2f} s",
        f"{s['prefill_tokens_per_second']:,.0f} tokens/s",
    )
    table.add_row(
        "generated",
        f"{s['new_tokens']:,} tokens in {s['decode_seconds']:.2f} s",
        f"{s['decode_tokens_per_second']:,.0f} tokens/s",
    )
    table.add_row("cache", f"{s['hits']:,} hits", f"{s['slides']:,} slides")
    ratio = s["standard_transformer_cache_bytes"] / s["cache_bytes"]
    table.add_row(
        "memory",
        mib(s["cache_bytes"]),
        f"a standard Transformer's: {mib(s['standard_transformer_cache_bytes'])} ({ratio:.1f}x)",
    )
    return table
