"""Signs that a model or its use forfeits what TLinFormer promises (paper), and what to change.

Four things go wrong in practice: nearly every token recomputes the history, so that there is no
speed-up; the memory does not suffice; the compressed history is too small for the text, which
holds the perplexity up; the generation window is too long for the model, so that what it knows
goes stale towards the window's end.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from .config import TLinFormerConfig
from .engine import Engine, engine_dtype
from .evaluation import token_losses
from .model import TLinFormerForCausalLM
from .plan import device_type, fit_device, weights_bytes
from .terminal import format_bytes

TIGHT = 0.9  # of the memory
FEW_HITS = 4  # for each reading of the history, with which that still costs much
SURE = 3.0  # standard errors, below which a difference is luck
SOME_NATS, MANY_NATS = 0.01, 0.05  # 1% and 5% of perplexity
FEW_WINDOWS = 6  # make no standard error


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: "reuse", "memory", "history window" or "generation window".
        status: "ok", "warning", "problem", or "skipped" where it could not look.
        evidence: what was seen, with its figures.
        advice: what to change; empty if nothing.
        figures: the numbers of the evidence by name: counts, bytes, tokens or nats.
    """

    name: str
    status: str
    evidence: str
    advice: str = ""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


def check_reuse(engine: Engine) -> Check:
    """Do tokens reuse the cache? Looks at what an engine did so far (`Engine.stats`)."""
    stats, window = engine.stats, engine.config.generation_window
    lengths = stats.history_length
    sequences = max(1, len(lengths)) if isinstance(lengths, list) else 1
    reads = stats.prefills * sequences
    slides = max(stats.slides, reads)  # a short prompt has nothing to slide
    figures: dict[str, float] = {
        "hits": stats.hits,
        "slides": stats.slides,
        "prefills": stats.prefills,
    }
    evidence = ", ".join(
        f"{count:,} {name[:-1] if count == 1 else name}" for name, count in figures.items()
    )
    if slides <= 2 * sequences and stats.hits <= slides:
        return Check("reuse", "skipped", f"{evidence}: too few tokens to tell", "", figures)
    evidence += f": {stats.hits / slides:.1f} hits for each time the history was read"
    if stats.hits >= FEW_HITS * slides or slides <= 2 * sequences:
        return Check("reuse", "ok", evidence, "", figures)
    if 2 * reads > slides:
        # More may be short answers to many prompts.
        status = "problem" if stats.hits < 2 * slides else "ok"
        advice = (
            "prefill a text once, then append its tokens with step or generate; prompts with a "
            "common beginning can share its state (save_state, load_state)"
        )
        return Check("reuse", status, evidence, advice if status == "problem" else "", figures)
    status = "problem" if stats.hits <= slides else "warning"
    advice = (
        f"generation_window is {window}, so one token in {window} recomputes the history: train "
        "with a larger one, such as 256"
    )
    return Check("reuse", status, evidence, advice, figures)


def check_memory(
    config: TLinFormerConfig,
    *,
    max_context: int,
    batch_size: int = 1,
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    new_weights: int | None = None,
) -> Check:
    """Does an engine fit its device? Nothing is allocated. Arguments of `plan.fit_device`."""
    fit = fit_device(
        config,
        max_context=max_context,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        new_weights=new_weights,
    )
    needed, available = format_bytes(fit.needed_bytes), format_bytes(fit.available_bytes)
    what = f"{max_context:,} tokens in {batch_size:,} sequence" + "s" * (batch_size > 1)
    figures: dict[str, float] = {"needed_bytes": fit.needed_bytes}
    if fit.longest_context is None:
        evidence = f"{what} need {needed}; {device} does not say what it has"
        return Check("memory", "skipped", evidence, "", figures)
    figures |= {"available_bytes": fit.available_bytes, "longest_context": fit.longest_context}
    evidence = f"{what} need {needed} of {available} available on {device}"
    if fit.needed_bytes <= TIGHT * fit.available_bytes:
        return Check("memory", "ok", evidence, "", figures)
    if not fit.longest_context:
        advice = "not even one token fits: a smaller batch, a smaller model or another device"
    else:
        advice = f"at most {fit.longest_context:,} tokens fit; or a smaller batch"
    advice += " or bfloat16" * ("32" in str(dtype))
    return Check("memory", "problem" if fit.refusal else "warning", evidence, advice, figures)


