"""Makes every picture and table of the repository from the raw figures in benchmarks/results/.

    python benchmarks/report.py

A table stands in its document between `<!-- name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def prose_8m(path: Path) -> None:
    """The shipped model: how it learned beside a Transformer, and what its history is worth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, label in (("transformer", "Transformer"), ("tlinformer", "TLinFormer")):
        lines = (RESULTS / f"prose_8m_{name}.jsonl").read_text().splitlines()
        points = [p for p in map(json.loads, lines) if "valid_perplexity" in p]
        epochs, values = zip(*((p["epoch"], p["valid_perplexity"]) for p in points), strict=True)
        left.plot(epochs, values, marker=".", label=f"{label}, best {min(values):.2f}")
    left.set(xlabel="epoch", ylabel="validation perplexity", title="Learning", yscale="log")
    left.set_yticks([40, 60, 100], ["40", "60", "100"], minor=False)
    left.minorticks_off()
    left.legend()

    rows = load("prose_8m_history")["rows"]
    places = range(len(rows))
    values = [r["perplexity"] for r in rows]
    right.plot(places, values, marker="o", color="tab:orange")
    for place, value in zip(places, values, strict=True):
        right.annotate(
            f"{value:.1f}", (place, value), (0, 8), textcoords="offset points", ha="center"
        )
    right.set_xticks(places, [f"{r['history']:,}" for r in rows])
    right.set(
        xlabel="tokens of history given (trained with up to 768)",
        ylabel="perplexity of the same tokens",
        title="What the history is worth",
    )
    right.margins(y=0.2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def cpu_speed() -> str:
    """Cache hits on the CPU beside their limit and PyTorch."""
    rows = load("cpu_speed")["hits"]
    lines = [
        "| tokens of history | engine, float32 | over its limit | bfloat16 | over its limit "
        "| PyTorch static cache, float32 | engine is faster |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for history in sorted({r["history"] for r in rows}):
        f32, b16, torch = (
            next(r for r in rows if r["history"] == history and r["what"] == what)
            for what in ("engine float32", "engine bfloat16", "PyTorch float32")
        )
        lines.append(
            f"| {history:,} | {f32['milliseconds']:.1f} ms | {f32['times_the_limit']:.2f}x "
            f"| {b16['milliseconds']:.1f} ms | {b16['times_the_limit']:.2f}x "
            f"| {torch['milliseconds']:.1f} ms "
            f"| {torch['milliseconds'] / f32['milliseconds']:.1f}x |"
        )
    return "\n".join(lines)


def cpu_prefill() -> str:
    """Prefills on the CPU: dense products against the machine's own matrix rate."""
    rows = load("cpu_speed")["prefills"]
    lines = [
        "| prompt tokens | engine, float32 | of the sgemm rate | PyTorch | of the sgemm rate |",
        "|---:|---:|---:|---:|---:|",
    ]
    for history in sorted({r["history"] for r in rows}):
        ours, torch = (
            next(r for r in rows if r["history"] == history and r["what"] == what)
            for what in ("engine float32", "PyTorch float32")
        )
        lines.append(
            f"| {history:,} | {ours['seconds']:.2f} s | {ours['share_of_sgemm']:.0%} "
            f"| {torch['seconds']:.2f} s | {torch['share_of_sgemm']:.0%} |"
        )
    return "\n".join(lines)


def cpu_memory() -> str:
    r = load("cpu_memory")
    return (
        f"| measured | figure |\n|---|---:|\n"
        f"| resident growth over {r['generated']:,} generated tokens and {r['slides']} slides "
        f"| {r['resident_growth_bytes']:,} bytes |\n"
        f"| peak while reading {r['prompt']:,} tokens, over plan + weights "
        f"({r['plan_and_weights_mib']:,.0f} MiB) | {r['peak_over_plan_and_weights']:.2f}x |"
    )


def version(name: str) -> str:
    """Which version a table is of: the code may have changed since."""
    of = load(name)["environment"]
    return f"\n\nMeasured on {of['date']}, commit {of['commit']}."


def cuda_hit() -> str:
    """A greedy token on the GPU beside the time its bytes take."""
    rows = [r for r in load("cuda_hit")["hits"] if r["tokens"] == "greedy"]
    lines = [
        "| model | tokens of history | a token | its bytes at full bandwidth |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['model']} | {r['history']:,} | {r['milliseconds']:.3f} ms "
        f"| {r['limit_milliseconds']:.3f} ms |"
        for r in rows
    ]
    return "\n".join(lines) + version("cuda_hit")


def cuda_slide() -> str:
    """Prefills and slides on the GPU."""
    lines = ["| model | tokens of history | prefill | slide |", "|---|---:|---:|---:|"]
    lines += [
        f"| {r['model']} | {r['history']:,} | {r['prefill_milliseconds']:.1f} ms "
        f"| {r['slide_milliseconds']:.2f} ms |"
        for r in load("cuda_slide")["slides"]
    ]
    return "\n".join(lines) + version("cuda_slide")


def cuda_long() -> str:
    """Very long histories on one GPU."""
    r, m = load("cuda_long"), load("cuda_memory")
    return (
        f"| measured | figure |\n|---|---:|\n"
        f"| prefill of {r['prompt']:,} tokens | {r['prefill_seconds']:.2f} s |\n"
        f"| a token after it | {r['hit_milliseconds']:.1f} ms |\n"
        f"| a slide after it | {r['slide_milliseconds']:.0f} ms |\n"
        f"| most device memory | {r['peak_gib']:.1f} GiB |\n"
        f"| the same at {m['prompt']:,} tokens, over cache + weights "
        f"| {m['peak_over_cache_and_weights']:.2f}x |"
    ) + version("cuda_long")


def train_speed() -> str:
    """Training beside the compiled Transformer."""
    lines = [
        "| window | Transformer | TLinFormer | ratio | FLOPs allow |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['shape']} | {r['transformer_tokens_per_second']:,.0f} tokens/s "
        f"| {r['tlinformer_tokens_per_second']:,.0f} tokens/s | {r['ratio']:.2f} "
        f"| {r['flops_allow']:.2f} |"
        for r in load("train_speed")["steps"]
    ]
    return "\n".join(lines) + version("train_speed")


def planner() -> str:
    """How far predictions were from the engine's times, at the worst history of each model."""
    events = ("prefill", "slide", "hit", "token")
    lines = ["| device | model | " + " | ".join(events) + " |", "|---|---|" + "---:|" * len(events)]
    for path in sorted(RESULTS.glob("planner_*.json")):
        result = load(path.stem)
        device = result["environment"].get("gpu", "CPU, one thread")
        for model in (m["model"] for m in result["models"]):
            rows = [r for r in result["rows"] if r["model"] == model]
            worst = (
                max((r["error"] for r in rows if r["event"] == event), key=abs) for event in events
            )
            lines.append(f"| {device} | {model} | " + " | ".join(f"{e:+.0%}" for e in worst) + " |")
    return "\n".join(lines)


def parity() -> str:
    """The shipped model beside the Transformer of equal size."""
    rows = load("prose_8m")["rows"]
    lines = [
        "| architecture | dropout | validation perplexity | bits per byte | best at epoch |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['architecture']} | {r['dropout']} | {r['best_valid_perplexity']:.2f} "
        f"| {r['bits_per_byte']:.3f} | {r['epoch']} |"
        for r in rows
    ]
    return "\n".join(lines)


def demo() -> str:
    """What `make demo` printed, the middle of the text left out."""
    head, text, *summary = (RESULTS / "demo.txt").read_text().strip().split("\n", 2)
    shown = textwrap.fill(f"{text[:420].rsplit(' ', 1)[0].strip()} ...", 90)
    return "\n".join(["```", head, shown, *summary, "```"])


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def fill(document: Path, *tables: Callable[[], str]) -> None:
    text = document.read_text()
    for table in tables:
        pattern = rf"(<!-- {table.__name__} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda m, t=table: m[1] + t() + "\n" + m[2], text, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{document}: no place for the table {table.__name__}")
    document.write_text(text)


if __name__ == "__main__":
    prose_8m(ROOT / "models/tlinformer-prose-8m/training.png")
    fill(ROOT / "models/tlinformer-prose-8m/README.md", parity)
    fill(
        ROOT / "README.md",
        demo,
        planner,
        cpu_speed,
        cpu_prefill,
        cpu_memory,
        cuda_hit,
        cuda_slide,
        cuda_long,
        train_speed,
    )
