"""Peers with preallocated caches in plain PyTorch, as a careful user writes them.

The rows of all caches are views of one tensor; row-wise work is compiled (on a GPU), a token is a
CUDA graph, and each attention takes the fastest of PyTorch's kernels for its shape. Heads are
padded to a multiple of 8, which spares the kernels a copy of the cache. A graph reads just the
rows that there are, without a mask: a user would need one mask or a graph for each length, so
these are lower bounds of a user's times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from attention import FastestAttention
from peers import Graphed
from sizes import row_bytes, weight_count
from torch import Tensor

from tlinformer import TLinFormerConfig
from tlinformer.layer import Layer

PIECE = 16384  # rows that pass through a layer at once


def project(layer: Layer, x: Tensor, rope: Tensor, arena: Tensor, slots: Tensor) -> Tensor:
    """Queries (B, Hq, rows, padded d); keys and values go to `slots` (2, B, Hkv, rows) of arena."""
    q, k, v = layer.project(x, rope)
    kv = torch.stack([k, v]).transpose(2, 3)
    arena[slots[..., None] + torch.arange(kv.size(-1), device=x.device)] = kv
    return F.pad(q.transpose(1, 2), (0, -q.size(-1) % 8))


def finish(layer: Layer, x: Tensor, o: Tensor) -> Tensor:
    """x (B, rows, D) and o (B, Hq, rows, padded d) -> (B, rows, D)."""
    return layer.finish(x, o[..., : layer.head_dim].transpose(1, 2).flatten(2))


def angles(position: Tensor, frequencies: Tensor) -> Tensor:
    """Positions (rows), float64 -> what `rotate` takes (1, rows, 1, d/2, 2)."""
    angle = position[:, None] * frequencies
    return torch.stack([angle.cos(), angle.sin()], -1)[None, :, None].float()


@cache
def compiled(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`verb` compiled for each number of rows, and for arenas of any size."""
    import torch._inductor.config as inductor

    inductor.assert_indirect_indexing = False
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(verb, fullgraph=True)


