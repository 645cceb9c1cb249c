"""How the next token is drawn from the logits."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

from tlinformer import _C


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; the filters apply in the order of the fields' list here.

    Args:
        temperature: 0 is greedy (only the repetition penalty then has an effect).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p, in (0, 1].
        min_p: drop tokens less likely than `min_p` times the likeliest one, in [0, 1].
        repetition_penalty: above 1, tokens already in the sequence become less likely (applied
            before the temperature).
        seed: same seed, weights and prompt: same tokens.
        stop_token_ids: a sequence ends after drawing one of these (it is returned).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: Iterable[int] = ()

    def _compiled(self) -> Any:
        values = []
        for name, convert in _CONVERTERS.items():
            value = getattr(self, name)
            try:
                values.append(convert(value))
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{name} is {value!r}, which is of the wrong type") from None
        try:
            return _C.SamplingParams(*values)
        except TypeError:
            raise ValueError(f"sampling parameters out of the range of 64 bits: {self}") from None


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "temperature": float,
    "top_k": operator.index,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": lambda seed: operator.index(seed) % 2**64,
    "stop_token_ids": lambda ids: [operator.index(i) for i in ids],
}
