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

from ..data import END_OF_TEXT, load_tokenizer, read_text
from ..terminal import format_bytes

ECHO = 300  # characters of the prompt's end shown before its continuation


def _sampling(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel="Sampling")


def generate_command(
    prompt: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The prompt.", show_default=False)
    ] = None,
    model: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Holds config.json, model.safetensors, tokenizer.json."),
    ] = Path("models/tlinformer-prose-8m"),
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Read the prompt from .txt, .txt.xz or .txt.gz; - is stdin."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate.")] = 256,
    stop_at_end: Annotated[
        bool, typer.Option("--stop-at-end", help="Stop where the model ends the document.")
    ] = False,
    temperature: Annotated[float, _sampling("T", "0 is greedy.")] = 0.8,
    top_k: Annotated[int, _sampling("K", "Keep the K likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[
        float, _sampling("P", "Keep the fewest tokens whose probability reaches P.")
    ] = 0.95,
    min_p: Annotated[
        float, _sampling("P", "Drop tokens less likely than P times the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, _sampling("R", "Above 1, tokens already there become less likely.")
    ] = 1.0,
    seed: Annotated[int, _sampling("N", "Same seed, same text.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto (as saved), bfloat16 (half the memory) or float32."
        ),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads (default: all).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")
    ] = False,
) -> None:
    """Continue a prompt: text to standard output, progress and a summary to standard error."""
    import torch

    from ..engine import Engine, SamplingParams
    from ..model import TLinFormerForCausalLM

    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
    text = _read_prompt(prompt, prompt_file)
    loaded = TLinFormerForCausalLM.from_pretrained(model)
    tokenizer = load_tokenizer(model)
    vocabulary, known = loaded.config.vocab_size, tokenizer.get_vocab_size()
    if known > vocabulary:
        raise ValueError(
            f"{model}: tokenizer.json has {known:,} tokens, the model {vocabulary:,}; "
            "use the tokenizer that the model was trained with"
        )
    ids = torch.tensor([tokenizer.encode(text).ids])
    end = tokenizer.token_to_id(END_OF_TEXT)
    if stop_at_end and end is None:
        raise ValueError(f"--stop-at-end: {model}'s tokenizer has no {END_OF_TEXT}")
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_token_ids=[end] if stop_at_end and end is not None else [],
    )
    threads = threads or torch.get_num_threads()
    engine = Engine(
        loaded,
        max_context=ids.numel() + max_new_tokens,
        dtype=None if dtype == "auto" else dtype,
        num_threads=threads,
    )
    # A rehearsal: bad sampling options and weights are refused before a long prompt is read.
    engine.prefill(ids[:, :1])
    engine.generate(1, sampling)
    engine.reset()

    console = Console(stderr=True, highlight=False)
    if not as_json:
        parameters = sum(p.numel() for p in loaded.parameters())
        console.print(
            f"{model.resolve().name}: {parameters / 1e6:,.1f}M parameters, "
            f"{str(engine.dtype).removeprefix('torch.')}, {threads} threads",
            style="dim",
            markup=False,
        )
    prefill_seconds = _prefill(engine, ids, console)
    stream = _TextStream(engine, tokenizer, None if as_json else sys.stdout)
    stream.echo(text)
    stream.expect_slide()
    began, interrupted = time.perf_counter(), False
    try:
        engine.generate(max_new_tokens, sampling, on_token=stream.add)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    decode_seconds = time.perf_counter() - began
    summary = _summary(engine, ids.numel(), max_new_tokens, stream, prefill_seconds, decode_seconds)
    if as_json:
        print(json.dumps({"text": stream.text, **summary}))
    else:
        _print_summary(summary, console)
    if interrupted:
        raise KeyboardInterrupt(f"interrupted after {stream.tokens:,} tokens")


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is None and file is None:
        raise ValueError(
            'no prompt; give one (tlinformer generate "In the beginning"), --prompt-file FILE, '
            "or --prompt-file - for standard input"
        )
    if prompt is not None and file is not None:
        raise ValueError("both a prompt and --prompt-file are given; give one of them")
    if prompt is not None:
        name, raw = "the prompt", prompt.encode("utf-8", "surrogateescape")
    elif str(file) == "-":
        name, raw = "standard input", sys.stdin.buffer.read()
    else:
        assert file is not None
        name, raw = str(file), "".join(read_text(file)).encode()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason}); convert it first") from None
    if not text:
        raise ValueError(f"{name} is empty; give at least one character")
    return text


