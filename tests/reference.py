"""What TLinFormer computes, in float64 and without a single shortcut (paper §3).

Written from the specification alone: one window at a time, one head at a time, explicit softmax,
Python loops. It shares no code with the package; the golden vectors check it, and it checks the
package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def reference_logits(
    config: Any, state_dict: Mapping[str, Tensor], input_ids: Tensor, last_only: bool = False
) -> Tensor:
    """float64 logits of every position, (B, L, V), or with `last_only` of the last, (B, V).

    Gradients flow to the tensors of `state_dict`.
    """
    weights = {name: tensor.double() for name, tensor in state_dict.items()}
    rows = []
    for ids in input_ids:
        length = len(ids)
        if last_only:
            window = config.generation_window
            start = window * ((length - 1) // window)
            rows.append(_window_logits(config, weights, ids, start)[-1])
        else:
            starts = range(0, length, config.generation_window)
            stops = [min(start + config.generation_window, length) for start in starts]
            pieces = [
                _window_logits(config, weights, ids[:stop], start)
                for start, stop in zip(starts, stops, strict=True)
            ]
            rows.append(torch.cat(pieces))
    return torch.stack(rows)


def reference_transformer_logits(
    config: Any, state_dict: Mapping[str, Tensor], input_ids: Tensor
) -> Tensor:
    """float64 logits (B, L, V) of the baseline: the same layers, causal attention only."""
    weights = {name: tensor.double() for name, tensor in state_dict.items()}
    rows = []
    for ids in input_ids:
        x = weights["embed_tokens.weight"][ids.long()]
        positions = range(len(ids))
        for b in range(config.num_blocks):
            for i in range(config.block_depth):
                layer = _Layer(config, weights, f"blocks.{b}.layers.{i}.")
                q, k, v = layer.project(x, positions)
                x = layer.finish(x, layer.attend(q, k, v, causal=True))
        rows.append(_head(config, weights, x))
    return torch.stack(rows)


def _window_logits(config: Any, weights: dict[str, Tensor], ids: Tensor, c: int) -> Tensor:
    """Logits (m, V) of the tokens c ... whose history is the tokens 0 ... c-1."""
    embedded = weights["embed_tokens.weight"][ids.long()]
    a, x = embedded[:c], embedded[c:]
    a_at, x_at = range(c), range(c, len(ids))
    s = max(0, c - _history_window(config, c)) if c else 0

    for b in range(config.num_blocks):
        z = qa = None
        for i in range(config.block_depth):
            layer = _Layer(config, weights, f"blocks.{b}.layers.{i}.")
            q, k, v = layer.project(x, x_at)
            o = layer.attend(q, k, v, causal=True)
            if c > 0:
                if i == 0:
                    qa, kc, vc = layer.project(a, a_at)
                    z = layer.finish(a[s:], layer.attend(qa[s:], kc, vc))
                else:
                    qz, kc, vc = layer.project(z, a_at[s:])
                    if i < config.block_depth - 1:
                        z = layer.finish(z, layer.attend(qz, kc, vc))
                    else:
                        a = layer.finish(a, layer.attend(qa, kc, vc))
                if i > 0 or config.variant == "tlinformer":
                    o = o + layer.attend(q, kc, vc)
            x = layer.finish(x, o)
    return _head(config, weights, x)


def _history_window(config: Any, c: int) -> int:
    if config.history_window != "auto":
        return config.history_window
    return max(8, 8 * math.ceil(config.history_window_coefficient * math.log(c) / 8))


def _head(config: Any, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    normed = _layer_norm(x, weights["norm.weight"], weights["norm.bias"], config.layer_norm_eps)
    return normed @ weights["embed_tokens.weight"].T


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


class _Layer:
    def __init__(self, config: Any, weights: dict[str, Tensor], prefix: str) -> None:
        self.config = config
        self.w = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        self.d = config.hidden_size // config.num_attention_heads

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return _layer_norm(x, weight, bias, self.config.layer_norm_eps)

    def project(self, x: Tensor, positions: range) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, D) -> rotated q (rows, Hq, d), rotated k and v (rows, Hkv, d)."""
        hq, hkv, rows = self.config.num_attention_heads, self.config.num_key_value_heads, len(x)
        y = self._norm("attn_norm", x) @ self.w["qkv_proj.weight"].T + self.w["qkv_proj.bias"]
        q = y[:, : hq * self.d].reshape(rows, hq, self.d)
        k = y[:, hq * self.d : (hq + hkv) * self.d].reshape(rows, hkv, self.d)
        v = y[:, (hq + hkv) * self.d :].reshape(rows, hkv, self.d)
        return self._rope(q, positions), self._rope(k, positions), v

    def _rope(self, x: Tensor, positions: range) -> Tensor:
        columns = []
        p = torch.tensor(list(positions), dtype=torch.float64)[:, None]
        for i in range(self.d // 2):
            angle = p * self.config.rope_theta ** (-2 * i / self.d)
            even, odd = x[..., 2 * i], x[..., 2 * i + 1]
            columns.append(even * angle.cos() - odd * angle.sin())
            columns.append(even * angle.sin() + odd * angle.cos())
        return torch.stack(columns, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        """(rows, Hq, d) over (rows', Hkv, d) -> (rows, D)."""
        share = self.config.num_attention_heads // self.config.num_key_value_heads
        heads = []
        for h in range(self.config.num_attention_heads):
            scores = q[:, h] @ k[:, h // share].T / math.sqrt(self.d)
            if causal:
                future = torch.ones(scores.shape, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(future, -math.inf)
            e = torch.exp(scores - scores.max(-1, keepdim=True).values)
            heads.append(e / e.sum(-1, keepdim=True) @ v[:, h // share])
        return torch.cat(heads, -1)

    def finish(self, x: Tensor, o: Tensor) -> Tensor:
        y = x + o @ self.w["out_proj.weight"].T + self.w["out_proj.bias"]
        h = self._norm("mlp_norm", y)
        gate = h @ self.w["gate_proj.weight"].T
        swish = gate / (1 + torch.exp(-gate))
        return y + (swish * (h @ self.w["up_proj.weight"].T)) @ self.w["down_proj.weight"].T