class Static(Graphed):
    """Arena, compiled verbs and the choice of kernels."""

    def __init__(self, model: Any, max_context: int, batch: int) -> None:
        super().__init__(model, max_context, batch)
        c = self.config
        self.padded, self.length = c.head_dim + -c.head_dim % 8, 0
        pair = torch.arange(c.head_dim // 2, dtype=torch.float64, device=self.device)
        self.frequencies = c.rope_theta ** (-2 * pair / c.head_dim)
        self.position = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.layers: list[Layer] = [layer for block in model.blocks for layer in block.layers]
        self.attention = FastestAttention(self.config.head_dim**-0.5, self.device)
        self.one_row: dict[tuple[Any, int], Tensor] = {}
        rows = self.regions(c, max_context)
        element = 2 * batch * c.kv_heads * self.padded
        self.arena = torch.zeros(sum(rows.values()) * element, dtype=self.dtype, device=self.device)
        torch._dynamo.maybe_mark_dynamic(self.arena, 0)
        self.cache, self.offset, begin = {}, {}, 0
        for name, count in rows.items():
            shape = (2, batch, c.kv_heads, count, self.padded)
            self.cache[name] = self.arena[begin : begin + count * element].view(shape)
            self.offset[name] = begin
            begin += count * element

    @classmethod
    def regions(cls, config: TLinFormerConfig, context: int) -> dict[Any, int]:
        """Rows of each cache."""
        raise NotImplementedError

    @classmethod
    def state_bytes(cls, config: TLinFormerConfig, context: int, batch: int, element: int) -> int:
        padded = config.head_dim + -config.head_dim % 8
        rows = sum(cls.regions(config, context).values())
        return batch * rows * row_bytes(config, element) * padded // config.head_dim

    @classmethod
    def token_bytes(cls, config: TLinFormerConfig, history: int, batch: int, element: int) -> int:
        rows = sum(cls.regions(config, history).values())
        return (weight_count(config) + batch * rows * row_bytes(config, 1)) * element

    def verb(self, verb: Callable[..., Any], *args: Any) -> Any:
        rows = 1 if verb is angles else args[1].size(1)
        # On the CPU compiling takes longer than what is measured; odd numbers of rows come once.
        if self.device.type == "cuda" and (rows == 1 or rows % 256 == 0):
            return compiled(verb)(*args)
        return verb(*args)

    def rope(self, begin: int, end: int) -> Tensor:
        return angles(
            torch.arange(begin, end, dtype=torch.float64, device=self.device), self.frequencies
        )

    def slots(self, name: Any, slot: int, rows: int) -> Tensor:
        """Where rows slot ... of a cache begin in the arena, (2, B, Hkv, rows)."""
        known = self.one_row.get((name, slot)) if rows == 1 else None
        if known is not None:
            return known
        view = self.cache[name][:, :, :, slot : slot + rows]
        index = torch.full((1,), self.offset[name] + slot * self.padded, device=self.device)
        for axis in range(4):
            step = torch.arange(view.size(axis), device=self.device) * view.stride(axis)
            index = index[..., None] + step
        index = index[0]
        if rows == 1:
            self.one_row[name, slot] = index
        return index

    def project(self, layer: Layer, x: Tensor, rope: Tensor, name: Any, slot: int) -> Tensor:
        slots = self.slots(name, slot, x.size(1))
        return self.verb(project, layer, x, rope, self.arena, slots)

    def pieces(self, begin: int, end: int, size: int = PIECE) -> Iterator[tuple[int, int]]:
        for first in range(begin, end, size):
            yield first, min(end, first + size)

    def finish(self, layer: Layer, x: Tensor, o: Tensor) -> Tensor:
        if x.size(1) <= PIECE:
            return self.verb(finish, layer, x, o)
        done = [
            self.verb(finish, layer, x[:, a:b], o[:, :, a:b]) for a, b in self.pieces(0, x.size(1))
        ]
        return torch.cat(done, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        """q (B, Hq, rows, d) with the keys and values (B, Hkv, rows', d)."""
        return self.attention(q, k, v, causal)

    def detail(self) -> dict[str, Any]:
        picked = {"attention": self.attention.names(), "compiled": self.device.type == "cuda"}
        return super().detail() | picked

    def head(self, x: Tensor) -> Tensor:
        return F.linear(self.model.norm(x[:, -1]), self.model.embed_tokens.weight)

    def fill(self, length: int) -> None:
        self.length = length
        for name in self.cache:
            self.cache[name][..., : self.config.head_dim].normal_()
        self.rewind()

    def rewind(self) -> None:
        self.position.fill_(self.length)
        self.token.zero_()

    def step(self, tokens: Tensor) -> Tensor:
        self.position.fill_(self.length)
        self.token.copy_(tokens)
        with torch.no_grad():
            logits = self.forward()
        self.length += 1
        return logits


class StaticTransformer(Static):
    """The standard Transformer."""

    label = "Transformer"

    @classmethod
    def regions(cls, config: TLinFormerConfig, context: int) -> dict[Any, int]:
        return dict.fromkeys(range(config.num_layers), context)

    def rows(self) -> tuple[int, int]:
        """Of the next token: its slot, and the rows that it reads, its own too."""
        return self.length, self.length + 1

    def forward(self) -> Tensor:
        slot, rows = self.rows()
        x = self.model.embed_tokens(self.token)[:, None]
        rope = self.verb(angles, self.position, self.frequencies)
        for i, layer in enumerate(self.layers):
            q = self.project(layer, x, rope, i, slot)
            k, v = self.cache[i][:, :, :, :rows]
            x = self.finish(layer, x, self.attend(q, k, v))
        self.position.add_(1)
        return self.head(x)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        self.length = ids.size(1)
        x = self.model.embed_tokens(ids.to(self.device))
        for i, layer in enumerate(self.layers):
            o = self.attend_all(i, layer, x)
            x = self.finish(layer, x, o)
        return self.head(x)

    def attend_all(self, i: int, layer: Layer, x: Tensor) -> Tensor:
        """Projects and attends for a whole prompt."""
        q = torch.cat(
            [
                self.project(layer, x[:, a:b], self.rope(a, b), i, a)
                for a, b in self.pieces(0, self.length)
            ],
            2,
        )
        k, v = self.cache[i][:, :, :, : self.length]
        return self.attend(q, k, v, causal=True)
