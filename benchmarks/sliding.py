"""The Transformer whose layers see a window only, in a ring of that many rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sizes import transformer_flops
from static import PIECE, StaticTransformer
from torch import Tensor

from tlinformer import TLinFormerConfig
from tlinformer.layer import Layer, rope_table


class SlidingWindow(StaticTransformer):
    """The Transformer whose layers see the last rows only, as many as TLinFormer's two windows."""

    label = "sliding window"

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
        """Blocks of a window's rows look at themselves and at the block before them."""
        window = self.window(self.config)
        row = torch.arange(window, device=self.device)
        behind = row[:, None] + window - torch.arange(2 * window, device=self.device)
        band = (behind >= 0) & (behind < window)
        outputs, before = [], None
        for a, b in self.pieces(0, self.length, max(window, PIECE // window * window)):
            projected = self.verb(Layer.project, layer, x[:, a:b], self.rope(a, b))
            q, k, v = (_blocks(t.transpose(1, 2), window) for t in projected)
            blocks = q.size(2)
            mask = band.repeat(x.size(0), blocks, 1, 1)
            if before is None:
                mask[:, 0, :, :window] = False
                before = torch.zeros_like(k[:, :, :1]), torch.zeros_like(v[:, :, :1])
            # Two blocks of keys for each block of queries: (B, Hkv, blocks, 2 window, d).
            keys, values = (
                torch.cat([torch.cat([old, new[:, :, :-1]], 2), new], 3)
                for old, new in zip(before, (k, v), strict=True)
            )
            before = k[:, :, -1:], v[:, :, -1:]
            groups = q.size(1) // k.size(1)
            wide = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (keys, values))
            o = F.scaled_dot_product_attention(
                *(t.transpose(1, 2).flatten(0, 1) for t in (q, *wide)),
                mask.flatten(0, 1)[:, None],
                scale=self.config.head_dim**-0.5,
            )
            o = o.unflatten(0, (x.size(0), blocks)).transpose(1, 2).flatten(2, 3)
            outputs.append(o[:, :, : b - a])
            if b == self.length:
                last, end = min(window, b), 2 * window + (b - a) - blocks * window
                slots = torch.arange(b - last, b, device=self.device) % window
                for which, rows in enumerate((keys, values)):
                    self.cache[i][which, :, :, slots] = rows[:, :, -1, end - last : end]
        return torch.cat(outputs, 2)


def _blocks(x: Tensor, window: int) -> Tensor:
    """(B, H, rows, d) -> (B, H, blocks, window, padded d), zeros in between and at the end."""
    blocks = -(-x.size(2) // window)
    return F.pad(x, (0, -x.size(3) % 8, 0, blocks * window - x.size(2))).unflatten(
        2, (blocks, window)
    )


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
