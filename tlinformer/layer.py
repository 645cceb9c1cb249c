"""One layer as three verbs, `project`, `attend`, `finish` (paper §3.1).

Everything here works on rows along dimension 1, whichever window or history they belong to; only
`attend` is told where each window's rows lie.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .config import TLinFormerConfig

Ranges = list[tuple[int, int]]  # rows start ... stop-1 of one tensor, one entry a window


def side_by_side(lengths: Iterable[int], offset: int = 0) -> Ranges:
    """Consecutive ranges of these lengths."""
    ends = itertools.accumulate(lengths, initial=offset)
    return list(itertools.pairwise(ends))


def gather(x: Tensor, ranges: Ranges) -> Tensor:
    """The rows of `ranges` along dimension 1, one range after the other; a view if contiguous."""
    merged: Ranges = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    pieces = [x[:, start:stop] for start, stop in merged] or [x[:, :0]]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def rope_table(config: TLinFormerConfig, length: int, like: Tensor) -> Tensor:
    """(1, length, 1, d/2, 2): cosine and sine, in at least float32, on the device of `like`.

    The angles are formed in float64: float32 would lose a whole turn by a million tokens.
    """
    position = torch.arange(length, dtype=torch.float64, device=like.device)
    pair = torch.arange(config.head_dim // 2, dtype=torch.float64, device=like.device)
    angle = torch.outer(position, config.rope_theta ** (-2 * pair / config.head_dim))
    table = torch.stack([angle.cos(), angle.sin()], -1)[None, :, None]
    return table.to(torch.promote_types(like.dtype, torch.float32))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE on interleaved pairs: x (B, rows, heads, d) with the rope rows (1, rows, 1, d/2, 2)."""
    (cos, sin), (even, odd) = rope.unbind(-1), x.to(rope.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).to(x.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rows: Ranges,
    window_rows: Ranges,
    context_rows: Ranges,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every window apart, by PyTorch's kernels.

    Rows `q_rows[i]` of q look causally at rows `window_rows[i]` of k and v and, with a softmax of
    their own, at all of `context_rows[i]`; the two terms are added, and an empty range has none.
    Neighbouring windows of equal shape share one call.

    Args:
        q: (B, rows, Hq, d), rotated. k: (B, rows', Hkv, d), rotated. v: like k.

    Returns:
        (B, sum of the lengths of q_rows, Hq * d)
    """
    batch = q.size(0)
    runs: list[tuple[int, list[tuple[int, int]]]] = []  # windows; the first's rows and their number
    for ranges in zip(q_rows, window_rows, context_rows, strict=True):
        rows = [(start, stop - start) for start, stop in ranges]
        count, first = runs[-1] if runs else (0, rows)
        if count and all(
            size == n and (n == 0 or start == begin + count * n)
            for (start, size), (begin, n) in zip(rows, first, strict=True)
        ):
            runs[-1] = (count + 1, first)
        else:
            runs.append((1, rows))

    out = []
    for count, (of_q, *of_keys) in runs:

        def heads(x: Tensor, rows: tuple[int, int], count: int = count) -> Tensor:
            start, size = rows
            windows = x[:, start : start + count * size]
            return windows.reshape(batch * count, size, *x.shape[2:]).transpose(1, 2)

        terms = [
            F.scaled_dot_product_attention(
                heads(q, of_q),
                heads(k, rows),
                heads(v, rows),
                is_causal=causal,
                dropout_p=dropout,
                enable_gqa=q.size(2) != k.size(2),
            )
            for causal, rows in zip((True, False), of_keys, strict=True)
            if of_q[1] and rows[1]
        ]
        if terms:
            o = sum(terms[1:], terms[0]).transpose(1, 2)
        else:
            o = q.new_zeros(batch, count * of_q[1], *q.shape[2:])
        out.append(o.reshape(batch, count * of_q[1], q.size(2) * q.size(3)))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def recomputable(verb: Callable[..., Any]) -> Callable[..., Any]:
    """With `gradient_checkpointing`, the backward pass recomputes this verb instead of storing."""

    @functools.wraps(verb)
    def wrapper(self: Layer, *args: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(verb, self, *args, use_reentrant=False)
        return verb(self, *args)

    return wrapper


class Layer(nn.Module):
    """One pre-norm layer; its row-wise verbs serve windows and histories alike."""

    gradient_checkpointing = False

    def __init__(self, config: TLinFormerConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.attn_norm = nn.LayerNorm(d, eps)
        self.qkv_proj = nn.Linear(d, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out_proj = nn.Linear(d, d)
        self.mlp_norm = nn.LayerNorm(d, eps)
        self.gate_proj = nn.Linear(d, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(d, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, d, bias=False)

    @recomputable
    def project(
        self, x: Tensor, rope: Tensor, q_rows: Ranges | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, rows, D) -> q (B, rows, Hq, d), k and v (B, rows, Hkv, d); q and k rotated.

        With `q_rows`, q has those rows only, one range after the other.
        """
        # Split first, unfold heads second: in the other order torch.compile (seen with 2.11 on
        # CUDA) reads the gradient of the product out of bounds.
        h, d = self.attn_norm(x), self.head_dim
        q_size, kv_size = self.heads * d, self.kv_heads * d
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        if q_rows is None:
            q_rope = rope
            q, k, v = F.linear(h, weight, bias).split([q_size, kv_size, kv_size], -1)
        else:
            q_rope = gather(rope, q_rows)
            q = F.linear(gather(h, q_rows), weight[:q_size], bias[:q_size])
            k, v = F.linear(h, weight[q_size:], bias[q_size:]).split(kv_size, -1)
        q, k, v = (t.unflatten(-1, (-1, d)) for t in (q, k, v))
        return rotate(q, q_rope), rotate(k, rope), v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_rows: Ranges,
        window_rows: Ranges | None = None,
        context_rows: Ranges | None = None,
    ) -> Tensor:
        """`attend`, with dropout on the probabilities while training; None: empty ranges.

        On CUDA in 16 bits all windows are one launch, where there is a kernel for the head size.
        """
        window_rows = window_rows or [(0, 0)] * len(q_rows)
        context_rows = context_rows or [(0, 0)] * len(q_rows)
        dropout = self.dropout if self.training else 0.0
        if not ops.takes_ranges(q, len(q_rows)):
            return attend(q, k, v, q_rows, window_rows, context_rows, dropout)
        segments = [
            (q0, q1 - q0, w0 if w1 > w0 else -1, c0, c1 - c0)
            for (q0, q1), (w0, w1), (c0, c1) in zip(q_rows, window_rows, context_rows, strict=True)
        ]
        return ops.ranged_attention(q, k, v, segments, dropout=dropout).flatten(2)

    @recomputable
    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        """Residual x and attention output o, both (B, rows, D) -> (B, rows, D)."""
        y = x + self.out_proj(o)
        h = self.mlp_norm(y)
        mlp = self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return y + F.dropout(mlp, self.dropout, self.training)
