"""What an engine's verbs cost beside what this machine can do, measured in the same run.

A verb has to read its weights and cached rows once a call and to do its arithmetic; the longer of
the two times at the machine's measured rates is its limit, and limit over time its share. Numbers
of activations are not counted: they stay in the caches for the few rows of a token, while in a
prefill they are a part of what is missing from 100%.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tlinformer.engine import Engine, SamplingParams

# On a GPU a verb is one or more kernels; the first pattern found in a kernel's name says which.
KERNELS = (
    (r"tlin_project_", "project"),
    (r"tlin_(add|gated?|mlp)_", "finish"),
    (r"tlin_(batch|decode|history|window|prefill|resident)_", "attend"),
    (r"tlin_head_", "head"),
    (r"tlin_(sample|feed)_|tlin_mark_seen|tlin_set_history", "draw"),
    (r"tlin_(norm|rotate|silu)_rows|tlin_widen|tlin_(check|narrow)_ids", "rows"),
    (r"nvjet|gemm|cutlass|cublas|xmma", "products"),
    (r"tlin_measure_speed", "other"),  # when an engine is made
)


@dataclasses.dataclass
class Kernel:
    """A GPU kernel over all its calls; microseconds count from the end of the one before it."""

    name: str
    calls: int = 0
    microseconds: float = 0.0


@dataclasses.dataclass
class Verb:
    """A verb over all its calls in a stage."""

    verb: str
    calls: int
    microseconds: float
    bytes: float
    flops: float
    bound: str = ""  # memory | arithmetic; empty where neither is counted
    share: float | None = None  # of what the machine can do
    kernels: list[Kernel] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Stage:
    """A prefill, the token that slides, or tokens between slides."""

    stage: str
    tokens: int  # of each sequence
    seconds: float  # of the whole call
    verbs: list[Verb]


def seconds(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """The time of a call, on a GPU until its work is done."""
    cuda = str(device).startswith("cuda")
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def read_bandwidth(x: torch.Tensor) -> float:
    """Bytes a second of a sum over a tensor much larger than any cache."""
    return x.numel() * x.itemsize / seconds(x.sum, x.device)


def matrix_rate(
    size: int = 2048,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """FLOP/s of a square product: the best of several."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Bytes and FLOPs a second that torch reaches on the device; a copy's bytes count twice."""
    cuda = device.type == "cuda"
    large = torch.ones(2**30 if cuda else 2**26, device=device)
    bandwidth = max(read_bandwidth(large) for _ in range(9))
    first, second = large.chunk(2)
    copying = min(seconds(lambda: first.copy_(second), device) for _ in range(9))
    # The CPU multiplies in float32, whatever the weights are.
    rate = matrix_rate(8192, device, torch.bfloat16) if cuda else matrix_rate()
    return {
        "bytes_per_second": bandwidth,
        "copy_bytes_per_second": large.numel() * large.itemsize / copying,
        "flops_per_second": rate,
    }


def attribute(events: Iterable[tuple[str, float, float]]) -> dict[str, Kernel]:
    """Kernels by name from (name, start, end) in microseconds.

    Kernels of a chain start before their predecessor ends, and wait: a kernel's time begins where
    the last of those that ended before it did, so that the sum is the time of the device.
    """
    kernels: dict[str, Kernel] = {}
    done = float("-inf")
    for name, start, end in sorted(events, key=lambda event: event[2]):
        short = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        short = re.split(r"[<(]", short)[0].rpartition("::")[2].strip() or name
        kernel = kernels.setdefault(short, Kernel(short))
        kernel.calls += 1
        kernel.microseconds += end - max(start, done)
        done = max(done, end)
    return kernels


