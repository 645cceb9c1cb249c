"""The inference engine: one prefill, then tokens at the cost of reading a static cache."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from tlinformer import _C
from tlinformer.config import TLinFormerConfig
from tlinformer.model import TLinFormerForCausalLM
from tlinformer.plan import (
    DTYPES,
    available_memory,
    check_integer,
    device_type,
    dtype_name,
    plan_cache,
)
from tlinformer.sampling import SamplingParams

TokenBatch = torch.Tensor | Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the cache did. With `batch_size` 1 the last two are integers, else lists.

    Attributes:
        hits: tokens that read the cache and left the history alone.
        slides: recomputations of the compressed history (those of prefills included).
        prefills: calls of `prefill` that were done.
        prefill_tokens: prompt tokens read.
        rows_read: key/value rows that generated tokens attended to, summed over the layers.
        cache_bytes: bytes of keys and values held.
        history_length: tokens before the generation window.
        window_fill: tokens in the generation window.
    """

    hits: int
    slides: int
    prefills: int
    prefill_tokens: int
    rows_read: int
    cache_bytes: int
    history_length: int | list[int]
    window_fill: int | list[int]


def _tensor(token_ids: Any, call: str) -> torch.Tensor:
    try:
        return torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{call} got {token_ids!r}, which are no token ids: {error}") from None


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it is a slice that vector loads cannot begin at."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def engine_dtype(own: torch.dtype, dtype: torch.dtype | str | None, device: str) -> str:
    """The name of `dtype`, or of the model's own if None; ValueError where the device has none."""
    if dtype is None and device == "cuda" and own == torch.float32:
        return "bfloat16"
    name = dtype_name(own if dtype is None else dtype)
    if name == ("float16" if device == "cpu" else "float32"):
        allowed, place = "float32 or bfloat16", "the CPU"
        if device == "cuda":
            allowed, place = "bfloat16 or float16", "CUDA"
        raise ValueError(f"dtype is {name}; on {place} it must be {allowed}")
    return name


def _device_of(model: TLinFormerForCausalLM) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the model lies on {names}; an engine runs on one device: model.to() one")
    device = devices.pop()
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"the model is on {device}; the engine runs on cpu and cuda: model.to('cpu') first"
        )
    if device.type == "cuda" and not _C.has_cuda:
        raise ValueError(
            f"the model is on {device}, but this tlinformer was built without its CUDA engine: "
            "model.to('cpu') first, or build it where torch and a CUDA toolkit support CUDA: "
            "TLINFORMER_CUDA=1 pip install --no-build-isolation ."
        )
    return device


def state_lengths(path: str | os.PathLike[str]) -> list[int]:
    """How many tokens each sequence in a file of `Engine.save_state` has.

    Raises:
        ValueError: for a file that is no saved state. OSError: where it cannot be read.
    """
    lengths: list[int] = _C.state_lengths(os.fspath(path))
    return lengths


