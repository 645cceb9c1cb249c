"""The Transformer whose layers see a window only, in a ring of that many rows."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from attention import FastestAttention, Way, flex
from sizes import transformer_flops
from static import PIECE, StaticTransformer
from torch import Tensor

from tlinformer import TLinFormerConfig
from tlinformer.layer import Layer, rope_table


class SlidingWindow(StaticTransformer):
    """The Transformer whose layers see the last rows only, as many as TLinFormer's two windows."""

    label = "sliding window"

    def __init__(self, model: Any, max_context: int, batch: int) -> None:
        super().__init__(model, max_context, batch)
        self.band = BandAttention(self.attention.scale, self.device, self.window(self.config))

    @classmethod
    def regions(cls, config: TLinFormerConfig, context: int) -> dict[Any, int]:
        return dict.fromkeys(range(config.num_layers), cls.window(config))

    @staticmethod
    def window(config: TLinFormerConfig) -> int:
        return config.history_window_at(0) + config.generation_window

    @classmethod
    def prefill_flops(cls, config: TLinFormerConfig, length: int) -> float:
        return transformer_flops(config, length, cls.window(config))

    @classmethod
    def reference(cls, model: Any, ids: Tensor) -> Tensor:
        length, window = ids.size(1), cls.window(model.config)
        row = torch.arange(length, device=ids.device)
        behind = row[:, None] - row
        return _masked(model, ids, (behind >= 0) & (behind < window))

    def rows(self) -> tuple[int, int]:
        window = self.window(self.config)
        return self.length % window, min(self.length + 1, window)

    def attend_all(self, i: int, layer: Layer, x: Tensor) -> Tensor:
        window = self.window(self.config)
        outputs, before = [], None
        for a, b in self.pieces(0, self.length, max(window, PIECE // window * window)):
            projected = self.verb(Layer.project, layer, x[:, a:b], self.rope(a, b))
            q, k, v = (F.pad(t.transpose(1, 2), (0, -t.size(-1) % 8)) for t in projected)
            if before is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
            outputs.append(self.band(q, k, v, before is None))
            before = k[:, :, -window:], v[:, :, -window:]
        last = min(window, self.length)
        slots = torch.arange(self.length - last, self.length, device=self.device) % window
        for which, rows in enumerate(before or ()):
            self.cache[i][which, :, :, slots] = rows[:, :, -last:]
        return torch.cat(outputs, 2)

    def detail(self) -> dict[str, Any]:
        return super().detail() | {"prompt_attention": self.band.names()}


class BandAttention(FastestAttention):
    """The fastest attention in which a row sees itself and the window - 1 rows before it.

    Keys and values begin a window of rows before the queries, or with them.
    """

    def __init__(self, scale: float, device: torch.device, window: int) -> None:
        super().__init__(scale, device)
        self.window = window

    def ways(self, rows: int, head_dim: int, causal: bool) -> dict[str, Way]:
        found: dict[str, Way] = {"blocks": partial(in_blocks, self.window, self.scale)}
        if self.device.type == "cuda":
            found["flex_attention"] = partial(flex_band, self.window, self.scale)
        return found


def in_blocks(window: int, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks of a window's rows look at themselves and at the block before them."""
    rows, blocks = q.size(2), -(-q.size(2) // window)
    before, behind = window - (k.size(2) - rows), blocks * window - rows

    def pairs(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, before, behind)).unflatten(2, (blocks + 1, window))
        x = torch.cat([x[:, :, :-1], x[:, :, 1:]], 3)
        return x.repeat_interleave(q.size(1) // x.size(1), 1)

    row = torch.arange(window, device=q.device)
    distance = row[:, None] + window - torch.arange(2 * window, device=q.device)
    mask = ((distance >= 0) & (distance < window)).repeat(q.size(0), blocks, 1, 1)
    mask[:, 0, :, :before] = False
    own = F.pad(q, (0, 0, 0, behind)).unflatten(2, (blocks, window))
    own, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (own, pairs(k), pairs(v)))
    mask = mask.flatten(0, 1)[:, None]
    o = F.scaled_dot_product_attention(own, keys, values, mask, scale=scale)
    return o.unflatten(0, (q.size(0), blocks)).transpose(1, 2).flatten(2, 3)[:, :, :rows]


@cache
def band_mask(window: int, rows: int, keys: int, device: torch.device) -> Any:
    """FlexAttention's list of the blocks that are not all masked."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        distance = row + (keys - rows) - key
        return (distance >= 0) & (distance < window)

    return create_block_mask(sees, None, None, rows, keys, device=device)


def flex_band(window: int, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = band_mask(window, q.size(2), k.size(2), q.device)
    return flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


def _masked(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The Transformer's logits under a mask (L, L)."""
    x = model.embed_tokens(ids)
    rope = rope_table(model.config, ids.size(1), x)
    for block in model.blocks:
        for layer in block.layers:
            q, k, v = (t.transpose(1, 2) for t in layer.project(x, rope))
            o = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.size(1) != k.size(1))
            x = layer.finish(x, o.transpose(1, 2).flatten(2))
    return F.linear(model.norm(x), model.embed_tokens.weight)
