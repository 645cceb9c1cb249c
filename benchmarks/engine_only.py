"""What only the engine promises: memory that does not grow, and a host that does not wait.

python benchmarks memory --prompt 1048576    # most memory taken beside weights and plan; growth
python benchmarks trace --history 16384      # launches, copies, waits and kernels of a token
"""

from __future__ import annotations

import argparse
import collections
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Results, free
from peers import EnginePeer
from sizes import SIZES, config_of, random_ids, weight_count

from tlinformer import Engine, SamplingParams

SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)


class Taken:
    """Bytes taken since this was made: of the GPU, or of the process' pages."""

    def __init__(self, device: torch.device, before: int) -> None:
        """`before` bytes were taken already and count, too."""
        self.cuda, self.peak = device.type == "cuda", 0
        free(device)
        self.begin = self.now() - before

    def now(self) -> int:
        if self.cuda:
            left, total = torch.cuda.mem_get_info()
            return total - left
        # VmRSS is off by some hundred KB; this counts page by page.
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no Rss in /proc/self/smaps_rollup")

    def look(self, *_: object) -> int:
        taken = self.now() - self.begin
        self.peak = max(self.peak, taken)
        return taken


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """The peak of a long prompt and the tokens after it, and growth once all code has run."""
    config, device = config_of(args.size), args.device
    model = EnginePeer.make(config, device, args.dtype)
    weights = weight_count(config) * args.dtype.itemsize
    taken = Taken(device, before=weights)
    engine = Engine(model, max_context=args.prompt + args.generated + 300, dtype=args.dtype)
    engine.prefill(random_ids(config, 1, args.prompt), progress=taken.look)
    sizes: list[int] = []
    engine.generate(300, SAMPLED)  # by then every code path ran once, a slide too
    slides, begin = engine.stats.slides, taken.look()
    counter = itertools.count()
    engine.generate(
        args.generated,
        SAMPLED,
        on_token=lambda *_: (
            sizes.append(taken.look()) if next(counter) == args.generated - 1 else None
        ),
    )
    return {
        "generated": args.generated,
        "slides": engine.stats.slides - slides,
        "growth_bytes": sizes[0] - begin,
        "cache_bytes": engine.plan.cache_bytes,
        "plan_bytes": engine.plan.total_bytes,
        "weight_bytes": weights,
        "peak_bytes": taken.peak,
        "peak_over_plan_and_weights": taken.peak / (engine.plan.total_bytes + weights),
        "peak_over_cache_and_weights": taken.peak / (engine.plan.cache_bytes + weights),
    }


def trace(args: argparse.Namespace) -> dict[str, Any]:
    """Counts of the runtime's calls and of kernels, from CUPTI."""
    from torch.profiler import ProfilerActivity, profile

    config = config_of(args.size)
    model = EnginePeer.make(config, args.device, args.dtype)
    engine = Engine(model, max_context=args.prompt + 2 * config.generation_window)
    engine.prefill(random_ids(config, 1, args.prompt + 1))
    engine.generate(8, SAMPLED)
    slides, tokens = engine.stats.slides, config.generation_window - 32
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        engine.generate(tokens, SAMPLED)
    assert engine.stats.slides == slides, "more tokens than a window holds"
    calls: collections.Counter[str] = collections.Counter()
    kernels: dict[str, list[float]] = collections.defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.time_range.elapsed_us())
        elif event.name.startswith("cu"):
            calls[event.name] += 1
    by_time = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return {
        "tokens": tokens,
        "host_calls_a_token": {call: n / tokens for call, n in calls.items()},
        "device_work": [
            {
                "name": name.replace("(anonymous namespace)::", "")
                .split("(")[0]
                .removeprefix("void ")[:70],
                "a_token": len(times) / tokens,
                "microseconds": statistics.median(times),
                "microseconds_a_token": sum(times) / tokens,
            }
            for name, times in by_time
        ],
    }


def main(suite: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"benchmarks {suite}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="41m", help="model")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--prompt", "--history", type=int, help="tokens read")
    parser.add_argument("--generated", type=int, default=5000, help="tokens after the prompt")
    parser.add_argument("--json", type=Path, help="another file of results")
    args = parser.parse_args(arguments)
    args.device = torch.device(args.device)
    kind = args.device.type
    if suite == "trace" and kind != "cuda":
        parser.error("trace counts what happens on a GPU; on the CPU use perf")
    usual = {"cpu": 100_000, "cuda": 2**20}[kind] if suite == "memory" else 2**14
    args.prompt = args.prompt or usual
    args.dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    row = {"suite": suite, "size": args.size, "peer": "engine", "history": args.prompt}
    row |= {"batch": 1, "dtype": str(args.dtype).removeprefix("torch.")}
    # Measured before the ceilings, whose memory would count.
    row |= {"memory": memory, "trace": trace}[suite](args)
    results = Results(args.json or RESULTS / f"{suite}-{kind}.json")
    results.begin(args.device)
    results.add(row)
