"""The sizes of a TLinFormer, checked once where they enter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

VARIANTS = ("tlinformer", "tconstformer")
_MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class TLinFormerConfig:
    """Sizes and constants of a model (paper §3; the field names are those of `config.json`).

    Args:
        vocab_size: number of token ids, V.
        hidden_size: model width, D; a multiple of `num_attention_heads`.
        num_attention_heads: query heads, Hq.
        num_key_value_heads: key/value heads, Hkv; divides Hq. None: Hq.
        num_blocks: stacked blocks, nb.
        block_depth: layers inside a block, P >= 2 (the paper's inner depth H is P - 2).
        history_window: rows of compressed history, Woh, or "auto": `history_window_at` grows
            logarithmically with the history.
        generation_window: tokens between two slides, Wog.
        intermediate_size: SwiGLU width, F. None: 8 D / 3 rounded up to a multiple of 256.
        rope_theta: base of the rotary frequencies.
        layer_norm_eps: epsilon of every LayerNorm.
        variant: "tlinformer", or "tconstformer" (arXiv 2509.00202), whose compress layer gives
            the generation window no view of the full history.
        history_window_coefficient: c of "auto".
        dropout: probability, on attention probabilities and on the MLP output, while training.

    Raises:
        ValueError: naming the field, its value and the limit it breaks.
    """

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    num_blocks: int = 2
    block_depth: int = 4
    history_window: int | str = 256
    generation_window: int = 256
    intermediate_size: int | None = None
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    variant: str = "tlinformer"
    history_window_coefficient: float = 12.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_blocks"):
            self._check_int(name, 1)
        self._check_int("block_depth", 2)
        self._check_int("generation_window", 1)
        if self.history_window != "auto":
            self._check_int("history_window", 1, ' or "auto"')
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.intermediate_size is None:
            width = 256 * math.ceil(8 * self.hidden_size // 3 / 256)
            object.__setattr__(self, "intermediate_size", width)
        self._check_int("num_key_value_heads", 1)
        self._check_int("intermediate_size", 1)
        for name in ("rope_theta", "layer_norm_eps", "history_window_coefficient"):
            self._check_float(name, lambda v: v > 0, "a finite number > 0")
        self._check_float("dropout", lambda v: 0 <= v < 1, "a number in [0, 1)")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; it must be one of {VARIANTS}")

        d, h = self.hidden_size, self.num_attention_heads
        if d % h:
            raise ValueError(f"hidden_size is {d}; num_attention_heads, {h}, must divide it")
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size is {d} with {h} num_attention_heads: the head size {self.head_dim} "
                "must be even, because RoPE rotates pairs"
            )
        if h % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads is {self.kv_heads}; it must divide num_attention_heads, {h}"
            )

    def _check_int(self, name: str, minimum: int, alternative: str = "") -> None:
        value = getattr(self, name)
        if type(value) is not int or not minimum <= value <= _MAX_INT:
            limit = f"an integer in [{minimum}, {_MAX_INT}]{alternative}"
            raise ValueError(f"{name} is {value!r}; it must be {limit}")

    def _check_float(self, name: str, valid: Any, limit: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not valid(value):
            raise ValueError(f"{name} is {value!r}; it must be {limit}")
        object.__setattr__(self, name, float(value))

    @property
    def head_dim(self) -> int:
        """Size of one head, d = D / Hq."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """`num_key_value_heads`, resolved."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def mlp_size(self) -> int:
        """`intermediate_size`, resolved."""
        assert self.intermediate_size is not None
        return self.intermediate_size

    @property
    def num_layers(self) -> int:
        """Layers in all, nb * P."""
        return self.num_blocks * self.block_depth

    def history_window_at(self, history_length: int) -> int:
        """Woh at a history of `history_length` tokens; the compressed rows are at most as many.

        "auto" is 8 * ceil(c * ln(C) / 8), at least 8 (the paper asks for n > c ln N).
        """
        if history_length < 0:
            raise ValueError(f"history_length is {history_length}; it must be >= 0")
        if isinstance(self.history_window, int):
            return self.history_window
        logarithm = math.log(max(history_length, 1))
        return max(8, 8 * math.ceil(self.history_window_coefficient * logarithm / 8))

    def to_dict(self) -> dict[str, Any]:
        """Every field, resolved; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TLinFormerConfig:
        """The config of these fields.

        Raises:
            ValueError: naming unknown, missing or contradictory fields.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a config must be a mapping of fields, not {type(values).__name__}")
        known = {f.name: f.default is MISSING for f in fields(cls)}
        if unknown := sorted(str(k) for k in values if k not in known):
            raise ValueError(f"unknown config fields {unknown}; known are {sorted(known)}")
        if missing := [name for name, needed in known.items() if needed and name not in values]:
            raise ValueError(f"missing config fields {missing}")
        return cls(**values)
