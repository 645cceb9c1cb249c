"""The CUDA engine beside its limits, on one GPU.

    python benchmarks/gpu.py hit    --json benchmarks/results/cuda_hit.json
    python benchmarks/gpu.py slide  --json benchmarks/results/cuda_slide.json
    python benchmarks/gpu.py batch  --json benchmarks/results/cuda_batch.json
    python benchmarks/gpu.py long   --json benchmarks/results/cuda_long.json
    python benchmarks/gpu.py memory --json benchmarks/results/cuda_memory.json
    python benchmarks/gpu.py trace  --json benchmarks/results/cuda_trace.json
    python benchmarks/gpu.py trace  --of prefill
    python benchmarks/gpu.py state  --json benchmarks/results/cuda_state.json

hit     the time of a token between two slides, beside the time its bytes take at --bandwidth
slide   the time of a prefill, and of the token that slides
batch   tokens a second of several sequences at once
long    a prompt of 10 million tokens, then 1000 more
memory  the most device memory taken, beside weights and cache
trace   what the host and the device do between two slides, or in a prefill or a slide: launches,
        copies, waits, kernels
state   the file of a long text's state: its size, and how long it takes to write and read

Weights and prompts are random, in bfloat16. Times are medians; a call that is timed ends when its
result has reached the host.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import PAPER_41M, finish, hit_bytes

from tlinformer import Engine, SamplingParams, TLinFormerConfig, TLinFormerForCausalLM

MODELS = {
    "41M": PAPER_41M,
    "D512": {"vocab_size": 50257, "hidden_size": 512, "num_attention_heads": 8},
}
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)


def make_model(name: str) -> TLinFormerForCausalLM:
    torch.manual_seed(0)
    model = TLinFormerForCausalLM(TLinFormerConfig(**MODELS[name]))
    return model.to(torch.bfloat16).cuda().eval()


def make_ids(model: TLinFormerForCausalLM, batch: int, length: int) -> torch.Tensor:
    """(batch, length) random token ids; on the CPU, where the engine takes them."""
    return torch.randint(model.config.vocab_size, (batch, length))


def seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def environment() -> dict[str, Any]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "gpu": torch.cuda.get_device_name(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def hit(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in args.models:
        model = make_model(name)
        for history in args.histories:
            ids = make_ids(model, 1, history + 1)
            engine = Engine(model, max_context=history + args.tokens + 64)
            for what, sampling in (("greedy", SamplingParams()), ("sampled", SAMPLED)):
                times = []
                for _ in range(args.repeats):
                    engine.prefill(ids)
                    engine.generate(8, sampling)
                    slides = engine.stats.slides
                    call = lambda e=engine, s=sampling: e.generate(args.tokens, s)  # noqa: E731
                    times.append(seconds(call) / args.tokens)
                    assert engine.stats.slides == slides, "more tokens than a window holds"
                took = statistics.median(times)
                touched = hit_bytes(model, 2, history, 8 + args.tokens // 2)
                limit = touched / args.bandwidth / 1e12
                rows.append(
                    {
                        "model": name,
                        "history": history,
                        "tokens": what,
                        "milliseconds": took * 1e3,
                        "best": min(times) * 1e3,
                        "worst": max(times) * 1e3,
                        "megabytes": touched / 1e6,
                        "limit_milliseconds": limit * 1e3,
                        "times_the_limit": took / limit,
                    }
                )
            del engine
    return {"bandwidth_tb_per_s": args.bandwidth, "hits": rows}


def slide(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in args.models:
        model = make_model(name)
        window = model.config.generation_window
        for history in args.histories:
            history = max(1, history // window) * window
            ids = make_ids(model, 1, history)
            engine = Engine(model, max_context=history + 1)
            prefills, slides = [], []
            for _ in range(args.repeats):
                prefills.append(seconds(lambda e=engine, i=ids: e.prefill(i)))
                slides.append(seconds(lambda e=engine: e.step(torch.tensor([1]))))
            assert engine.stats.history_length == history
            rows.append(
                {
                    "model": name,
                    "history": history,
                    "prefill_milliseconds": statistics.median(prefills) * 1e3,
                    "prefill_tokens_per_second": history / statistics.median(prefills),
                    "slide_milliseconds": statistics.median(slides) * 1e3,
                    "slide_milliseconds_a_token": statistics.median(slides) * 1e3 / window,
                }
            )
            del engine
    return {"slides": rows}


def batch(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in args.models:
        model = make_model(name)
        weights = sum(p.numel() for p in model.parameters()) * 2
        for history in args.histories:
            for size in args.batch_sizes:
                ids = make_ids(model, size, history + 1)
                engine = Engine(model, max_context=history + args.tokens + 64, batch_size=size)
                times = []
                for _ in range(args.repeats):
                    engine.prefill(ids)
                    engine.generate(8)
                    times.append(seconds(lambda e=engine: e.generate(args.tokens)) / args.tokens)
                took = statistics.median(times)
                one = hit_bytes(model, 2, history, 8 + args.tokens // 2)
                touched = weights + size * (one - weights)
                rows.append(
                    {
                        "model": name,
                        "history": history,
                        "batch_size": size,
                        "milliseconds_a_step": took * 1e3,
                        "tokens_per_second": size / took,
                        "megabytes": touched / 1e6,
                        "share_of_bandwidth": touched / took / args.bandwidth / 1e12,
                    }
                )
                del engine
    return {"bandwidth_tb_per_s": args.bandwidth, "batches": rows}


class DeviceMemory:
    """Device memory taken since this was made, and the most of it that was seen."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._free, self.peak = torch.cuda.mem_get_info()[0], 0

    def look(self, *_: object) -> None:
        self.peak = max(self.peak, self._free - torch.cuda.mem_get_info()[0])


