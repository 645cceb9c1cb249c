"""TLinFormer as a trainable module: the logits of every position at once (paper §3).

All generation windows of a sequence, each with its own history, go through the layers together:
their rows lie side by side along the token dimension, so that `project` and `finish` are one call
each, and only `attend` looks at where a window begins.

Names: X are the rows of the windows (every token once), A the rows of every window's history, Z
those of every window's compressed history. Between blocks a stream holds [X | A], inside a block
[X | Z].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from .config import TLinFormerConfig
from .layer import Layer, Ranges, gather, rope_table, side_by_side

Model = TypeVar("Model", bound="CausalLM")


class Rows(NamedTuple):
    """Where the rows of each window lie in some tensor."""

    x: Ranges  # the generation window
    a: Ranges  # its history
    z: Ranges  # the last Woh rows of its history, or what became of them


class Windows(NamedTuple):
    """A group of windows, located in the three tensors that hold their rows."""

    tokens: Rows  # in the token sequence, where histories overlap
    outer: Rows  # in the stream [X | A]
    inner: Rows  # in the stream [X | Z]; no `a`

    @classmethod
    def plan(cls, config: TLinFormerConfig, starts: Sequence[int], length: int) -> Windows:
        """The windows that begin at the tokens `starts`, in a sequence of `length` tokens."""
        kept = [min(c, config.history_window_at(c)) for c in starts]
        tokens = Rows(
            x=[(c, min(c + config.generation_window, length)) for c in starts],
            a=[(0, c) for c in starts],
            z=[(c - n, c) for c, n in zip(starts, kept, strict=True)],
        )
        x = side_by_side([stop - start for start, stop in tokens.x])
        a = side_by_side(starts, offset=x[-1][1])
        tail = [(stop - n, stop) for (_, stop), n in zip(a, kept, strict=True)]
        return cls(tokens, Rows(x, a, tail), Rows(x, [], side_by_side(kept, offset=x[-1][1])))


class Block(nn.Module):
    """Compress, P - 2 hidden, and restore layers (paper §3.2)."""

    layers: Sequence[Layer]

    def __init__(self, config: TLinFormerConfig) -> None:
        super().__init__()
        layers = (Layer(config) for _ in range(config.block_depth))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.window_sees_history = config.variant == "tlinformer"

    def forward(
        self,
        stream: Tensor,
        rows: Rows,
        qkv: tuple[Tensor, Tensor, Tensor] | None,
        rope: Tensor,
        windows: Windows,
        last: bool,
    ) -> Tensor:
        """One block over a group of windows.

        Args:
            stream: (B, n, D), whose `rows` are the X and A of every window.
            qkv: the compress layer's projections of `stream`, if they are known already.
            rope: rows for all tokens.
            last: A has no reader any more and is not computed.

        Returns:
            (B, n', D): the stream [X | A], or X alone after the last block.
        """
        compress, *hidden, restore = self.layers
        tokens, inner = windows.tokens, windows.inner
        q_at = rows
        if qkv is None:
            q_needed = rows.x + rows.z if last else None
            q_at = inner if last else rows
            qkv = compress.project(stream, gather(rope, tokens.x + tokens.a), q_needed)
        q, k, v = qkv
        nothing = [(0, 0)] * len(rows.x)
        seen = rows.a if self.window_sees_history else nothing
        # The history's last rows read all of it: focused attention.
        o = compress.attend(q, k, v, q_at.x + q_at.z, rows.x + nothing, seen + rows.a)
        y = compress.finish(gather(stream, rows.x + rows.z), o)

        rope = gather(rope, tokens.x + tokens.z)
        p: tuple[Tensor, Tensor, Tensor]
        for layer in hidden:
            p = layer.project(y, rope)
            o = layer.attend(*p, inner.x + inner.z, inner.x + nothing, inner.z + inner.z)
            y = layer.finish(y, o)

        p = restore.project(y, rope, inner.x)
        o = restore.attend(*p, inner.x, inner.x, inner.z)
        y = gather(y, inner.x)
        if not last:  # the compress layer's queries read what the block made of the history
            o = torch.cat([o, restore.attend(q, *p[1:], q_at.a, None, inner.z)], 1)
            y = torch.cat([y, gather(stream, rows.a)], 1)
        return restore.finish(y, o)


def next_token_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in float32, of the logits `hidden` · `head`ᵀ.

    Compiled, it stores the logits once, in their own type.

    Args:
        hidden: (B, L, D).
        head: (V, D).
        targets: (B, L) integers in 0 ... V - 1.
    """
    vocab_size = head.size(0)
    # With GPT-2's 50257 logits a row cuBLAS has only old kernels, five times as slow.
    head = F.pad(head, (0, 0, 0, -vocab_size % 64))
    logits = F.linear(hidden.flatten(0, 1), head)
    if len(head) > vocab_size:
        # Masked, not cut off: rows that begin at multiples of 64 are read 16 bytes at a time.
        added = torch.arange(len(head), device=head.device) >= vocab_size
        logits = logits.masked_fill(added, -math.inf)
    return F.cross_entropy(logits.float(), targets.flatten())


class CausalLM(nn.Module):
    """Embedding, blocks, final norm and tied head; `hidden_states` runs the blocks."""

    blocks: Sequence[Block]

    def __init__(self, config: TLinFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (Block(config) for _ in range(config.num_blocks))
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initialisation; norms keep PyTorch's 1 and 0."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Layer):
            small = 0.02 / math.sqrt(2 * self.config.num_layers)
            for name, linear in module.named_children():
                if isinstance(linear, nn.Linear):
                    scaled = name in ("qkv_proj", "out_proj", "down_proj")
                    nn.init.normal_(linear.weight, std=small if scaled else 0.02)
                    if linear.bias is not None:
                        nn.init.zeros_(linear.bias)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass recomputes the row-wise verbs instead of storing them."""
        return any(m.gradient_checkpointing for m in self.modules() if isinstance(m, Layer))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Layer):
                module.gradient_checkpointing = on

    def hidden_states(self, input_ids: Tensor, first: int = 0) -> Tensor:
        """Token ids (B, L), integers -> (B, L - first, D): what the head turns into logits.

        Args:
            first: position of the first row that is wanted, below L.
        """
        raise NotImplementedError

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """The logits that predict the token after every position, or their loss.

        Args:
            input_ids: (B, L) int64 or int32, in 0 ... vocab_size - 1; L >= 1.
            targets: (B, L) int64, the tokens to predict.

        Returns:
            Logits (B, L, V); given `targets`, their mean cross-entropy (nats, float32), which
            stores no logits in float32 if compiled. Both are differentiable.

        Raises:
            ValueError: wrong shape or dtype, no tokens, ids out of range. (On a GPU ids are not
                checked while training: the check would wait for the device.)
        """
        self._check_ids(input_ids)
        hidden, head = self.hidden_states(input_ids), self.embed_tokens.weight
        return F.linear(hidden, head) if targets is None else next_token_loss(hidden, head, targets)

    def _check_ids(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"input_ids must be an int64 or int32 tensor, not {kind}")
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(
                f"input_ids has shape {tuple(ids.shape)}; it must be (batch, length), both >= 1"
            )
        if torch.compiler.is_compiling() or (self.training and not ids.is_cpu) or ids.is_meta:
            return
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids holds {low if low < 0 else high}; "
                f"ids must be in 0 ... {self.config.vocab_size - 1} (vocab_size - 1)"
            )

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`; each file is replaced atomically."""
        checkpoint.save(self, directory)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        directory: str | PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Args:
            dtype: of the parameters; None keeps the file's.
            device: None is the CPU, "auto" a GPU if there is one.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it.
        """
        return checkpoint.load(cls, directory, dtype=dtype, device=device)


class TLinFormerForCausalLM(CausalLM):
    """TLinFormer language model; the config's `variant` makes it TConstFormer.

    `history_row_budget` bounds the memory of scoring without autograd: windows go through the
    blocks in groups that hold no more history rows than this (or one window each).
    """

    history_row_budget = 65536

    def hidden_states(self, input_ids: Tensor, first: int = 0) -> Tensor:
        """Token ids (B, L), integers -> (B, L - first, D): what the head turns into logits.

        Windows that end before position `first` cost nothing but their share of a history.
        """
        x = self.embed_tokens(input_ids)
        rope = rope_table(self.config, input_ids.size(1), x)
        # Block 0's history and windows are the same tokens: one projection serves all windows.
        qkv = self.blocks[0].layers[0].project(x, rope)
        done = []
        for windows in self._groups(input_ids.size(0), input_ids.size(1), first):
            stream, rows = x, windows.tokens
            for block in self.blocks:
                last = block is self.blocks[-1]
                stream = block(stream, rows, qkv if stream is x else None, rope, windows, last)
                rows = windows.outer
            done.append(stream)
        return self.norm(torch.cat(done, 1)[:, first % self.config.generation_window :])

    def _groups(self, batch: int, length: int, first: int) -> list[Windows]:
        budget = math.inf if torch.is_grad_enabled() else self.history_row_budget
        groups: list[list[int]] = [[]]
        rows, size = 0, self.config.generation_window
        for start in range(first // size * size, length, size):
            rows += batch * start
            if rows > budget and groups[-1]:
                groups.append([])
                rows = batch * start
            groups[-1].append(start)
        return [Windows.plan(self.config, starts, length) for starts in groups]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> Tensor | list[Tensor]:
        """Prompt and new tokens, through `Engine` on the model's device, whose cache makes it fast.

        On CUDA a float32 model generates in bfloat16; for float16 make the model that.

        Args:
            input_ids: (B, L) int64, or a list of B 1-D tensors of different lengths.
            max_new_tokens: new tokens of each sequence, at most; fewer after a stop token.
            temperature: 0 is greedy. The rest is described at `SamplingParams`.

        Returns:
            (B, L + new) int64, or a list of B 1-D tensors if `input_ids` is a list, on the device
            of `input_ids`. In a tensor, a sequence that ended early repeats its stop token.

        Raises:
            ValueError: naming the argument, its value and the limit.
        """
        from .engine import Engine, SamplingParams

        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be an integer >= 0")
        if isinstance(input_ids, Tensor):
            self._check_ids(input_ids)
        sampling = SamplingParams(
            temperature, top_k, top_p, min_p, repetition_penalty, seed, stop_token_ids
        )
        longest = max((len(ids) for ids in input_ids), default=0)
        engine = Engine(self, max_context=longest + max_new_tokens, batch_size=len(input_ids))
        engine.prefill(input_ids)
        new = engine.generate(max_new_tokens, sampling)
        if isinstance(input_ids, Tensor):
            return torch.cat([input_ids, new.to(input_ids)], 1)
        return [torch.cat([ids, n.to(ids)]) for ids, n in zip(input_ids, new, strict=True)]