class _TextStream:
    """Writes tokens as text as soon as they make up whole characters, and times the slides."""

    def __init__(self, engine: Any, tokenizer: Any, file: Any) -> None:
        self._engine, self._tokenizer, self._file = engine, tokenizer, file
        self._terminal = file is not None and file.isatty()
        self._pending: list[int] = []
        self._slide: tuple[int, float] | None = None  # slides before it, when it began
        self.text, self.tokens, self.slide_seconds = "", 0, 0.0

    def _write(self, text: str) -> None:
        if self._file is not None:
            print(text, end="", flush=True, file=self._file)

    def echo(self, prompt: str) -> None:
        """Shows the end of the prompt, dim, where a person reads along."""
        if self._terminal:
            tail = prompt if len(prompt) <= ECHO else "..." + prompt[-ECHO:]
            tail = "".join(c if c.isprintable() or c == "\n" else " " for c in tail)
            self._write(f"\x1b[2m{tail}\x1b[0m")

    def add(self, _sequence: int, token: int) -> None:
        self._end_slide()
        self.tokens += 1
        self._pending.append(token)
        self._flush(at_most=8)
        self.expect_slide()

    def expect_slide(self) -> None:
        """Starts the clock, and says so on a terminal, if the next token has to slide."""
        stats = self._engine.stats
        if stats.window_fill == self._engine.config.generation_window:
            self._slide = (stats.slides, time.perf_counter())
            if self._terminal:  # a note on the line below; the cursor comes back
                held = stats.history_length + stats.window_fill
                note = f"[sliding: rereading {held:,} tokens]"
                self._write(f"\x1bD\x1b[A\x1b7\r\n\x1b[2m{note}\x1b[0m")

    def _end_slide(self) -> None:
        if self._slide is not None:
            slides, began = self._slide
            if self._engine.stats.slides > slides:
                self.slide_seconds += time.perf_counter() - began
            self._slide = None
            if self._terminal:
                self._write("\x1b[2K\x1b8")

    def _flush(self, at_most: int) -> None:
        text = self._tokenizer.decode(self._pending, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(self._pending) < at_most:  # in the middle of a character
            return
        self._pending.clear()
        self.text += text
        self._write(text)

    def close(self) -> None:
        self._end_slide()
        self._flush(at_most=0)
        self._write("\n")


def _prefill(engine: Any, ids: Any, console: Console) -> float:
    columns = (
        TextColumn("reading [bold]{task.fields[read]:,}[/] of {task.fields[tokens]:,} tokens"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    tokens, shown = ids.numel(), console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=1.0, read=0, tokens=tokens)
        began = time.perf_counter()
        engine.prefill(
            ids,
            progress=lambda share: progress.update(task, completed=share, read=int(share * tokens)),
        )
        return time.perf_counter() - began


def _summary(
    engine: Any,
    prompt: int,
    max_new_tokens: int,
    stream: _TextStream,
    prefill_seconds: float,
    decode_seconds: float,
) -> dict[str, Any]:
    config, stats, new = engine.config, engine.stats, stream.tokens
    # Both caches are counted as allocated, for as many tokens as this run may hold.
    row = 2 * engine.dtype.itemsize * config.kv_heads * config.head_dim * config.num_layers
    return {
        "prompt_tokens": prompt,
        "new_tokens": new,
        "prefill_seconds": prefill_seconds,
        "prefill_tokens_per_second": prompt / prefill_seconds,
        "decode_seconds": decode_seconds,
        "decode_tokens_per_second": new / decode_seconds,
        "slide_seconds": stream.slide_seconds,
        "hits": stats.hits,
        "slides": stats.slides,
        "cache_bytes": stats.cache_bytes,
        "standard_transformer_cache_bytes": row * (prompt + max_new_tokens),
    }


def _print_summary(s: dict[str, Any], console: Console) -> None:
    between, sliding = "", ""
    if s["slide_seconds"]:
        speed = s["new_tokens"] / max(s["decode_seconds"] - s["slide_seconds"], 1e-9)
        between = f" ({speed:,.0f} between slides)"
        sliding = f"; sliding took {s['slide_seconds']:.2f} s of the generation"
    ratio = s["standard_transformer_cache_bytes"] / s["cache_bytes"]
    lines = {
        "prompt": f"{s['prompt_tokens']:,} tokens in {s['prefill_seconds']:.2f} s, "
        f"{s['prefill_tokens_per_second']:,.0f} tokens/s",
        "generated": f"{s['new_tokens']:,} tokens in {s['decode_seconds']:.2f} s, "
        f"{s['decode_tokens_per_second']:,.0f} tokens/s{between}",
        "cache": f"{s['hits']:,} hits, {s['slides']:,} slides{sliding}",
        "memory": f"{format_bytes(s['cache_bytes'])} of keys and values; a Transformer's: "
        f"{format_bytes(s['standard_transformer_cache_bytes'])} ({ratio:.1f}x)",
    }
    console.print()
    for name, value in lines.items():
        console.print(f"  {name:<9}  {value}", markup=False, soft_wrap=True)
