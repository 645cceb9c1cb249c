"""Ways to generate: the engine, and what it is measured against.

Every peer of a size has as many parameters, the same dtype, and the same few calls, so that one
benchmark serves all. `static.py` has the peers with preallocated caches, `linear.py` those whose
state does not grow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sizes import (
    attention_flops,
    dense_flops,
    hit_rows,
    make_model,
    row_bytes,
    transformer_flops,
    weight_count,
)
from torch import Tensor

from tlinformer import Engine, TLinFormerConfig, TLinFormerForCausalLM, plan_cache
from tlinformer.baseline import TransformerForCausalLM
from tlinformer.layer import attend, rope_table
from tlinformer.plan import CachePlan


class Peer:
    """One model with room for `max_context` tokens of `batch` sequences."""

    label = ""  # what tables and pictures call it
    slides = False  # has a cache miss

    def __init__(self, model: Any, max_context: int, batch: int) -> None:
        self.model, self.config = model, model.config
        self.max_context, self.batch = max_context, batch
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @staticmethod
    def missing() -> str:
        """The package that it needs and that is not installed; empty when nothing is missing."""
        return ""

    @classmethod
    def make(cls, config: TLinFormerConfig, device: torch.device, dtype: torch.dtype) -> Any:
        """Its model, of random weights."""
        return make_model(TransformerForCausalLM, config, device, dtype)

    @classmethod
    def model_of(cls) -> Any:
        """Differs where two peers of the same `make` have models of their own."""
        return None

    @classmethod
    def reference(cls, model: Any, ids: Tensor) -> Tensor:
        """Logits (B, L, V) of the whole sequence at once, by the model's own forward pass."""
        return model(ids)

    @classmethod
    def state_bytes(cls, config: TLinFormerConfig, context: int, batch: int, element: int) -> int:
        """What it has to keep after `context` tokens."""
        return batch * config.num_layers * context * row_bytes(config, element)

    @classmethod
    def room_bytes(
        cls, config: TLinFormerConfig, context: int, batch: int, element: int, device: torch.device
    ) -> int:
        """What it allocates for `context` tokens, beside the weights."""
        return cls.state_bytes(config, context, batch, element)

    @classmethod
    def token_bytes(cls, config: TLinFormerConfig, history: int, batch: int, element: int) -> int:
        """Weights and state that a token after `history` tokens has to read."""
        state = cls.state_bytes(config, history, batch, element)
        return weight_count(config) * element + state

    @classmethod
    def prefill_flops(cls, config: TLinFormerConfig, length: int) -> float:
        return transformer_flops(config, length)

    def prefill(self, ids: Tensor) -> Tensor:
        """Prompts (B, L), on the CPU -> logits (B, V)."""
        raise NotImplementedError

    def fill(self, length: int) -> None:
        """The state after `length` tokens; some peers put random values in place of a prefill."""
        self.prefill(torch.randint(self.config.vocab_size, (self.batch, length)))

    def step(self, tokens: Tensor) -> Tensor:
        """One more token (B) of each sequence -> logits (B, V)."""
        raise NotImplementedError

    def tokens(self) -> Callable[[int], Any]:
        """A call that generates so many tokens, greedy, none of which slides."""

        def loop(count: int) -> None:
            token = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
            for _ in range(count):
                token = self.step(token).argmax(-1)

        return loop

    def detail(self) -> dict[str, Any]:
        """What else a row should say, such as which kernels were picked."""
        return {}


def _plan(
    config: TLinFormerConfig, context: int, batch: int, element: int, device: torch.device
) -> CachePlan:
    dtype = torch.float32 if element == 4 else torch.bfloat16
    return plan_cache(
        config, max_context=context, batch_size=batch, dtype=dtype, device=device.type
    )