def with_windows(model: TLinFormerForCausalLM, **changes: Any) -> TLinFormerForCausalLM:
    """The same weights, not copied, with other windows: no parameter depends on those."""
    with torch.device("meta"):
        other = TLinFormerForCausalLM(dataclasses.replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def _difference(windows: np.ndarray) -> tuple[float, float]:
    """Mean of (n) differences, and its standard error."""
    return float(windows.mean()), float(windows.std(ddof=1) / math.sqrt(len(windows)))


def _change(nats: float, error: float, windows: int) -> str:
    word = "higher" if nats > 0 else "lower"
    return f"{abs(nats):.3f} ± {error:.3f} {word} ({windows:,} windows)"


def _grade(rise: float, error: float) -> str:
    """How bad nats are that should not be there."""
    if rise < SOME_NATS or rise < SURE * error:
        return "ok"
    return "problem" if rise >= MANY_NATS else "warning"


def _losses(model: TLinFormerForCausalLM, tokens: np.ndarray, length: int) -> np.ndarray:
    """Nats (chunks, windows, Wog) of chunks of `length`, whole windows."""
    window = model.config.generation_window
    whole = (len(tokens) - 1) // length * length
    dtype = torch.bfloat16 if next(model.parameters()).is_cuda else None
    few = max(1, 8192 // length)  # chunks at once
    flat = token_losses(model, tokens[: whole + 1], length, batch_size=few, dtype=dtype)
    return flat.reshape(-1, length // window, window)


def check_windows(
    model: TLinFormerForCausalLM, tokens: np.ndarray, max_context: int
) -> tuple[Check, Check]:
    """Do the two windows suit the model and the text? Scores the tokens, with longer histories too.

    Args:
        tokens: (N) ids of text like that which the model is for.
        max_context: tokens that a sequence may hold; chunks to be scored are no longer.
    """
    config = model.config
    window = config.generation_window
    compressed = config.history_window_at(max_context)
    wanted = (math.ceil(4 * compressed / window) + 2) * window
    length = min(wanted, max_context // window * window, (len(tokens) - 1) // window * window)
    if length < 2 * window:
        why = f"{len(tokens):,} tokens of text and {max_context:,} of context make no two windows "
        skipped = f"{why}of {window:,}: give a longer text (--text) or context"
        return Check("history window", "skipped", skipped), Check(
            "generation window", "skipped", skipped
        )
    losses = _losses(model, tokens, length)
    seen = losses[:, 1:]  # the first windows of chunks have no history
    return (
        _check_history(model, tokens, losses, compressed, length),
        _check_generation(seen.reshape(-1, window)),
    )


def _check_history(
    model: TLinFormerForCausalLM, tokens: np.ndarray, losses: np.ndarray, rows: int, length: int
) -> Check:
    """Would more rows of compressed history lower the loss (chunks, windows, Wog)?"""
    name, config = "history window", model.config
    first = math.ceil((rows + 1) / config.generation_window)  # window that a larger one changes
    base = losses[:, first:].mean(2).ravel()
    if len(base) < FEW_WINDOWS:
        evidence = f"{len(base)} windows of text have more history than {rows:,} tokens, too few"
        return Check(name, "skipped", f"{evidence}: give a longer text or context")
    trials = []
    for factor in (2, 4):
        if rows * factor // 2 >= length:
            break
        coefficient = config.history_window_coefficient * factor
        changes: dict[str, Any] = {"history_window_coefficient": coefficient}
        if config.history_window != "auto":
            changes = {"history_window": rows * factor}
        other = _losses(with_windows(model, **changes), tokens, length)[:, first:].mean(2)
        trials.append((*_difference(base - other.ravel()), rows * factor))
    gain, error, larger = max(trials)
    loss = float(base.mean())
    figures = {"rows": rows, "loss": loss, "larger_rows": larger, "larger_loss": loss - gain}
    evidence = (
        f"loss {loss:.3f} with {rows:,} rows of compressed history, {loss - gain:.3f} with "
        f"{larger:,}: {_change(-gain, error, len(base))}"
    )
    status = _grade(gain, error)
    advice = (
        f"set history_window to {larger} (weights do not depend on it), best before training on"
    )
    return Check(name, status, evidence, "" if status == "ok" else advice, figures)


def _check_generation(losses: np.ndarray) -> Check:
    """Does the loss (windows, Wog) rise towards the end of the window?"""
    name = "generation window"
    count, window = losses.shape
    quarter = window // 4
    if quarter == 0 or count < FEW_WINDOWS:
        evidence = f"{count} windows of {window} tokens have a history: too few to compare"
        return Check(name, "skipped", evidence)
    first, last = losses[:, :quarter].mean(1), losses[:, -quarter:].mean(1)
    rise, error = _difference(last - first)
    figures = {"first_quarter_loss": float(first.mean()), "last_quarter_loss": float(last.mean())}
    evidence = (
        f"loss {first.mean():.3f} in the first quarter of the window, {last.mean():.3f} in the "
        f"last: {_change(rise, error, count)}"
    )
    status = _grade(rise, error)
    advice = f"the history is stale there: set generation_window to {window // 2} or less"
    return Check(name, status, evidence, "" if status == "ok" else advice, figures)


def run_engine(model: TLinFormerForCausalLM, *, dtype: torch.dtype | str | None = None) -> Engine:
    """An engine that has read a little and generated a little, for `check_reuse` to look at."""
    window = model.config.generation_window
    count = min(2 * window, 64)
    engine = Engine(model, max_context=window + 1 + count, dtype=dtype)
    engine.prefill(torch.zeros(1, window + 1, dtype=torch.int64))
    engine.generate(count)
    return engine


def examine(
    model: TLinFormerForCausalLM,
    *,
    max_context: int = 4096,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    tokens: np.ndarray | None = None,
    engine: Engine | None = None,
) -> list[Check]:
    """Looks for every sign, on the device that the model is on.

    Args:
        model: with its weights.
        max_context: tokens that a sequence is to hold.
        batch_size: sequences wanted.
        dtype: of the engine, as `Engine` takes it.
        tokens: (N) ids of held-out text, some thousands; without them two checks are skipped.
        engine: one that was used as it is going to be: its statistics are looked at. By default
            one generates a few tokens.

    Returns:
        Four checks: reuse, memory, history window, generation window.

    Raises:
        ValueError, RuntimeError: as `Engine` and `evaluation.evaluate`.
    """
    weight = next(model.parameters())
    name = engine_dtype(weight.dtype, dtype, device_type(weight.device))
    here = weight.dtype == getattr(torch, name)
    memory = check_memory(
        model.config,
        max_context=max_context,
        batch_size=batch_size,
        dtype=name,
        device=weight.device,
        new_weights=0 if here or engine else weights_bytes(model.config, name),
    )
    reuse = check_reuse(engine or run_engine(model, dtype=name))
    if tokens is None:
        missing = "no text was given to score: --text FILE"
        windows = tuple(
            Check(f"{what} window", "skipped", missing) for what in ("history", "generation")
        )
        return [reuse, memory, *windows]
    return [reuse, memory, *check_windows(model, np.asarray(tokens), max_context)]