def long(args: argparse.Namespace) -> dict[str, Any]:
    torch.zeros(1).cuda()  # the driver's own memory is not counted
    memory = DeviceMemory()
    model = make_model("41M")
    weights = sum(p.numel() for p in model.parameters()) * 2
    ids = make_ids(model, 1, args.prompt)
    engine = Engine(model, max_context=args.prompt + args.generated)
    prefill = seconds(lambda: engine.prefill(ids, progress=memory.look))
    marks = [time.perf_counter()]
    total = seconds(
        lambda: engine.generate(
            args.generated, SAMPLED, on_token=lambda *_: marks.append(time.perf_counter())
        )
    )
    memory.look()
    # A token is timed with the push of the one before it.
    gaps = sorted(after - before for before, after in itertools.pairwise(marks[1:]))
    slides = engine.stats.slides - 1
    return {
        "prompt": args.prompt,
        "generated": args.generated,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": args.prompt / prefill,
        "generate_seconds": total,
        "hit_milliseconds": statistics.median(gaps) * 1e3,
        "slides": slides,
        "slide_milliseconds": statistics.median(gaps[-slides:]) * 1e3 if slides else None,
        "cache_and_weights_gib": (engine.plan.cache_bytes + weights) / 2**30,
        "peak_gib": memory.peak / 2**30,
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    torch.zeros(1).cuda()
    taken = DeviceMemory()
    model = make_model("41M")
    weights = sum(p.numel() for p in model.parameters()) * 2
    engine = Engine(model, max_context=args.prompt + 1024)
    taken.look()
    created = taken.peak
    engine.prefill(make_ids(model, 1, args.prompt), progress=taken.look)
    engine.generate(1000, SAMPLED, progress=taken.look)
    taken.look()
    needed = engine.plan.cache_bytes + weights
    return {
        "prompt": args.prompt,
        "cache_mib": engine.plan.cache_bytes / 2**20,
        "weights_mib": weights / 2**20,
        "workspace_mib": (engine.plan.total_bytes - engine.plan.cache_bytes) / 2**20,
        "created_mib": created / 2**20,
        "peak_mib": taken.peak / 2**20,
        "torch_peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "peak_over_cache_and_weights": taken.peak / needed,
    }


def trace(args: argparse.Namespace) -> dict[str, Any]:
    """Counts and times of the runtime's calls and of kernels, from CUPTI."""
    runs = [_trace(args, history) for history in args.histories]
    return runs[0] if len(runs) == 1 else {"traces": runs}


def _trace(args: argparse.Namespace, history: int) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    model = make_model(args.models[0])
    window = model.config.generation_window
    ids = make_ids(model, 1, history + (args.of == "tokens"))
    engine = Engine(model, max_context=history + args.tokens + 64)
    work: dict[str, Callable[[], Any]] = {
        "tokens": lambda: engine.generate(args.tokens, SAMPLED),
        "prefill": lambda: engine.prefill(ids),
        "slide": lambda: engine.step(torch.tensor([1])),
    }
    for _ in range(2):  # the first time, things are made
        engine.prefill(ids)
        if args.of == "tokens":
            engine.generate(8, SAMPLED)
    if args.of == "slide":
        assert history % window == 0, f"{history} tokens are no multiple of {window}: no slide"
    slides, tokens = engine.stats.slides, args.tokens if args.of == "tokens" else 1
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work[args.of]()
        torch.cuda.synchronize()
    slid = engine.stats.slides - slides
    assert slid == (args.of != "tokens"), "more tokens than a window holds"
    calls: dict[str, list[float]] = collections.defaultdict(list)
    kernels: dict[str, list[float]] = collections.defaultdict(list)
    spans: list[tuple[float, float]] = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name].append(event.time_range.elapsed_us())
            spans.append((event.time_range.start, event.time_range.end))
        elif event.name.startswith("cu"):
            calls[event.name].append(event.time_range.elapsed_us())
    busy, end = 0.0, min(start for start, _ in spans)
    for start, stop in sorted(spans):  # two streams may work at once
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    by_time = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return {
        "model": args.models[0],
        "history": history,
        "of": args.of,
        "tokens": tokens,
        "device_microseconds": end - min(start for start, _ in spans),
        "device_busy_microseconds": busy,
        "host_calls": [
            {"call": call, "count": len(times), "a_token": len(times) / tokens, "us": sum(times)}
            for call, times in calls.items()
        ],
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
    """A long text's state: written, read back, forked, and gone on from."""
    model = make_model("41M")
    engine = Engine(model, max_context=args.prompt + 1024)
    prefill = seconds(lambda: engine.prefill(make_ids(model, 1, args.prompt)))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state"
        save = seconds(lambda: engine.save_state(path))
        expected = engine.generate(args.tokens, SAMPLED)
        again = Engine(model, max_context=args.prompt + 1024)
        # The first is the way from a file that nobody has read; both find it in the page cache.
        loads = [seconds(lambda: again.load_state(path)) for _ in range(args.repeats)]
        same = bool(
            (
                torch.as_tensor(again.generate(args.tokens, SAMPLED)) == torch.as_tensor(expected)
            ).all()
        )
        size = path.stat().st_size
    assert same, "a restored state goes on otherwise"
    return {
        "prompt": args.prompt,
        "prefill_milliseconds": prefill * 1e3,
        "file_mib": size / 2**20,
        "save_milliseconds": save * 1e3,
        "first_load_milliseconds": loads[0] * 1e3,
        "load_milliseconds": statistics.median(loads) * 1e3,
        "tokens_compared": args.tokens,
        "tokens_equal": same,
    }


SUITES = {
    "hit": hit,
    "slide": slide,
    "batch": batch,
    "long": long,
    "memory": memory,
    "trace": trace,
    "state": state,
}
HISTORIES = {
    "hit": [2**10, 2**14, 2**17, 2**20],
    "slide": [2**14, 2**17, 2**20],
    "batch": [2**10, 2**15],
    "trace": [2**14],
}
TRACED = ["tokens", "prefill", "slide"]
PROMPTS = {"long": 10_000_000, "memory": 2**20, "state": 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--histories", type=int, nargs="+", help="tokens before the window")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of one timed call")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--of", choices=TRACED, default="tokens", help="what to trace")
    parser.add_argument("--prompt", type=int, help="tokens read by long, memory and state")
    parser.add_argument("--generated", type=int, default=1000, help="tokens generated by long")
    parser.add_argument(
        "--bandwidth", type=float, default=4.49, help="TB/s the device reads (4.49: an H200)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    args.histories = args.histories or HISTORIES.get(args.suite)
    args.prompt = args.prompt or PROMPTS.get(args.suite)
    finish(environment(), SUITES[args.suite](args), args.json)


if __name__ == "__main__":
    main()
