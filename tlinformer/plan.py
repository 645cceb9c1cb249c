"""Every byte of an engine, planned before any is allocated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tlinformer import _C
from tlinformer.config import TLinFormerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the kernels' code and the libraries take of a GPU's memory, besides weights and cache.
CUDA_RESERVE = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class CacheRegion:
    """One tensor of the arena: `bytes` at `offset`, `rows` per sequence."""

    name: str
    block: int
    layer: int
    rows: int
    offset: int
    bytes: int


class CachePlan:
    """Every byte an engine will use, known before anything is allocated.

    Attributes:
        regions: all `CacheRegion`s: keys and values of "history", "context" and "window"; with
            three blocks or more "stream", the history's activations; "workspace".
        bytes_by_region: bytes by those names.
        cache_bytes: keys and values alone.
        total_bytes: what the engine allocates besides the weights.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        names = [f.name for f in dataclasses.fields(CacheRegion)]
        self.regions = [CacheRegion(*(getattr(r, n) for n in names)) for r in compiled.regions]
        self.bytes_by_region = {r.name: compiled.bytes_of(r.name) for r in self.regions}
        self.cache_bytes: int = compiled.cache_bytes
        self.total_bytes: int = compiled.total_bytes

    def __repr__(self) -> str:
        return f"CachePlan(total_bytes={self.total_bytes}, {self.bytes_by_region})"


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raises ValueError naming the value and its limits."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; it must be an integer, {least} to {most}")


def dtype_name(dtype: torch.dtype | str | None) -> str:
    """'float32' for torch.float32, 'float32' or None; ValueError for what is no engine's dtype."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
    return name


def plan_cache(
    config: TLinFormerConfig,
    *,
    max_context: int,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    memory_limit: int = 0,
    device: torch.device | str = "cpu",
) -> CachePlan:
    """Plans an engine's memory, in bytes by region, without allocating any.

    Args:
        config: the model's sizes.
        max_context: tokens a sequence may hold, prompt and generated together.
        batch_size: sequences.
        dtype: of weights and cache; float32 by default, bfloat16 on CUDA.
        memory_limit: bytes the plan must fit in; 0: unlimited.
        device: "cpu" or "cuda". The latter takes a CUDA build of tlinformer.

    Raises:
        ValueError: for options out of range, or sizes that the device's kernels do not take.
        RuntimeError: when the plan exceeds `memory_limit`, naming the longest context that fits.
    """
    check_integer("max_context", max_context, 1, 2**40)
    sizes = _sizes(config, batch_size, dtype, memory_limit, device)
    return CachePlan(_C.CachePlan(_C.Config(config.to_dict()), max_context, *sizes))


def longest_context(
    config: TLinFormerConfig,
    *,
    memory_limit: int,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """The most tokens a sequence can hold in a plan of `memory_limit` bytes; 0 if none fits.

    Found by bisection over plans as `plan_cache` makes them; arguments and errors are its.
    """
    most = 2**31 - 1 if device_type(device) == "cuda" else 2**40
    sizes = _sizes(config, batch_size, dtype, memory_limit, device)
    found: int = _C.CachePlan.longest_context(_C.Config(config.to_dict()), most, *sizes)
    return found


def _sizes(
    config: TLinFormerConfig,
    batch_size: int,
    dtype: torch.dtype | str | None,
    memory_limit: int,
    device: torch.device | str,
) -> tuple[int, str, int, bool]:
    """What the compiled plan takes besides config and context, once it is checked."""
    check_integer("batch_size", batch_size, 1, 2**20)
    check_integer("memory_limit", memory_limit, 0, 2**62)
    if not isinstance(config, TLinFormerConfig):
        raise ValueError(f"config is {config!r}; it must be a TLinFormerConfig")
    cuda = device_type(device) == "cuda"
    name = dtype_name("bfloat16" if cuda and dtype is None else dtype)
    return batch_size, name, memory_limit, cuda


def weights_bytes(config: TLinFormerConfig, dtype: torch.dtype | str) -> int:
    """Bytes of a model's weights."""
    d, f, kv = config.hidden_size, config.mlp_size, config.kv_heads * config.head_dim
    layer = 5 * d + (d + 1) * (d + 2 * kv) + d * (d + 3 * f)
    numbers = config.num_layers * layer + d * (config.vocab_size + 2)
    return DTYPES[dtype_name(dtype)].itemsize * numbers


@dataclasses.dataclass(frozen=True)
class Fit:
    """What an engine needs of a device's memory, and whether that is there.

    Attributes:
        plan: of the engine.
        needed_bytes: of the plan, and of weights that are not there yet.
        available_bytes: what the device has left; 0: unknown.
        longest_context: tokens a sequence could hold there; None: unknown.
        refusal: why it does not fit, or None.
    """

    plan: CachePlan
    needed_bytes: int
    available_bytes: int
    longest_context: int | None
    refusal: str | None


def fit_device(
    config: TLinFormerConfig,
    *,
    max_context: int,
    batch_size: int = 1,
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    new_weights: int | None = None,
) -> Fit:
    """Compares an engine's memory with what its device has left, without allocating any.

    Args:
        new_weights: bytes of weights that are not on the device yet; all by default.
        The others are `plan_cache`'s, as are the errors, but that too large a plan is no error.
    """
    sizes: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device}
    plan = plan_cache(config, max_context=max_context, **sizes)
    weights = weights_bytes(config, dtype) if new_weights is None else new_weights
    needed, available = plan.total_bytes + weights, available_memory(device)
    if not available:
        return Fit(plan, needed, 0, None, None)
    room = available - weights
    longest = longest_context(config, memory_limit=room, **sizes) if room > 0 else 0
    refusal = None
    if needed > available:
        least = f"enough for max_context = {longest}" if longest else "too few for any context"
        refusal = (
            f"max_context = {max_context} with batch_size = {batch_size} needs "
            f"{needed / 2**30:,.2f} GiB, weights included; {available / 2**30:,.2f} GiB are "
            f"available, {least}"
        )
    return Fit(plan, needed, available, longest, refusal)


def device_type(device: torch.device | str) -> str:
    """'cpu' or 'cuda'; ValueError for what is no engine's device."""
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; the engine runs on cpu and cuda")
    return kind


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes this process can still take: the machine's, or its control group's if that is less.

    At least 1; 0 where the system does not say, or has no GPU. Of a GPU: what is free, and what
    torch would free, cached segments of which no part is in use; or what the others have left over,
    if that is more.
    """
    if device_type(device) == "cuda":
        if not torch.cuda.is_available():
            return 0
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        split = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
        return max(1, max(free + cached - split, split) - CUDA_RESERVE)
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            counts = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(dict(counts).get("inactive_file", 0))  # given back when asked for
            limits.append(int(most) - int((group / "memory.current").read_text()) + cached)
    except (OSError, ValueError):
        pass  # not Linux, or no control group: no limit known from there
    return max(1, min(limits)) if limits else 0