def verbs_of_kernels(kernels: dict[str, Kernel], counted: list[Verb], many: bool) -> list[Verb]:
    """The counted work of verbs with the time of the kernels that do it.

    Of many rows, a product's kernel serves project or finish: `many` puts the two together.
    """
    both = "project, finish"

    def merged(verb: str) -> str:
        verb = "attend" if verb.startswith("attend") else verb
        return both if many and verb in ("project", "finish", "products", "rows") else verb

    verbs: dict[str, Verb] = {}
    for one in counted:
        verb = verbs.setdefault(merged(one.verb), Verb(merged(one.verb), 0, 0, 0, 0))
        verb.calls += one.calls
        verb.bytes += one.bytes
        verb.flops += one.flops
    for kernel in sorted(kernels.values(), key=lambda kernel: -kernel.microseconds):
        found = (verb for pattern, verb in KERNELS if re.search(pattern, kernel.name))
        name = merged(next(found, "other"))
        verb = verbs.setdefault(name, Verb(name, 0, 0, 0, 0))
        verb.calls += kernel.calls if name == "other" else 0
        verb.microseconds += kernel.microseconds
        verb.kernels.append(kernel)
    return [verb for verb in verbs.values() if verb.microseconds]


def compare(verb: Verb, ceilings: dict[str, float]) -> None:
    """Sets a verb's bound and its share of what the machine can do."""
    limits = {
        "memory": verb.bytes / ceilings["bytes_per_second"],
        "arithmetic": verb.flops / ceilings["flops_per_second"],
    }
    bound = max(limits, key=lambda name: limits[name])
    if limits[bound] and verb.microseconds:
        verb.bound, verb.share = bound, limits[bound] / (verb.microseconds / 1e6)


def _stage(
    engine: Engine, stage: str, tokens: int, call: Callable[[], Any], metered: bool
) -> Stage:
    cuda = engine.device.type == "cuda"
    if not metered:
        return Stage(stage, tokens, seconds(call, engine.device), [])
    engine._compiled.meter(True)
    events: list[tuple[str, float, float]] = []
    if cuda:
        with torch.profiler.profile() as profiler:  # of the CPU's and the GPU's activities
            took = seconds(call, engine.device)
        for event in profiler.events():
            # A range of the host's is shown among the device's work, too.
            kernel = event.device_type == torch.autograd.DeviceType.CUDA
            if kernel and not re.fullmatch(r"tlinformer::\w+", event.name):
                events.append((event.name, event.time_range.start, event.time_range.end))
    else:
        took = seconds(call)
    verbs = [
        Verb(v.verb, v.calls, v.seconds * 1e6, v.bytes, v.flops) for v in engine._compiled.metered
    ]
    engine._compiled.meter(False)
    if cuda:
        verbs = verbs_of_kernels(attribute(events), verbs, many=stage != "tokens")
    return Stage(stage, tokens, took, sorted(verbs, key=lambda verb: -verb.microseconds))


def count(engine: Engine, call: Callable[[], Any]) -> tuple[float, float]:
    """Bytes and FLOPs of a call's verbs."""
    engine._compiled.meter(True)
    call()
    verbs = engine._compiled.metered
    engine._compiled.meter(False)
    return sum(verb.bytes for verb in verbs), sum(verb.flops for verb in verbs)


def run(
    engine: Engine, history: int, tokens: int, sampling: SamplingParams, metered: bool = True
) -> list[Stage]:
    """Times a prefill of `history` random tokens, the token that slides, and `tokens` hits.

    Args:
        engine: planned for `history + 1 + tokens`; all its sequences take part.
        history: a multiple of the generation window.
        tokens: fewer than a generation window holds.
        sampling: how the hits are drawn.
        metered: also tell what each verb took; without it the times are a little shorter.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (engine.batch_size, history)
    ids = torch.randint(engine.config.vocab_size, shape, generator=generator)
    engine.prefill(ids)  # what happens only once is over
    engine.step(ids[:, 0])
    engine.generate(min(tokens, 3), sampling)
    return [
        _stage(engine, "prefill", history, lambda: engine.prefill(ids), metered),
        _stage(engine, "slide", 1, lambda: engine.step(ids[:, 0]), metered),
        _stage(engine, "tokens", tokens, lambda: engine.generate(tokens, sampling), metered),
    ]
