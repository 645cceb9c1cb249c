"""`tlinformer generate`: continue a prompt, however long."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..terminal import format_bytes, format_rate
from .inputs import DeviceName, Threads, check_threads, file_errors, pick_device, read_prompt

ECHO = 300  # characters of the prompt's end shown before its continuation
LONG = 0.5  # seconds after which a slide shows its progress


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
    load_state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on from there; a prompt is appended and optional."),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save what was read, before generating: --load-state goes on there.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens to generate; 0 only with --save-state.")
    ] = 256,
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
    seed: Annotated[int, _sampling("N", "Same seed, same text, on processors of a kind.")] = 0,
    device: DeviceName = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="float32 (CPU), bfloat16, float16 (CUDA), or auto: as saved, at most 16 bits on "
            "CUDA.",
        ),
    ] = "auto",
    threads: Threads = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")
    ] = False,
) -> None:
    """Continue a prompt: text to standard output, progress and a summary to standard error."""
    import torch

    from ..data import END_OF_TEXT, load_tokenizer
    from ..engine import Engine, SamplingParams, state_lengths
    from ..model import TLinFormerForCausalLM

    least = 0 if save_state else 1
    if max_new_tokens < least:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be at least {least}")
    check_threads(threads)
    saved = 0
    if load_state:
        with file_errors():
            lengths = state_lengths(load_state)
        if len(lengths) > 1:
            raise ValueError(f"{load_state} holds {len(lengths)} sequences; generate takes one")
        saved = lengths[0]
    if prompt and os.path.isfile(f"{prompt}/config.json"):  # a Path takes no long text
        raise ValueError(f"the prompt {prompt} is a model; name it with --model")
    if not model.exists():
        raise FileNotFoundError(f"{model} is not here; name a model directory with --model")
    without = load_state and prompt is None and prompt_file is None
    text = "" if without else read_prompt(prompt, prompt_file)
    loaded = TLinFormerForCausalLM.from_pretrained(model)
    tokenizer = load_tokenizer(model)
    vocabulary, known = loaded.config.vocab_size, tokenizer.get_vocab_size()
    if known > vocabulary:
        raise ValueError(
            f"{model}: tokenizer.json has {known:,} tokens, the model {vocabulary:,}; "
            "use the tokenizer that the model was trained with"
        )
    ids = torch.tensor([tokenizer.encode(text).ids], dtype=torch.int64)
    stop: list[Any] = [tokenizer.token_to_id(END_OF_TEXT)] if stop_at_end else []
    if stop == [None]:
        raise ValueError(f"--stop-at-end: {model}'s tokenizer has no {END_OF_TEXT}")
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
    threads = threads or torch.get_num_threads()
    length = max(1, saved + ids.numel() + max_new_tokens)
    kind = None if dtype == "auto" else dtype
    loaded.to(pick_device(device, loaded.config, kind))
    engine = Engine(loaded, max_context=length, dtype=kind, num_threads=threads)
    # A rehearsal: bad sampling options and weights are refused before a long prompt is read.
    engine.prefill(torch.tensor([[0]]))
    engine.generate(min(1, length - 1), sampling)
    engine.reset()

    console = Console(stderr=True, highlight=False)
    if not as_json:
        size = sum(p.numel() for p in loaded.parameters()) / 1e6
        kind = str(engine.dtype).removeprefix("torch.")
        place = f"{threads} threads"
        if engine.device.type == "cuda":
            place = torch.cuda.get_device_name(engine.device)
        about = f"{model.resolve().name}: {size:,.1f}M parameters, {kind}, {place}"
        console.print(about, style="dim", markup=False)
    prefill_seconds = _read(engine, ids, load_state, console)
    before = engine.stats
    if save_state:
        with file_errors():
            engine.save_state(save_state)
        if not as_json:
            console.print(f"saved {save_state}", style="dim", markup=False)
    stream = _TextStream(tokenizer, None if as_json else sys.stdout, console)
    stream.echo(text)
    began, interrupted = time.perf_counter(), False
    try:
        engine.generate(max_new_tokens, sampling, on_token=stream.add, progress=stream.slide)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    seconds = prefill_seconds, time.perf_counter() - began
    summary = _summary(engine, before, saved, ids.numel(), length, stream, *seconds)
    if as_json:
        print(json.dumps({"text": stream.text, **summary}))
    else:
        _print_summary(summary, console)
    if interrupted:
        raise KeyboardInterrupt(f"interrupted after {stream.tokens:,} tokens")


class _TextStream:
    """Writes tokens as text as soon as they make up whole characters, and times the slides."""

    def __init__(self, tokenizer: Any, file: Any, console: Console) -> None:
        self._tokenizer, self._file = tokenizer, file
        self._notes, self._noted = console.file if console.is_terminal else None, False
        self._pending: list[int] = []
        self._token_at = self._slid_at = time.perf_counter()
        self.text, self.tokens, self.slide_seconds = "", 0, 0.0

    def _write(self, text: str) -> None:
        if self._file is not None:
            print(text, end="", flush=True, file=self._file)

    def echo(self, prompt: str) -> None:
        """Shows the end of the prompt, dim, where a person reads along."""
        if self._file is not None and self._file.isatty():
            tail = prompt if len(prompt) <= ECHO else "..." + prompt[-ECHO:]
            tail = "".join(c if c.isprintable() or c == "\n" else " " for c in tail)
            self._write(f"\x1b[2m{tail}\x1b[0m")

    def add(self, _sequence: int, token: int) -> None:
        self._note("")
        self.tokens += 1
        self._pending.append(token)
        self._flush(at_most=8)
        self._token_at = self._slid_at = time.perf_counter()

    def slide(self, share: float) -> None:
        """Takes the time of a slide; a long one shows its progress on a terminal."""
        now = time.perf_counter()
        self.slide_seconds += now - self._slid_at
        self._slid_at = now
        if now - self._token_at > LONG:
            self._note(f"[sliding: {share:.0%} of the context read again]")

    def _note(self, text: str) -> None:
        """Replaces the note on the line below the text; the cursor comes back."""
        if self._notes and (text or self._noted):
            note = f"\x1bD\x1b[A\x1b7\r\n\x1b[2K\x1b[2m{text}\x1b[0m\x1b8"
            self._noted = True  # Ctrl-C may come before the next line has run
            print(note, end="", flush=True, file=self._notes)
            self._noted = bool(text)

    def _flush(self, at_most: int) -> None:
        text = self._tokenizer.decode(self._pending, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(self._pending) < at_most:  # in the middle of a character
            return
        self._pending.clear()
        self.text += text
        self._write(text)

    def close(self) -> None:
        self._note("")
        self._flush(at_most=0)
        if self.tokens:
            self._write("\n")


def _read(engine: Any, ids: Any, state: Path | None, console: Console) -> float:
    """Reads a prompt, or a saved state and then a prompt; returns the seconds."""
    text = "reading [bold]{task.fields[read]:,}[/] of {task.fields[tokens]:,} tokens"
    columns = TextColumn(text), BarColumn(), TimeRemainingColumn()
    tokens, hidden = ids.numel(), not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=1.0, read=0, tokens=tokens)

        def show(share: float) -> None:
            progress.update(task, completed=share, read=int(share * tokens))

        began = time.perf_counter()
        if state is None:
            engine.prefill(ids, progress=show)
        else:
            with file_errors():
                engine.load_state(state)
            for i in range(tokens):
                engine.step(ids[:, i])
                show((i + 1) / tokens)
        return time.perf_counter() - began


def _summary(
    engine: Any,
    before: Any,
    saved: int,
    prompt: int,
    length: int,
    stream: _TextStream,
    prefill: float,
    decode: float,
) -> dict[str, Any]:
    config, stats, new = engine.config, engine.stats, stream.tokens
    # Both caches are counted as allocated, for as many tokens as this run may hold.
    row = 2 * engine.dtype.itemsize * config.kv_heads * config.head_dim * config.num_layers
    return {
        "loaded_tokens": saved,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": prompt / prefill,
        "decode_seconds": decode,
        "decode_tokens_per_second": new / decode,
        "slide_seconds": stream.slide_seconds,
        "hits": stats.hits - before.hits,  # of the generated tokens
        "slides": stats.slides - before.slides,
        "cache_bytes": stats.cache_bytes,
        "standard_transformer_cache_bytes": row * length,
    }


def _print_summary(s: dict[str, Any], console: Console) -> None:
    between, sliding = "", ""
    if s["slide_seconds"]:
        speed = s["new_tokens"] / max(s["decode_seconds"] - s["slide_seconds"], 1e-9)
        between = f" ({format_rate(speed)} between slides)"
        sliding = f", {s['slide_seconds']:.2f} s in all"
    ratio = s["standard_transformer_cache_bytes"] / s["cache_bytes"]
    read = f"{s['prompt_tokens']:,}"
    rate = f", {format_rate(s['prefill_tokens_per_second'])} tokens/s"
    if s["loaded_tokens"]:  # the time is mostly the file's: no rate
        read = f"{s['loaded_tokens']:,} saved" + (f" and {read}" if s["prompt_tokens"] else "")
        rate = ""
    lines = {
        "prompt": f"{read} tokens in {s['prefill_seconds']:.2f} s{rate}",
        "generated": f"{s['new_tokens']:,} tokens in {s['decode_seconds']:.2f} s, "
        f"{format_rate(s['decode_tokens_per_second'])} tokens/s{between}",
        "cache": f"{s['hits']:,} hits, {s['slides']:,} slide{'s' * (s['slides'] != 1)}{sliding}",
        "memory": f"{format_bytes(s['cache_bytes'])} of keys and values; a Transformer's: "
        f"{format_bytes(s['standard_transformer_cache_bytes'])} ({ratio:.1f}x)",
    }
    if not s["new_tokens"]:
        del lines["generated"]
    console.print()
    for name, value in lines.items():
        console.print(f"  {name:<9}  {value}", markup=False, soft_wrap=True)
