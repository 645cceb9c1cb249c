"""Makes every picture and table of the repository from the raw figures in benchmarks/results/.

    python benchmarks/report.py

A table stands in its document between `<!-- name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import figures
import peers_report
from rows import line, rows
from sizes import config_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def table(*lines: list[str], words: int = 1) -> str:
    """Markdown of a head and its rows; all columns but the first `words` hold numbers."""
    head, *rest = lines
    rule = "|---" * words + "|---:" * (len(head) - words) + "|"
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rest))
    return "\n".join([first, rule, *others])


def cpu_speed() -> str:
    """Cache hits on the CPU beside their limit and PyTorch."""
    ways = (("engine", "float32"), ("engine", "bfloat16"), ("tlinformer-pytorch", "float32"))
    found = [
        {r["history"]: r for r in rows("decode", "cpu", size="41m", peer=p, dtype=d, batch=1)}
        for p, d in ways
    ]
    head = ["tokens of history", "engine, float32", "over its limit", "bfloat16"]
    head += ["over its limit", "TLinFormer in PyTorch, float32", "engine is faster"]
    lines = []
    for history in sorted(set.intersection(*map(set, found))):
        f32, b16, torch = (by[history] for by in found)
        cells = [f"{history:,}"]
        for r in (f32, b16):
            cells += [f"{r['ms']:.1f} ms", f"{1 / r['share']:.2f}x"]
        lines.append([*cells, f"{torch['ms']:.1f} ms", f"{torch['ms'] / f32['ms']:.1f}x"])
    return table(head, *lines, words=0)


def cpu_prefill() -> str:
    """Prefills on the CPU against the machine's own matrix rate."""
    ours, torch = (
        {r["history"]: r for r in rows("prefill", "cpu", size="41m", peer=p, dtype="float32")}
        for p in ("engine", "tlinformer-pytorch")
    )
    lines = [
        [f"{n:,}"]
        + [x for r in (ours[n], torch[n]) for x in (f"{r['ms'] / 1e3:.2f} s", f"{r['share']:.0%}")]
        for n in sorted(set(ours) & set(torch))
    ]
    head = [
        "prompt tokens",
        "engine, float32",
        "of the sgemm rate",
        "TLinFormer in PyTorch",
        "of the sgemm rate",
    ]
    return table(head, *lines, words=0)


def cpu_memory() -> str:
    r = rows("memory", "cpu", size="41m")[-1]
    planned = r["peak_bytes"] / r["peak_over_plan_and_weights"] / 2**20
    return table(
        ["measured", "figure"],
        [
            f"resident growth over {r['generated']:,} generated tokens and {r['slides']} slides",
            f"{r['growth_bytes']:,} bytes",
        ],
        [
            f"peak while reading {r['history']:,} tokens, over plan + weights ({planned:,.0f} MiB)",
            f"{r['peak_over_plan_and_weights']:.2f}x",
        ],
    )


def version(runs: Iterable[dict[str, Any]]) -> str:
    """Which versions a table is of: the code may have changed since."""
    found = sorted({f"{of['date']}, commit {of['commit']}" for of in runs})
    return f"\n\nMeasured on {'; '.join(found)}."


LONG = 2**21  # tokens from which on a history has a table of its own


def cuda_hit() -> str:
    """A greedy token on the GPU beside the time its bytes take, and with its share of slides."""
    found = [r for r in rows("decode", "cuda", peer="engine", batch=1) if "ms" in r]
    found = [r for r in found if r["history"] < LONG]
    head = ["model", "tokens of history", "a token", "its bytes, at the rate of torch's sum"]
    lines, runs = [], [r["run"] for r in found]
    for r in sorted(found, key=by_size):
        whole, of = with_slides(r["size"], "engine").get(r["history"], (None, []))
        times = (f"{ms:.3f} ms" if ms else "" for ms in (r["ms"], r["limit_ms"], whole))
        lines.append([r["size"].upper(), f"{r['history']:,}", *times])
        runs += of
    return table([*head, "with its share of slides"], *lines) + version(runs)


def state() -> str:
    """The file of a long text's state."""
    (row,) = load("state-cuda")["rows"]
    lines = [
        ["tokens read", f"{row['history']:,}"],
        ["reading them", f"{row['prefill_seconds'] * 1e3:.0f} ms"],
        ["file", f"{row['file_bytes'] / 2**30:.2f} GiB"],
        ["writing it", f"{row['save_seconds']:.1f} s"],
        ["restoring it", f"{row['load_seconds']:.1f} s"],
        ["tokens then generated, equal to those without a file", f"{row['tokens_equal']}"],
    ]
    return table(["measured", "figure"], *lines) + version(load("state-cuda")["runs"])


def startup() -> str:
    """Programs from their start to their first text."""
    lines = [
        [
            f"`{row['peer']}`",
            f"{row['first_byte_seconds']:.2f} s",
            f"{row['resident_bytes'] / 2**20:.0f} MiB",
        ]
        for row in load("startup-cpu")["rows"]
    ]
    return table(["program", "first text after", "most resident memory"], *lines)


def by_size(row: dict[str, Any]) -> tuple[int, int]:
    return ("tiny", "41m", "d512", "1.3b", "7b").index(row["size"]), row["history"]


