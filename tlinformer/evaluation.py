"""Perplexity on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


@torch.no_grad()
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
    if len(tokens) < 2 or sequence_length < 1 or batch_size < 1:
        raise ValueError(
            f"cannot score {len(tokens)} tokens in chunks of {sequence_length}, {batch_size} at "
            "once; need at least 2 tokens, chunks and batches of at least 1"
        )
    vocab_size = model.config.vocab_size
    if (largest := int(np.max(tokens))) >= vocab_size:
        raise ValueError(f"token {largest} is outside the model's vocabulary of {vocab_size}")
    device = next(model.parameters()).device
    scored = len(tokens) - 1
    whole = scored // sequence_length
    was_training = model.training
    model.eval()
    done = []
    try:
        # Groups of whole chunks, then the shorter rest as a batch of one.
        spans = [
            (first * sequence_length, min(batch_size, whole - first), sequence_length)
            for first in range(0, whole, batch_size)
        ]
        if rest := scored % sequence_length:
            spans.append((whole * sequence_length, 1, rest))
        for start, rows, length in spans:
            flat = np.asarray(tokens[start : start + rows * length + 1], dtype=np.int64)
            ids = torch.from_numpy(flat).to(device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(ids[:-1].view(rows, length))
            # One row at a time: a float32 copy of all logits would be the largest allocation.
            losses = [
                F.cross_entropy(row.float(), target, reduction="none")
                for row, target in zip(logits, ids[1:].view(rows, length), strict=True)
            ]
            done.append(torch.cat(losses).cpu())
            if on_progress:
                on_progress(rows * length)
    finally:
        model.train(was_training)
    return torch.cat(done).numpy()


def evaluate(
    model: Any,
    tokens: np.ndarray,
    sequence_length: int,
    *,
    batch_size: int = 16,
    byte_lengths: np.ndarray | None = None,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Scores every token but the first exactly once.

    The tokens are cut into consecutive chunks of ``sequence_length`` targets (the last one may be
    shorter). A target sees the tokens of its own chunk before it, 1 … ``sequence_length`` of them,
    and nothing of the chunk before: longer chunks give more context. No dropout; the model's mode
    is restored afterwards and no random number is drawn.

    Args:
        model: maps (B, L) int64 to logits (B, L, V); its ``config`` has ``vocab_size``.
        tokens: (N,) integers, N ≥ 2.
        byte_lengths: (V,) bytes of text a token stands for, see ``data.token_byte_lengths``.
        dtype: autocast type of the forward pass; None computes in the parameters' own type.
        on_progress: called with the number of tokens scored since the last call.

    Returns:
        loss (mean nats a token), perplexity, bits_per_byte (None without ``byte_lengths``),
        tokens (scored), bytes (of the scored tokens, or None), sequence_length.

    Raises:
        ValueError: fewer than two tokens, or a token outside the vocabulary.
    """
    losses = token_losses(
        model, tokens, sequence_length, batch_size=batch_size, dtype=dtype, on_progress=on_progress
    )
    scored, total = len(losses), math.fsum(losses)
    loss = total / scored
    text_bytes = None if byte_lengths is None else int(byte_lengths[tokens[1:]].sum())
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / text_bytes if text_bytes else None,
        "tokens": scored,
        "bytes": text_bytes,
        "sequence_length": sequence_length,
    }
