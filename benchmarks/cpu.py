"""The CPU engine beside its limits and a PyTorch static-cache implementation, in one run.

    python benchmarks/cpu.py speed  --json benchmarks/results/cpu_speed.json
    python benchmarks/cpu.py memory --json benchmarks/results/cpu_memory.json

`speed` prints, for the paper's 41M model, the time of a cache hit over the time its bytes take at
the read bandwidth measured in the same run, and the rate of a prefill's dense products over the
matrix-product rate measured in the same run. `memory` prints how much the resident set grows over
5,000 generated tokens and at the peak of a prefill of 100,000. Absolute times mean little on a
shared machine; the ratios are the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_peer import StaticCacheModel

import tlinformer
from tlinformer import Engine, SamplingParams, TLinFormerConfig, TLinFormerForCausalLM
from tlinformer.roofline import matrix_rate, read_bandwidth

PAPER_41M = {"vocab_size": 50257, "hidden_size": 432, "num_attention_heads": 12}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def hit_bytes(model: TLinFormerForCausalLM, element: int, history: int, fill: int) -> int:
    """Weights and cache rows that one token has to read (paper §3.3)."""
    c = model.config
    z = min(history, c.history_window_at(history))
    rows = c.num_blocks * (history + (c.block_depth - 1) * z + c.block_depth * fill)
    weights = sum(p.numel() for p in model.parameters())
    return element * (weights + 2 * c.kv_heads * c.head_dim * rows)


def dense_flops(config: TLinFormerConfig, history: int, window: int) -> float:
    """FLOPs of the products with weight matrices in a prefill, each needed one once.

    Attention's own products are not counted.
    """
    d, q, kv = config.hidden_size, config.hidden_size, config.kv_heads * config.head_dim
    finish = d * d + 3 * d * config.mlp_size
    blocks, depth = config.num_blocks, config.block_depth
    z = min(history, config.history_window_at(history))
    macs = history * (blocks * d * 2 * kv + (blocks - 1) * (d * q + finish))
    macs += z * blocks * (d * q + finish + (depth - 2) * (d * (q + 2 * kv) + finish) + d * 2 * kv)
    macs += window * blocks * depth * (d * (q + 2 * kv) + finish) + d * config.vocab_size
    return 2.0 * macs


def environment() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line for line in lines if "model name" in line]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "instruction_set": tlinformer._C.instruction_set(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def speed(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    config = TLinFormerConfig(**PAPER_41M)
    model = TLinFormerForCausalLM(config).eval()
    hits, prefills = [], []
    large = torch.rand(2**27)
    for history in args.histories:
        ids = torch.randint(config.vocab_size, (1, history + 1))
        room = history + 2 * args.tokens
        runners: dict[str, Any] = {
            "engine float32": Engine(model, max_context=room),
            "engine bfloat16": Engine(model, max_context=room, dtype=torch.bfloat16),
            "PyTorch float32": StaticCacheModel(model, room),
        }
        steps: dict[str, list[float]] = {name: [] for name in runners}
        for name, runner in runners.items():
            prompt = ids if isinstance(runner, Engine) else ids[0]
            rate, took = 0.0, float("inf")
            for _ in range(5):  # alternating, the best of each
                rate = max(rate, matrix_rate())
                took = min(took, seconds(lambda r=runner, p=prompt: r.prefill(p)))
            flops = dense_flops(config, history, 1)
            prefills.append(
                {
                    "what": name,
                    "history": history,
                    "seconds": took,
                    "dense_gflop": flops / 1e9,
                    "sgemm_gflops": rate / 1e9,
                    "share_of_sgemm": flops / took / rate,
                }
            )
        bandwidth = []
        for i in range(args.tokens):  # interleaved: what disturbs the machine disturbs all
            if i % 5 == 0:
                bandwidth.append(read_bandwidth(large))
            token = ids[:, i]
            for name, runner in runners.items():
                t = token if isinstance(runner, Engine) else token[0]
                steps[name].append(seconds(lambda r=runner, t=t: r.step(t)))
        for name, times in steps.items():
            element = 2 if "bfloat16" in name else 4
            touched = hit_bytes(model, element, history, args.tokens // 2)
            times = sorted(times[3:])
            median = statistics.median(times)
            hits.append(
                {
                    "what": name,
                    "history": history,
                    "milliseconds": median * 1e3,
                    "p10": times[len(times) // 10] * 1e3,
                    "p90": times[len(times) * 9 // 10] * 1e3,
                    "megabytes": touched / 1e6,
                    "read_gb_per_s": statistics.median(bandwidth) / 1e9,
                    "times_the_limit": median * statistics.median(bandwidth) / touched,
                }
            )
    return {"hits": hits, "prefills": prefills}


def resident() -> int:
    """Bytes in memory, counted page by page: VmRSS is off by some hundred KB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Rss in /proc/self/smaps_rollup")


def memory(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    config = TLinFormerConfig(**PAPER_41M)
    model = TLinFormerForCausalLM(config).eval()
    weights = sum(p.numel() for p in model.parameters()) * 4

    engine = Engine(model, max_context=1024 + args.generated)
    engine.prefill(torch.randint(config.vocab_size, (1, 1024)))
    sizes: list[int] = []
    sizes_at = {300, args.generated - 1}  # by then every code path ran once, a slide too
    counter = itertools.count()
    engine.generate(
        args.generated,
        SamplingParams(temperature=1.0),
        on_token=lambda *_: sizes.append(resident()) if next(counter) in sizes_at else None,
    )
    slides = engine.stats.slides - 1
    grown = sizes[1] - sizes[0]
    del engine

    base = resident() - weights
    engine = Engine(model, max_context=args.prompt)
    peak = 0

    def watch(share: float) -> None:
        nonlocal peak
        peak = max(peak, resident())

    engine.prefill(torch.randint(config.vocab_size, (1, args.prompt)), progress=watch)
    planned = engine.plan.total_bytes + weights
    return {
        "generated": args.generated - 301,
        "slides": slides,
        "resident_growth_bytes": grown,
        "prompt": args.prompt,
        "plan_and_weights_mib": planned / 2**20,
        "peak_mib": (peak - base) / 2**20,
        "peak_over_plan_and_weights": (peak - base) / planned,
    }


def show(result: dict[str, Any]) -> None:
    for name, value in result.items():
        if isinstance(value, list):
            print(f"\n{name}")
            columns = list(value[0])
            rows = [columns] + [
                [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
                for row in value
            ]
            widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
            for row in rows:
                print("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
        else:
            print(f"{name}: {value}")


def finish(environment: dict[str, Any], figures: dict[str, Any], path: Path | None) -> None:
    """Prints a suite's figures, and writes them to `path` if there is one."""
    command = " ".join(["python", *sys.argv])
    result = {"command": command, "environment": environment, **figures}
    show(result)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suite", choices=["speed", "memory"])
    parser.add_argument("--json", type=Path, help="also write the raw figures here")
    parser.add_argument("--histories", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=100, help="hits timed at each history")
    parser.add_argument("--generated", type=int, default=5300, help="tokens of the growth test")
    parser.add_argument("--prompt", type=int, default=100_000, help="tokens of the peak test")
    args = parser.parse_args()
    finish(environment(), {"speed": speed, "memory": memory}[args.suite](args), args.json)


if __name__ == "__main__":
    main()
