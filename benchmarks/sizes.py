"""The models that are measured, and the least that each of their steps has to move and compute."""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tlinformer import TLinFormerConfig
from tlinformer.model import CausalLM

Model = TypeVar("Model", bound=CausalLM)

# 41m is the paper's; d512 has heads that PyTorch's kernels take; the others are its shape grown up.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "history_window": 32,
        "generation_window": 32,
    },
    "41m": {"vocab_size": 50257, "hidden_size": 432, "num_attention_heads": 12},
    "d512": {"vocab_size": 50257, "hidden_size": 512, "num_attention_heads": 8},
    "1.3b": {
        "vocab_size": 50257,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 6144,
        "num_blocks": 4,
        "block_depth": 6,
        "history_window": 512,
        "generation_window": 512,
    },
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_blocks": 4,
        "block_depth": 8,
        "history_window": 512,
        "generation_window": 512,
    },
}


def config_of(size: str) -> TLinFormerConfig:
    return TLinFormerConfig(**SIZES[size])


def make_model(
    cls: type[Model], config: TLinFormerConfig, device: torch.device, dtype: torch.dtype
) -> Model:
    """A model of random weights under which attention is neither uniform nor a single row."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval().requires_grad_(False)


def random_ids(config: TLinFormerConfig, batch: int, length: int) -> Tensor:
    """(batch, length) int64 on the CPU."""
    return torch.randint(config.vocab_size, (batch, length))


def exact(model: Model) -> Model:
    """The same model in float32."""
    return copy.deepcopy(model).float()


def weight_count(c: TLinFormerConfig) -> int:
    """Parameters of a model; the Transformer of the same config has as many."""
    q, kv = c.hidden_size, 2 * c.kv_heads * c.head_dim
    layer = c.hidden_size * (2 * q + kv + 3 * c.mlp_size + 5) + q + kv
    return c.num_layers * layer + c.hidden_size * (c.vocab_size + 2)


def row_bytes(c: TLinFormerConfig, element: int) -> int:
    """Keys and values of one token in one layer."""
    return 2 * element * c.kv_heads * c.head_dim


def hit_rows(c: TLinFormerConfig, history: int, fill: int) -> int:
    """Rows that one token reads, over the layers (paper §3.3): C1 N + C0 with C1 = num_blocks."""
    z = min(history, c.history_window_at(history))
    return c.num_blocks * (history + (c.block_depth - 1) * z + c.block_depth * fill)


def dense_flops(c: TLinFormerConfig, history: int, window: int) -> float:
    """FLOPs of the products with weight matrices in a prefill, each needed one once.

    Attention's own products are not counted.
    """
    d, kv = c.hidden_size, c.kv_heads * c.head_dim
    finish = d * d + 3 * d * c.mlp_size
    blocks, depth = c.num_blocks, c.block_depth
    z = min(history, c.history_window_at(history))
    macs = history * (blocks * d * 2 * kv + (blocks - 1) * (d * d + finish))
    macs += z * blocks * (d * d + finish + (depth - 2) * (d * (d + 2 * kv) + finish) + d * 2 * kv)
    macs += window * blocks * depth * (d * (d + 2 * kv) + finish) + d * c.vocab_size
    return 2.0 * macs


def attention_flops(c: TLinFormerConfig, history: int, window: int) -> float:
    """FLOPs of queries with keys and of weights with values in a prefill."""
    z = min(history, c.history_window_at(history))
    pairs = c.num_blocks * z * (history + (c.block_depth - 2) * z)  # compress, hidden layers
    pairs += (c.num_blocks - 1) * history * z  # restore
    pairs += c.num_blocks * window * (history + (c.block_depth - 1) * z)
    pairs += c.num_layers * window * (window + 1) // 2
    return 4.0 * c.hidden_size * pairs


def slide_flops(c: TLinFormerConfig, history: int) -> float:
    """FLOPs of a cache miss: C1 N + C0, N tokens of history of which block 0 knows all rows."""
    known = 2.0 * history * c.hidden_size * 2 * c.kv_heads * c.head_dim
    return dense_flops(c, history, 1) + attention_flops(c, history, 1) - known


def transformer_flops(c: TLinFormerConfig, length: int, window: float = math.inf) -> float:
    """FLOPs of a Transformer's prefill; every row sees at most `window` rows."""
    d, kv = c.hidden_size, c.kv_heads * c.head_dim
    layer = d * (d + 2 * kv) + d * d + 3 * d * c.mlp_size
    seen = min(length, window)
    pairs = seen * (seen + 1) / 2 + (length - seen) * seen
    macs = c.num_layers * (length * layer + 2 * d * pairs) + d * c.vocab_size
    return 2.0 * macs
