"""TLinFormer's static cache in plain PyTorch: the engine's own algorithm without its kernels.

The same step and the same exact shortcuts as the engine's: block 0's history is appended, the
other blocks' is streamed in pieces, what nobody reads is not computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peers import EnginePeer
from static import Static, angles
from torch import Tensor

from tlinformer import TLinFormerConfig
from tlinformer.layer import Layer, rotate


class StaticTLinFormer(Static):
    """TLinFormer in PyTorch; caches are called (kind, block, layer)."""

    label = "TLinFormer in PyTorch"
    slides = True
    make = EnginePeer.make
    prefill_flops = EnginePeer.prefill_flops

    def __init__(self, model: Any, max_context: int, batch: int) -> None:
        super().__init__(model, max_context, batch)
        c = self.config
        self.ids = torch.zeros(batch, max_context, dtype=torch.int64, device=self.device)
        # The history's activations between two blocks; a table of two blocks needs none.
        self.stream = torch.empty(0)
        if c.num_blocks > 2:
            shape = (batch, max_context, c.hidden_size)
            self.stream = torch.empty(shape, dtype=self.dtype, device=self.device)

    @classmethod
    def regions(cls, config: TLinFormerConfig, context: int) -> dict[Any, int]:
        c, rows = config, {}
        z, window = c.history_window_at(context), c.generation_window
        for b in range(c.num_blocks):
            rows["history", b, 0] = context
            for i in range(c.block_depth):
                rows["window", b, i] = window
                if i:
                    rows["context", b, i] = z
        return rows

    @classmethod
    def token_bytes(cls, config: TLinFormerConfig, history: int, batch: int, element: int) -> int:
        return EnginePeer.token_bytes(config, history, batch, element)

    def layer(self, b: int, i: int) -> Layer:
        return self.layers[b * self.config.block_depth + i]

    def read(self, q: Tensor, name: Any, rows: int, causal: bool = False) -> Tensor:
        k, v = self.cache[name][:, :, :, :rows]
        return self.attend(q, k, v, causal)

    @property
    def history(self) -> int:
        """Tokens before the window of the last token."""
        window = self.config.generation_window
        return window * ((self.length - 1) // window)

    def slide(self, known: int) -> None:
        """Compresses the history, of which block 0 has cached the first `known` rows already."""
        c, history = self.config, self.history
        start = max(0, history - c.history_window_at(history))
        a = self.model.embed_tokens(self.ids[:, start:history])
        for first, last in self.pieces(known, history):
            rows = self.model.embed_tokens(self.ids[:, first:last])
            self.project(self.layer(0, 0), rows, self.rope(first, last), ("history", 0, 0), first)
        z = self.compress(0, a, start)
        for b in range(1, c.num_blocks):
            a = self.restore(b, z.size(1), start)
            z = self.compress(b, a, start)

    def restore(self, b: int, z_rows: int, start: int) -> Tensor:
        """Streams the history out of block b-1 into block b; its rows from `start` on."""
        last_layer, kept = self.config.block_depth - 1, []
        for first, last in self.pieces(0, self.history):
            rope = self.rope(first, last)
            if b == 1:
                a = self.model.embed_tokens(self.ids[:, first:last])
            else:
                a = self.stream[:, first:last]
            q = self.queries(self.layer(b - 1, 0), a, rope)
            o = self.read(q, ("context", b - 1, last_layer), z_rows)
            a = self.finish(self.layer(b - 1, last_layer), a, o)
            self.project(self.layer(b, 0), a, rope, ("history", b, 0), first)
            if b + 1 < self.config.num_blocks:
                self.stream[:, first:last] = a
            kept.append(a[:, max(0, start - first) :])
        return torch.cat(kept, 1)

    def queries(self, layer: Layer, x: Tensor, rope: Tensor) -> Tensor:
        return self.verb(queries, layer, x, rope)

    def compress(self, b: int, z: Tensor, start: int) -> Tensor:
        rope, depth = self.rope(start, self.history), self.config.block_depth
        q = self.queries(self.layer(b, 0), z, rope)
        z = self.finish(self.layer(b, 0), z, self.read(q, ("history", b, 0), self.history))
        for i in range(1, depth):
            q = self.project(self.layer(b, i), z, rope, ("context", b, i), 0)
            if i + 1 < depth:
                z = self.finish(self.layer(b, i), z, self.read(q, ("context", b, i), z.size(1)))
        return z

    def window(self, x: Tensor, rope: Tensor, begin: int) -> Tensor:
        """Rows of tokens begin ... length-1 (B, rows, D) through every layer -> logits (B, V)."""
        c, history = self.config, self.history
        z_rows = min(history, c.history_window_at(history)) if history else 0
        for b in range(c.num_blocks):
            for i in range(c.block_depth):
                layer = self.layer(b, i)
                q = self.project(layer, x, rope, ("window", b, i), begin - history)
                if b == i == 0:  # at the next slide they are history
                    rows = slice(begin - history, self.length - history)
                    to = self.cache["history", 0, 0][:, :, :, begin : self.length]
                    to.copy_(self.cache["window", 0, 0][:, :, :, rows])
                o = self.read(q, ("window", b, i), self.length - history, causal=x.size(1) > 1)
                if history:
                    kind, n = ("context", z_rows) if i else ("history", history)
                    o = o + self.read(q, (kind, b, i), n)
                x = self.finish(layer, x, o)
        return self.head(x)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        self.length = ids.size(1)
        self.ids[:, : self.length] = ids
        history = self.history
        if history:
            self.slide(0)
        x = self.model.embed_tokens(self.ids[:, history : self.length])
        return self.window(x, self.rope(history, self.length), history)

    def fill(self, length: int) -> None:
        super().fill(length)
        self.ids.random_(self.config.vocab_size)

    def forward(self) -> Tensor:
        x = self.model.embed_tokens(self.token)[:, None]
        rope = self.verb(angles, self.position, self.frequencies)
        self.length += 1
        try:
            logits = self.window(x, rope, self.length - 1)
        finally:
            self.length -= 1
        self.position.add_(1)
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        self.ids[:, self.length] = tokens
        if self.length and self.length % self.config.generation_window == 0:
            self.length += 1
            self.slide(self.length - 1)
            self.length -= 1
        return super().step(tokens)


def queries(layer: Layer, x: Tensor, rope: Tensor) -> Tensor:
    """Rotated queries (B, Hq, rows, padded d) alone."""
    d = x.size(-1)
    q = F.linear(layer.attn_norm(x), layer.qkv_proj.weight[:d], layer.qkv_proj.bias[:d])
    q = rotate(q.unflatten(-1, (layer.heads, layer.head_dim)), rope).transpose(1, 2)
    return F.pad(q, (0, -layer.head_dim % 8))