class EnginePeer(Peer):
    """tlinformer's engine."""

    label = "tlinformer engine"
    slides = True

    def __init__(self, model: TLinFormerForCausalLM, max_context: int, batch: int) -> None:
        super().__init__(model, max_context, batch)
        self.engine = Engine(model, max_context=max_context, batch_size=batch, dtype=self.dtype)

    @classmethod
    def make(cls, config: TLinFormerConfig, device: torch.device, dtype: torch.dtype) -> Any:
        return make_model(TLinFormerForCausalLM, config, device, dtype)

    @classmethod
    def state_bytes(cls, config: TLinFormerConfig, context: int, batch: int, element: int) -> int:
        return _plan(config, context, batch, element, torch.device("cpu")).cache_bytes

    @classmethod
    def room_bytes(
        cls, config: TLinFormerConfig, context: int, batch: int, element: int, device: torch.device
    ) -> int:
        return _plan(config, context, batch, element, device).total_bytes

    @classmethod
    def token_bytes(cls, config: TLinFormerConfig, history: int, batch: int, element: int) -> int:
        rows = hit_rows(config, history, config.generation_window // 2)
        return weight_count(config) * element + batch * rows * row_bytes(config, element)

    @classmethod
    def prefill_flops(cls, config: TLinFormerConfig, length: int) -> float:
        window = config.generation_window
        history = window * ((length - 1) // window)
        rest = length - history
        return dense_flops(config, history, rest) + attention_flops(config, history, rest)

    def prefill(self, ids: Tensor) -> Tensor:
        return self.engine.prefill(ids)

    def step(self, tokens: Tensor) -> Tensor:
        return self.engine.step(tokens)

    def tokens(self) -> Callable[[int], Any]:
        return self.engine.generate


class NaiveRecompute(Peer):
    """The paper's naive baseline: every token runs the whole sequence again."""

    label = "naive: recompute all"

    @classmethod
    def token_bytes(cls, config: TLinFormerConfig, history: int, batch: int, element: int) -> int:
        return Peer.token_bytes(config, history, batch, element)  # a cache would suffice

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        self.ids = ids.to(self.device)
        last = self.model.hidden_states(self.ids)[:, -1]
        return F.linear(last, self.model.embed_tokens.weight)

    def fill(self, length: int) -> None:
        self.ids = torch.randint(self.config.vocab_size, (self.batch, length), device=self.device)

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(torch.cat([self.ids, tokens.to(self.device)[:, None]], 1))


class NaiveConcatenate(Peer):
    """A cache that is concatenated anew for every token, eager: what model code does first."""

    label = "naive: concatenate cache"

    @classmethod
    def state_bytes(cls, config: TLinFormerConfig, context: int, batch: int, element: int) -> int:
        # A layer's old and new rows are there at once.
        rows = batch * (config.num_layers + 1) * context
        return rows * row_bytes(config, element)

    @classmethod
    def token_bytes(cls, config: TLinFormerConfig, history: int, batch: int, element: int) -> int:
        return Peer.token_bytes(config, history, batch, element)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        self.cache: list[tuple[Tensor, Tensor]] = []
        model, ids = self.model, ids.to(self.device)
        x = model.embed_tokens(ids)
        rope, rows = rope_table(self.config, ids.size(1), x), [(0, ids.size(1))]
        for block in model.blocks:
            for layer in block.layers:
                q, k, v = layer.project(x, rope)
                self.cache.append((k, v))
                x = layer.finish(x, attend(q, k, v, rows, rows, [(0, 0)]))
        return F.linear(model.norm(x[:, -1]), model.embed_tokens.weight)

    def fill(self, length: int) -> None:
        c = self.config
        shape = (2, self.batch, length, c.kv_heads, c.head_dim)
        self.cache = [
            tuple(torch.randn(shape, dtype=self.dtype, device=self.device).unbind(0))
            for _ in range(c.num_layers)
        ]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        model, length = self.model, self.cache[0][0].size(1)
        x = model.embed_tokens(tokens.to(self.device)[:, None])
        rope = rope_table(self.config, length + 1, x)[:, -1:]
        for block in model.blocks:
            for layer in block.layers:
                q, *new = layer.project(x, rope)
                old = self.cache.pop(0)
                k, v = (torch.cat(pair, 1) for pair in zip(old, new, strict=True))
                self.cache.append((k, v))
                o = attend(q, k, v, [(0, 1)], [(0, 0)], [(0, length + 1)])
                x = layer.finish(x, o)
        return F.linear(model.norm(x[:, 0]), model.embed_tokens.weight)


class Graphed(Peer):
    """A peer whose token is one CUDA graph: `forward` reads `self.token` and returns logits."""

    def __init__(self, model: Any, max_context: int, batch: int) -> None:
        super().__init__(model, max_context, batch)
        self.token = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.logits = torch.empty(0)
        self.eager = ""  # why there is no graph

    def forward(self) -> Tensor:
        raise NotImplementedError

    def rewind(self) -> None:
        """Makes the state again what it was before `tokens` was called."""

    @torch.no_grad()
    def _once(self) -> None:
        self.logits = self.forward()
        self.token.copy_(self.logits.argmax(-1))

    def tokens(self) -> Callable[[int], Any]:
        once: Callable[[], Any] = self._once
        if self.device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    once()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    once()
                once = graph.replay
            except Exception as error:  # each library has its own for what it cannot capture
                self.eager = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                warnings.warn(f"{self.label} runs without a graph: {self.eager}", stacklevel=2)
                torch.cuda.synchronize()
        self.rewind()

        def loop(count: int) -> None:
            for _ in range(count):
                once()

        return loop

    def detail(self) -> dict[str, Any]:
        return {"no_graph": self.eager} if self.eager else {}
