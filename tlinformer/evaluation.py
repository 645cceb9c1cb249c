"""Perplexity on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


@torch.no_grad()
def _score(
    model: Any,
    tokens: np.ndarray,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None,
    dtype: torch.dtype | None,
    on_progress: Callable[[int], None] | None,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Chunks as rows of tokens (B, L + 1), and the nats of all but their first (B, L)."""
    if len(tokens) < 2 or sequence_length < 1 or batch_size < 1:
        raise ValueError(
            f"cannot score {len(tokens)} tokens in chunks of {sequence_length}, {batch_size} at "
            "once; need at least 2 tokens, chunks and batches of at least 1"
        )
    vocab_size = model.config.vocab_size
    if (largest := int(np.max(tokens))) >= vocab_size:
        raise ValueError(f"token {largest} is outside the model's vocabulary of {vocab_size}")
    device = next(model.parameters()).device
    starts = np.arange(0, len(tokens) - 1, sequence_length)
    if max_tokens is not None and (keep := math.ceil(max_tokens / sequence_length)) < len(starts):
        starts = starts[np.arange(keep) * len(starts) // keep]
    whole = [start for start in starts if start + sequence_length < len(tokens)]
    # The shorter rest is a batch of its own.
    groups = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    groups += [[start] for start in starts[len(whole) :]]
    was_training = model.training
    model.eval()
    try:
        for group in groups:
            rows = np.stack([tokens[start : start + sequence_length + 1] for start in group])
            ids = torch.from_numpy(rows.astype(np.int64)).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(ids[:, :-1])
            # One row at a time: a float32 copy of all logits would be the largest allocation.
            losses = [
                F.cross_entropy(row.float(), target, reduction="none")
                for row, target in zip(logits, ids[:, 1:], strict=True)
            ]
            yield rows, torch.stack(losses)
            if on_progress:
                on_progress(rows[:, 1:].size)
    finally:
        model.train(was_training)


def token_losses(
    model: Any,
    tokens: np.ndarray,
    sequence_length: int,
    *,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Nats of every token but the first, float32 (N - 1,); arguments and errors of `evaluate`."""
    scored = _score(model, tokens, sequence_length, batch_size, None, dtype, on_progress)
    return torch.cat([losses.flatten().cpu() for _, losses in scored]).numpy()


def evaluate(
    model: Any,
    tokens: np.ndarray,
    sequence_length: int,
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    byte_lengths: np.ndarray | None = None,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Scores every token but the first exactly once, or with ``max_tokens`` a part of them.

    The tokens are cut into consecutive chunks of ``sequence_length`` targets (the last one may be
    shorter). A target sees the tokens of its own chunk before it, 1 … ``sequence_length`` of them,
    and nothing of the chunk before: longer chunks give more context. No dropout; the model's mode
    is restored afterwards and no random number is drawn.

    Args:
        model: maps (B, L) int64 to logits (B, L, V); its ``config`` has ``vocab_size``.
        tokens: (N,) integers, N ≥ 2.
        max_tokens: score only so many, rounded up to whole chunks at even distances.
        byte_lengths: (V,) bytes of text a token stands for, see ``data.token_byte_lengths``.
        dtype: autocast type of the forward pass; None computes in the parameters' own type.
        on_progress: called with the number of tokens scored since the last call.

    Returns:
        loss (mean nats a token), perplexity, bits_per_byte (None without ``byte_lengths``),
        tokens (scored), bytes (of the scored tokens, or None), sequence_length.

    Raises:
        ValueError: fewer than two tokens, or a token outside the vocabulary.
    """
    total, scored, text_bytes = 0.0, 0, 0
    chunks = _score(model, tokens, sequence_length, batch_size, max_tokens, dtype, on_progress)
    for rows, losses in chunks:
        total += math.fsum(losses.sum(1).tolist())
        scored += rows[:, 1:].size
        if byte_lengths is not None:
            text_bytes += int(byte_lengths[rows[:, 1:]].sum())
    loss = total / scored
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / text_bytes if text_bytes else None,
        "tokens": scored,
        "bytes": None if byte_lengths is None else text_bytes,
        "sequence_length": sequence_length,
    }
