"""TLinFormer's static cache in plain PyTorch: what the engine is measured against.

The same step and the same exact shortcuts as the engine's (block 0's history is appended, the
restore path is streamed in pieces), written the way a careful user of PyTorch would: preallocated
tensors, views, scaled_dot_product_attention, no copies. One sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tlinformer.layer import Layer, rotate
from tlinformer.model import TLinFormerForCausalLM


class StaticCacheModel:
    """Prefill and step of `model`, eager; `max_context` tokens."""

    def __init__(self, model: TLinFormerForCausalLM, max_context: int, piece: int = 1024) -> None:
        self.model, self.config, self.piece = model, model.config, piece
        c = model.config
        rows = {"history": max_context, "context": c.history_window_at(max_context)}
        rows["window"] = c.generation_window
        self.cache = {
            (name, b, i): torch.empty(
                2, 1, c.kv_heads, n, c.head_dim, dtype=model.embed_tokens.weight.dtype
            )
            for name, n in rows.items()
            for b in range(c.num_blocks)
            for i in range(c.block_depth)
            if (name == "history") <= (i == 0) and (name == "context") <= (i > 0)
        }
        self.length = 0
        self.tokens = torch.empty(max_context, dtype=torch.int64)
        pair = torch.arange(c.head_dim // 2, dtype=torch.float64)
        self.frequencies = c.rope_theta ** (-2 * pair / c.head_dim)

    def rope(self, begin: int, end: int) -> Tensor:
        angle = torch.outer(torch.arange(begin, end, dtype=torch.float64), self.frequencies)
        return torch.stack([angle.cos(), angle.sin()], -1)[None, :, None].float()

    def write(self, key: tuple[str, int, int], slot: int, k: Tensor, v: Tensor) -> None:
        rows = self.cache[key][:, :, :, slot : slot + k.size(1)]
        rows[0], rows[1] = k.transpose(1, 2), v.transpose(1, 2)

    def read(self, key: tuple[str, int, int], rows: int, q: Tensor, causal: bool = False) -> Tensor:
        k, v = self.cache[key][:, :, :, :rows]
        c = self.config
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k,
            v,
            is_causal=causal,
            enable_gqa=c.num_attention_heads != c.kv_heads,
        )
        return o.transpose(1, 2).flatten(2)

    def layer(self, b: int, i: int) -> Layer:
        return self.model.blocks[b].layers[i]

    def queries(self, layer: Layer, x: Tensor, rope: Tensor) -> Tensor:
        d, heads = x.size(-1), self.config.num_attention_heads
        q = F.linear(layer.attn_norm(x), layer.qkv_proj.weight[:d], layer.qkv_proj.bias[:d])
        return rotate(q.unflatten(-1, (heads, -1)), rope)

    def keys_values(self, layer: Layer, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        d, kv = x.size(-1), self.config.kv_heads
        kv_rows = F.linear(layer.attn_norm(x), layer.qkv_proj.weight[d:], layer.qkv_proj.bias[d:])
        k, v = kv_rows.unflatten(-1, (2 * kv, -1)).split(kv, 2)
        return rotate(k, rope), v

    def slide(self, known: int, history: int) -> None:
        """Compresses tokens 0 ... history-1; block 0 has cached the first `known` already."""
        c, embed = self.config, self.model.embed_tokens
        assert c.num_blocks == 2, "the peer covers the paper's two blocks"
        self.write_history(0, known, history, lambda a, b: embed(self.tokens[None, a:b]))
        start = max(0, history - c.history_window_at(history))
        z = self.compress(0, embed(self.tokens[None, start:history]), start, history)
        kept = []

        def restored(begin: int, end: int) -> Tensor:
            a = embed(self.tokens[None, begin:end])
            q = self.queries(self.layer(0, 0), a, self.rope(begin, end))
            last = c.block_depth - 1
            a = self.layer(0, last).finish(a, self.read(("context", 0, last), z.size(1), q))
            kept.append(a[:, max(0, start - begin) :])
            return a

        self.write_history(1, 0, history, restored)
        self.compress(1, torch.cat(kept, 1), start, history)

    def write_history(self, b: int, begin: int, end: int, rows) -> None:  # type: ignore[no-untyped-def]
        for first in range(begin, end, self.piece):
            last = min(end, first + self.piece)
            k, v = self.keys_values(self.layer(b, 0), rows(first, last), self.rope(first, last))
            self.write(("history", b, 0), first, k, v)

    def compress(self, b: int, z: Tensor, start: int, history: int) -> Tensor:
        rope, depth = self.rope(start, history), self.config.block_depth
        q = self.queries(self.layer(b, 0), z, rope)
        z = self.layer(b, 0).finish(z, self.read(("history", b, 0), history, q))
        for i in range(1, depth - 1):
            q, k, v = self.layer(b, i).project(z, rope)
            self.write(("context", b, i), 0, k, v)
            z = self.layer(b, i).finish(z, self.read(("context", b, i), z.size(1), q))
        self.write(
            ("context", b, depth - 1), 0, *self.keys_values(self.layer(b, depth - 1), z, rope)
        )
        return z

    def window(self, begin: int) -> Tensor:
        """Tokens begin ... length-1 through every layer: the logits (V) after the last."""
        c = self.config
        history = c.generation_window * ((self.length - 1) // c.generation_window)
        z_rows = min(history, c.history_window_at(history)) if history else 0
        x = self.model.embed_tokens(self.tokens[None, begin : self.length])
        rope = self.rope(begin, self.length)
        for b in range(c.num_blocks):
            for i in range(c.block_depth):
                q, k, v = self.layer(b, i).project(x, rope)
                self.write(("window", b, i), begin - history, k, v)
                if (b, i) == (0, 0):
                    self.write(("history", 0, 0), begin, k, v)
                o = self.read(("window", b, i), self.length - history, q, causal=x.size(1) > 1)
                if history:
                    key, n = (("context", b, i), z_rows) if i else (("history", b, 0), history)
                    o = o + self.read(key, n, q)
                x = self.layer(b, i).finish(x, o)
        return F.linear(self.model.norm(x[0, -1]), self.model.embed_tokens.weight)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Prompt (L) -> logits (V)."""
        self.length = len(ids)
        self.tokens[: self.length] = ids
        history = self.config.generation_window * (
            (self.length - 1) // self.config.generation_window
        )
        if history:
            self.slide(0, history)
        return self.window(history)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """One more token (scalar) -> logits (V)."""
        if self.length % self.config.generation_window == 0:
            self.slide(self.length, self.length)
        self.tokens[self.length] = token
        self.length += 1
        return self.window(self.length - 1)