class Engine:
    """Generates with a static cache; every call works on all sequences of the batch.

    The engine borrows the model's weights (it converts a copy if `dtype` differs from theirs):
    do not train the model while an engine uses it. One engine serves one thread at a time.

    On CUDA all work goes to the stream that is current when the engine is made; logits are ready
    for the stream that is current when a call returns. Token ids come back on the CPU.

    Args:
        model: where the weights come from; the engine runs on its device, the CPU or a GPU.
        max_context: tokens a sequence may hold, prompt and generated together.
        batch_size: the most sequences.
        dtype: of weights and cache. On the CPU float32 or bfloat16 (half the bytes, so faster); on
            CUDA bfloat16 or float16. The model's own by default, but bfloat16 on CUDA if that is
            float32. Arithmetic and logits are float32 on either.
        num_threads: of the CPU; torch's setting by default. On CUDA they only check long prompts
            that come from the CPU.

    Attributes:
        device: where weights, cache and logits lie.
        plan: every byte of the cache.
        stats: what the cache did.

    Raises:
        ValueError: for a model on another device or options out of range.
        RuntimeError: when the plan exceeds the available memory; the text names the longest
            context that fits.
    """

    def __init__(
        self,
        model: TLinFormerForCausalLM,
        *,
        max_context: int,
        batch_size: int = 1,
        dtype: torch.dtype | str | None = None,
        num_threads: int | None = None,
    ) -> None:
        if not isinstance(model, TLinFormerForCausalLM):
            raise ValueError(f"model is {model!r}; it must be a TLinFormerForCausalLM")
        threads = torch.get_num_threads() if num_threads is None else num_threads
        check_integer("num_threads", threads, 0, 4096)
        self.device = _device_of(model)
        self.config: TLinFormerConfig = model.config
        self.batch_size = batch_size
        kind = device_type(self.device)
        name = engine_dtype(next(model.parameters()).dtype, dtype, kind)
        self.dtype = DTYPES[name]
        self._stream = torch.cuda.current_stream(self.device) if kind == "cuda" else None
        with self._on_stream():
            # The weights come first: the plan may have what they leave.
            self._weights = {
                key: _aligned(tensor.detach().to(self.dtype).contiguous())
                for key, tensor in model.state_dict().items()
            }
            self.plan = plan_cache(
                self.config,
                max_context=max_context,
                batch_size=batch_size,
                dtype=name,
                memory_limit=available_memory(self.device),
                device=kind,
            )
            # The whole cache, (total_bytes) uint8, laid out as `plan.regions` says.
            self.arena = torch.empty(self.plan.total_bytes, dtype=torch.uint8, device=self.device)
            self._compiled = _C.Engine(
                _C.Config(self.config.to_dict()),
                name,
                {key: tensor.data_ptr() for key, tensor in self._weights.items()},
                self.plan._compiled,
                self.arena.data_ptr(),
                self.arena.numel(),
                threads,
                self._stream.cuda_stream if self._stream else 0,
            )
        self._as_list = False

    def _on_stream(self, call: str = "") -> contextlib.AbstractContextManager[Any]:
        """Makes the engine's GPU and stream the current ones; a `call` has a name in profiles."""
        stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._stream:
            stream = torch.cuda.stream(self._stream)
        if not call or not torch.autograd._profiler_enabled():  # a name costs microseconds
            return stream
        both = contextlib.ExitStack()
        both.enter_context(torch.profiler.record_function(f"tlinformer::{call}"))
        both.enter_context(stream)
        return both

    def _ids(self, token_ids: TokenBatch | int, call: str) -> list[torch.Tensor]:
        """The sequences of a batch as contiguous int32 or int64 tensors (L), their range unchecked.

        They lie on the CPU or, if they were there already, on the engine's device.
        """
        rows: list[Any]
        if isinstance(token_ids, torch.Tensor):
            if token_ids.ndim not in (1, 2):
                raise ValueError(
                    f"{call} got token ids of shape {tuple(token_ids.shape)}; it takes (B, L), "
                    "or a list of 1-D tensors"
                )
            rows = list(token_ids if token_ids.ndim == 2 else token_ids[None])
        elif isinstance(token_ids, Sequence) and not isinstance(token_ids, (str, bytes)):
            rows = [_tensor(row, call) for row in token_ids]
        else:
            raise ValueError(f"{call} takes a tensor or a list of 1-D tensors, not {token_ids!r}")
        for row in rows:
            integers = torch.can_cast(row.dtype, torch.int64) and row.dtype != torch.bool
            if row.ndim != 1 or (row.numel() and not integers):
                raise ValueError(
                    f"{call} takes integer token ids, 1-D for each sequence, as [[1, 2, 3]] for "
                    f"one; got {row.dtype} of shape {tuple(row.shape)}"
                )
        return [
            row.to(
                self.device if row.device == self.device else "cpu",
                torch.int32 if row.dtype == torch.int32 else torch.int64,
            ).contiguous()
            for row in rows
        ]

    def _logits(self, as_list: bool) -> Any:
        shape = (self._compiled.sequences, self.config.vocab_size)
        with self._on_stream():  # dtype and device said, whatever torch's defaults
            logits = torch.empty(shape, dtype=torch.float32, device=self.device)
            self._compiled.copy_logits(logits.data_ptr())
        if self._stream and self._stream != (reader := torch.cuda.current_stream(self.device)):
            reader.wait_stream(self._stream)
            logits.record_stream(reader)
        return list(logits) if as_list else logits

    def prefill(
        self, input_ids: TokenBatch, *, progress: Callable[[float], bool | None] | None = None
    ) -> Any:
        """Reads the prompts, replacing what was cached.

        Args:
            input_ids: (B, L) integers, or a list of 1-D tensors of different lengths. Those on the
                engine's GPU stay there: they are read in the order of the current stream.
            progress: called with the share done, 0 to 1; returning False interrupts.

        Returns:
            Logits of each prompt's next token, on the engine's device: (B, V) float32, or a list
            of (V) for a list.

        Raises:
            ValueError: for empty prompts, ids out of range, too many sequences, or a prompt above
                `max_context`; what was cached is kept.
            KeyboardInterrupt: on Ctrl-C; the engine is empty then, and usable.
        """
        ids = self._ids(input_ids, "prefill")
        there = [row for row in ids if row.device == self.device]
        if self._stream and there:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            for row in there:
                row.record_stream(self._stream)
        prompts = [
            (row.data_ptr(), row.numel(), row.dtype == torch.int64, row.device == self.device)
            for row in ids
        ]
        with self._on_stream("prefill"):
            self._compiled.prefill(prompts, progress)
        self._as_list = not isinstance(input_ids, torch.Tensor)
        return self._logits(self._as_list)

    def step(self, token_ids: TokenBatch) -> Any:
        """Appends one token to every sequence.

        Args:
            token_ids: (B) integers, or a list of B integers or 1-element tensors.

        Returns:
            Logits of the next token, on the engine's device: (B, V) float32, or a list of (V) for
            a list.

        Raises:
            ValueError: without a prefill, for ids out of range or a full cache; nothing is lost.
        """
        ids = _tensor(token_ids, "step")
        if ids.ndim == 2 and ids.size(1) == 1:
            ids = ids[:, 0]
        if ids.ndim != 1:
            raise ValueError(
                f"step got token ids of shape {tuple(ids.shape)}; it takes (B), one token for "
                "each sequence"
            )
        row = self._ids(ids, "step")[0].tolist()
        with self._on_stream("step"):
            self._compiled.step(row)
        return self._logits(not isinstance(token_ids, torch.Tensor))

    def generate(
        self,
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        *,
        on_token: Callable[[int, int], bool | None] | None = None,
        progress: Callable[[float], bool | None] | None = None,
    ) -> Any:
        """Draws tokens and appends them, so that calls can follow one another.

        Args:
            max_new_tokens: at most so many for each sequence.
            sampling: greedy by default.
            on_token: called with (sequence, token) as tokens are drawn; returning False stops.
            progress: called with the share of a slide under way, 0 to 1, which takes a while on
                long histories; returning False interrupts.

        Returns:
            The new tokens alone, on the CPU: (B, n) int64, or a list of 1-D tensors if the prompt
            was a list. In a tensor, a sequence that ended early repeats its stop token.

        Raises:
            ValueError: without a prefill, for bad parameters, or more tokens than `max_context`.
            RuntimeError: for NaN logits, naming the position.
            KeyboardInterrupt: on Ctrl-C. After either, tokens drawn before stay cached, but for
                one whose slide was interrupted.
        """
        check_integer("max_new_tokens", max_new_tokens, 0, 2**62)
        if not isinstance(sampling, SamplingParams | None):
            raise ValueError(f"sampling is {sampling!r}; it must be SamplingParams")
        compiled = (sampling or SamplingParams())._compiled()
        with self._on_stream("generate"):
            rows = self._compiled.generate(max_new_tokens, compiled, on_token, progress)
        if self._as_list:
            return [torch.tensor(row, dtype=torch.int64, device="cpu") for row in rows]
        longest = max(len(row) for row in rows)
        padded = [row + row[-1:] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device="cpu")

    def save_state(
        self,
        path: str | os.PathLike[str],
        *,
        sequences: Iterable[int] | None = None,
        progress: Callable[[float], bool | None] | None = None,
    ) -> None:
        """Writes what was cached to a file, from which `load_state` goes on exactly.

        The file is in the format safetensors and holds the rows in use alone. It appears once it is
        complete; an engine on another device can load it if its dtype is the same.

        Args:
            path: the file; an old one is replaced.
            sequences: which of them, in that order; all by default.
            progress: called with the share done, 0 to 1; returning False interrupts.

        Raises:
            ValueError: without a prefill, or for sequences that are not there.
            OSError: where the file cannot be written; nothing is left of it.
        """
        chosen = self._chosen(sequences)
        with self._on_stream("save_state"):
            self._compiled.save_state(os.fspath(path), chosen, progress)

    def load_state(
        self,
        path: str | os.PathLike[str],
        *,
        sequences: Iterable[int] | None = None,
        progress: Callable[[float], bool | None] | None = None,
    ) -> torch.Tensor:
        """Replaces what was cached by what `save_state` wrote.

        Args:
            path: the file.
            sequences: sequence i becomes the saved sequence `sequences[i]`: [2] takes one out of a
                batch, [0] * 8 makes eight of the first. All by default. Sampling draws other random
                numbers in every place of a batch.
            progress: called with the share done, 0 to 1; returning False interrupts.

        Returns:
            Logits of the next tokens, (B, V) float32 on the engine's device.

        Raises:
            ValueError: for a file that is no saved state, is damaged, or was made by another model
                (config and weights are compared) or dtype; for more sequences or tokens than the
                engine was planned for. What was cached is kept.
            OSError: where the file cannot be read.
            KeyboardInterrupt: on Ctrl-C; the engine is then as it was, or empty.
        """
        chosen = self._chosen(sequences)
        with self._on_stream("load_state"):
            self._compiled.load_state(os.fspath(path), chosen, progress)
        self._as_list = False
        return self._logits(False)

    @staticmethod
    def _chosen(sequences: Iterable[int] | None) -> list[int]:
        if sequences is None:
            return []
        try:
            chosen = [operator.index(index) for index in sequences]
        except TypeError:
            raise ValueError(f"sequences is {sequences!r}; it must be a list of integers") from None
        if not chosen:
            raise ValueError("sequences is empty; name at least one, or leave it out for all")
        return chosen

    @property
    def stats(self) -> EngineStats:
        """Counters since the engine was made or reset."""
        compiled = self._compiled.stats
        fields = {f.name: getattr(compiled, f.name) for f in dataclasses.fields(EngineStats)}
        if self.batch_size == 1:
            for name in ("history_length", "window_fill"):
                fields[name] = fields[name][0] if fields[name] else 0
        return EngineStats(**fields)

    def reset(self) -> None:
        """Forgets all sequences and counters; keeps the memory."""
        with self._on_stream():
            self._compiled.reset()
