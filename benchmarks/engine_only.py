"""What only the engine promises: memory that does not grow, a host that does not wait, and states.

python benchmarks memory --prompt 1048576    # most memory taken beside weights and plan; growth
python benchmarks trace --history 16384      # launches, copies, waits and kernels of a token
python benchmarks trace --of prefill         # the same of a prompt, or of the token that slides
python benchmarks state --prompt 1048576     # a text's state as a file: bytes, seconds to restore
"""

from __future__ import annotations

import argparse
import collections
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
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
    """Counts and times of the runtime's calls and of kernels, from CUPTI."""
    from torch.profiler import ProfilerActivity, profile

    config, several = config_of(args.size), args.of == "tokens"
    model = EnginePeer.make(config, args.device, args.dtype)
    engine = Engine(model, max_context=args.prompt + 2 * config.generation_window)
    ids = random_ids(config, 1, args.prompt + several)
    tokens = config.generation_window - 32 if several else 1
    work: dict[str, Callable[[], Any]] = {
        "tokens": lambda: engine.generate(tokens, SAMPLED),
        "prefill": lambda: engine.prefill(ids),
        "slide": lambda: engine.step(torch.tensor([1])),
    }
    for _ in range(2):  # the first time, things are made
        engine.prefill(ids)
        if several:
            engine.generate(8, SAMPLED)
    slides = engine.stats.slides
    free(args.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work[args.of]()
        torch.cuda.synchronize()
    if engine.stats.slides - slides != (not several):
        raise SystemExit(f"--history {args.prompt}: whole windows, or none of these tokens slides")
    calls: dict[str, list[float]] = collections.defaultdict(list)
    kernels: dict[str, list[float]] = collections.defaultdict(list)
    spans: list[tuple[float, float]] = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if event.name.startswith("tlinformer::") and "(" not in event.name:
                continue  # a range of ours, not work
            kernels[event.name].append(event.time_range.elapsed_us())
            spans.append((event.time_range.start, event.time_range.end))
        elif event.name.startswith("cu"):
            calls[event.name].append(event.time_range.elapsed_us())
    begin = end = min(start for start, _ in spans)
    busy = 0.0
    for start, stop in sorted(spans):  # two streams may work at once
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    by_time = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return {
        "traced": args.of,
        "tokens": tokens,
        "device_microseconds": end - begin,
        "device_busy_microseconds": busy,
        "host_calls_a_token": {call: len(times) / tokens for call, times in calls.items()},
        "host_microseconds_a_token": {call: sum(times) / tokens for call, times in calls.items()},
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


def state(args: argparse.Namespace) -> dict[str, Any]:
    """A long text's state: written, read back, and gone on from."""
    config, tokens = config_of(args.size), 200
    model = EnginePeer.make(config, args.device, args.dtype)
    engine, again = (
        Engine(model, max_context=args.prompt + 1024, dtype=args.dtype) for _ in range(2)
    )
    ids = random_ids(config, 1, args.prompt)
    prefills = [seconds(lambda: engine.prefill(ids), args.device) for _ in range(3)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state"
        save = seconds(lambda: engine.save_state(path), args.device)
        # The file is still in the page cache: a disk's time is not in these.
        loads = [seconds(lambda: again.load_state(path), args.device) for _ in range(3)]
        size = path.stat().st_size
    expected = engine.generate(tokens, SAMPLED)
    if not torch.equal(torch.as_tensor(again.generate(tokens, SAMPLED)), torch.as_tensor(expected)):
        raise SystemExit("a restored state goes on otherwise")
    return {
        "prefill_seconds": statistics.median(prefills),
        "file_bytes": size,
        "save_seconds": save,
        "load_seconds": statistics.median(loads),
        "tokens_equal": tokens,
    }


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(suite: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"benchmarks {suite}", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="41m", help="model")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--prompt", "--history", type=int, help="tokens read")
    if suite == "trace":
        of = ("tokens", "prefill", "slide")
        parser.add_argument("--of", choices=of, default="tokens", help="what to trace")
    parser.add_argument("--generated", type=int, default=5000, help="tokens after the prompt")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a short history")
    parser.add_argument("--json", type=Path, help="another file of results")
    args = parser.parse_args(arguments)
    args.device = torch.device(args.device)
    kind = args.device.type
    if args.smoke:
        args.size, args.prompt, args.generated = "tiny", 300, 60
    if suite == "trace" and kind != "cuda":
        parser.error("trace counts what happens on a GPU; on the CPU use perf")
    usual = {"cpu": 100_000, "cuda": 2**20}[kind] if suite != "trace" else 2**14
    args.prompt = args.prompt or usual
    args.dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    row = {"suite": suite, "size": args.size, "peer": "engine", "history": args.prompt}
    row |= {"batch": 1, "dtype": str(args.dtype).removeprefix("torch.")}
    # Measured before the ceilings, whose memory would count.
    row |= {"memory": memory, "trace": trace, "state": state}[suite](args)
    published = None if args.size == "tiny" else RESULTS / f"{suite}-{kind}.json"
    results = Results(args.json or published)
    results.begin(args.device)
    results.add(row)