def size_of(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def with_slides(size: str, peer: str) -> dict[int, tuple[float, list[dict[str, Any]]]]:
    """By history, where its slide is known: a token on average, and the runs that timed slides."""
    found = [r for r in rows("prefill", "cuda", size=size, peer=peer, batch=1) if "slide_ms" in r]
    hit = line("decode", "cuda", peer, "ms", size=size, batch=1)
    slide = {r["history"]: r["slide_ms"] for r in found}
    times = figures.average(peer, hit, slide, config_of(size).generation_window)
    return {n: (ms, [r["run"] for r in found if r["history"] == n]) for n, ms in times.items()}


def glance() -> str:
    """The engine and others at a glance, where each metric was last measured of the Transformer."""
    peers = ("engine", "transformer", "gla", "sliding-window", "naive-concatenate")
    lines, runs = [["", *(peers_report.LABELS[p] for p in peers)]], []
    for size, suite, field, words in (
        ("41m", "decode", "ms", "a token after {:,} tokens, slides included"),
        ("41m", "prefill", "ms", "reading a prompt of {:,} tokens"),
        ("41m", "cache", "bytes", "memory of {:,} tokens"),
        ("7b", "decode", "ms", "7B parameters: a token after {:,} tokens, slides included"),
    ):
        found = [r for r in rows(suite, "cuda", size=size, batch=1) if field in r]
        at = max(r["history"] for r in found if r["peer"] == "transformer" and r["history"] < LONG)
        own = {r["peer"]: r for r in found if r["history"] == at}
        cells = []
        for peer in peers:
            value = own[peer][field] if peer in own else None
            if value and suite == "decode":
                value, of = with_slides(size, peer).get(at, (None, []))
                runs += of
            cells.append(
                "" if value is None else size_of(value) if field == "bytes" else f"{value:.3g} ms"
            )
        runs += [own[p]["run"] for p in peers if p in own]
        lines.append([words.format(at), *cells])
    return table(*lines) + version(runs)


def cuda_slide() -> str:
    """Prefills and slides on the GPU."""
    found = [r for r in rows("prefill", "cuda", peer="engine", batch=1) if "slide_ms" in r]
    found = [r for r in found if r["history"] < LONG]
    lines = [
        [r["size"].upper(), f"{r['history']:,}", f"{r['ms']:.1f} ms", f"{r['slide_ms']:.2f} ms"]
        for r in sorted(found, key=by_size)
    ]
    head = ["model", "tokens of history", "prefill", "slide"]
    return table(head, *lines) + version(r["run"] for r in found)


def cuda_long() -> str:
    """Very long histories on one GPU."""

    def longest(suite: str) -> dict[str, Any]:
        return max(rows(suite, "cuda", size="41m", peer="engine"), key=lambda r: r["history"])

    hit, prompt, memory = longest("decode"), longest("prefill"), longest("memory")
    lines = [
        [f"prefill of {prompt['history']:,} tokens", f"{prompt['ms'] / 1e3:.2f} s"],
        ["a token after it", f"{hit['ms']:.1f} ms"],
        ["a slide after it", f"{prompt['slide_ms']:.0f} ms"],
        ["most device memory", f"{memory['peak_bytes'] / 2**30:.1f} GiB"],
    ]
    for r in rows("memory", "cuda", size="41m"):
        words = f"the same at {r['history']:,} tokens, over cache + weights"
        lines.append([words, f"{r['peak_over_cache_and_weights']:.2f}x"])
    taken = version(r["run"] for r in (hit, prompt, memory))
    return table(["measured", "figure"], *lines) + taken


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
    return "\n".join(lines) + version([load("train_speed")["environment"]])


def planner() -> str:
    """How far predictions were from the engine's times, at the worst history of each model."""
    events = ("prefill", "slide", "hit", "token")
    lines = ["| device | model | " + " | ".join(events) + " |", "|---|---|" + "---:|" * len(events)]
    runs: list[dict[str, Any]] = []
    for path in sorted(RESULTS.glob("planner_*.json")):
        for model in load(path.stem)["models"]:
            device = model["environment"].get("gpu", "CPU, one thread")
            worst = (
                max((r["error"] for r in model["rows"] if r["event"] == event), key=abs)
                for event in events
            )
            errors = " | ".join(f"{error:+.0%}" for error in worst)
            lines.append(f"| {device} | {model['model']} | {errors} |")
            runs.append(model["environment"])
    return "\n".join(lines) + version(runs)


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


# The tables of each document.
TABLES: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (glance, demo, cuda_hit, cuda_slide),
    "docs/benchmarks.md": (cuda_long, cpu_speed, cpu_prefill, cpu_memory, peers_report.peers),
    "docs/embedding.md": (startup,),
    "docs/training.md": (train_speed,),
    "docs/using.md": (state, planner),
    "models/tlinformer-prose-8m/README.md": (parity,),
}


def filled(name: str) -> str:
    """A document with its tables made anew."""
    text = (ROOT / name).read_text()
    for table in TABLES[name]:
        pattern = rf"(<!-- {table.__name__} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda m, t=table: m[1] + t() + "\n" + m[2], text, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{name}: no place for the table {table.__name__}")
    return text


if __name__ == "__main__":
    figures.prose_8m(ROOT / "models/tlinformer-prose-8m/training.png")
    figures.overview("41m", "cuda", peers_report.IMAGES / "overview-41m-cuda.png")
    for document in TABLES:
        text, before = filled(document), (ROOT / document).read_text()
        (ROOT / document).write_text(text)
        print(f"{document}: {'the same tables' if text == before else 'new tables'}")
    print("pictures: docs/images, models/tlinformer-prose-8m/training.png")
