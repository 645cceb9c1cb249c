"""Pictures of the rows: the paper's Figure 9 with its baselines, and the peers.

python benchmarks/report.py    # makes these too
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError:
    raise SystemExit("pictures need matplotlib: pip install matplotlib") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator
from measure import RESULTS
from rows import LABELS, ORDER, line, rows
from sizes import config_of, weight_count

COLOURS = dict(zip(ORDER, plt.get_cmap("tab10").colors, strict=False))
ENGINE = "engine"
SLIDE = (ENGINE, "tlinformer-pytorch")
Lines = dict[int, float]


def short(value: float, _: Any = None) -> str:
    """1024 -> 1K, 9,999,872 -> 10M."""
    base = 1024 if value % 1024 == 0 and value < 2**21 else 1000
    for unit, name in ((base**2, "M"), (base, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def plain(value: float, _: Any = None) -> str:
    """Milliseconds and ratios without powers of ten."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def draw(
    axes: Axes,
    lines: dict[str, Lines],
    title: str,
    y: str,
    log: bool = True,
    points: int = 1,
) -> None:
    """One line a peer over the history; the engine's is the thick one.

    Up to so many `points` are no line.
    """
    for peer, values in lines.items():
        if values:
            style = {"linewidth": 2.4, "zorder": 3} if peer == ENGINE else {"linewidth": 1.3}
            dashes = "--" if peer.startswith("naive") else "-"
            places = [max(1, x) for x in values]
            axes.plot(
                places,
                list(values.values()),
                linestyle="none" if len(values) <= points else dashes,
                marker="o",
                markersize=4,
                color=COLOURS.get(peer, "black"),
                label=LABELS.get(peer, peer),
                **style,
            )
    axes.set(title=title, ylabel=y, xscale="log")
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    known = [x for values in lines.values() for x in values]
    ticks = (1, 2**10, 2**14, 2**17, 2**20, 10**7) if max(known, default=0) > 64 else (1, 4, 16, 64)
    axes.set_xticks(
        [x for x in ticks if 0.9 * min(known, default=0) <= x <= 1.1 * max(known, default=0)]
    )
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 50 * low:  # powers of ten alone would be one or two
            subs = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def over(first: Lines, second: Lines) -> Lines:
    """The quotient where both are known."""
    return {x: first[x] / second[x] for x in first if x in second}


def average(peer: str, hit: Lines, slide: Lines, window: int) -> Lines:
    """A token and its share of the slide that comes once in a window; no history, no slide."""
    if peer not in SLIDE:
        return hit
    return {x: hit[x] + slide.get(x, 0) / window for x in hit if x in slide or not x}


def paper_figure(size: str, device: str, path: Path, folder: Path = RESULTS) -> None:
    """Figure 9 of arXiv 2508.20407 for one size, with strong baselines beside its naive one."""
    value = partial(line, device=device, folder=folder, size=size, dtype=dtype_of(device))
    peers = [p for p in ORDER if value("decode", peer=p, field="ms", batch=1)]
    hit = {p: value("decode", peer=p, field="ms", batch=1) for p in peers}
    miss = {p: value("prefill", peer=p, field="slide_ms", batch=1) for p in peers}
    window = config_of(size).generation_window
    figure, all_axes = plt.subplots(2, 3, figsize=(15, 8.6), layout="constrained")
    a, b, c, d, e, f = all_axes.flat
    draw(a, miss, "a  Cache miss: the token that slides", "ms")
    draw(b, hit, "b  Cache hit: any other token", "ms")
    ratio = {p: over(miss[p], hit[p]) for p in peers if miss[p]}
    draw(c, ratio, "c  A miss, in hits", "miss / hit")
    c.axhline(window, color="black", linewidth=0.8, linestyle=":")
    c.annotate(f"a miss comes once in {window} tokens", (2**10, window), (2, 4), **OFFSET)
    state = {
        p: {x: v / 2**20 for x, v in value("cache", peer=p, field="bytes", batch=1).items()}
        for p in ORDER
    }
    draw(d, state, "d  What is kept of the tokens", "MiB")
    times = {p: over(hit[p], hit[ENGINE]) for p in peers if p != ENGINE}
    draw(e, times, "e  A hit, in hits of the engine", "time / engine's time", points=2)
    e.axhline(1, color="black", linewidth=0.8, linestyle=":")
    draw(
        f,
        {p: average(p, hit[p], miss[p], window) for p in peers},
        "f  A token on average, misses included",
        "ms",
    )
    finish(figure, all_axes.flat, f"{title_of(size, device, folder)}, batch 1", path)


OFFSET = {"textcoords": "offset points", "fontsize": 8}
PROMPT = "tokens of the prompt"


def overview(size: str, device: str, path: Path, folder: Path = RESULTS) -> None:
    """What a visitor asks first: a token, a prompt, the memory, beside what others take."""
    value = partial(line, device=device, folder=folder, size=size, dtype=dtype_of(device), batch=1)
    peers = (ENGINE, "transformer", "gla", "sliding-window", "naive-concatenate")
    panels = (
        ("decode", "ms", "A token between two slides", "ms", 1.0),
        ("prefill", "ms", "Reading a prompt", "ms", 1.0),
        ("cache", "bytes", "Memory of the tokens", "GiB", 2**-30),
    )
    figure, all_axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axes, (suite, field, title, unit, scale) in zip(all_axes, panels, strict=True):
        lines = {
            p: {x: scale * v for x, v in value(suite, peer=p, field=field).items() if x}
            for p in peers
        }
        lines = {p: values for p, values in lines.items() if len(values) > 1}
        draw(axes, lines, title, unit)
        if suite == "prefill":
            axes.set_xlabel(PROMPT)
        times = over(lines["transformer"], lines[ENGINE])
        if times:  # how much the Transformer needs more, where both end
            last = max(times)
            low, high = lines[ENGINE][last], lines["transformer"][last]
            axes.vlines(last, low, high, color="black", linestyles=":", linewidth=0.8)
            axes.annotate(
                f"{times[last]:.3g}x",
                (last, low**0.62 * high**0.38),  # below the middle, where others may be
                (-3, 0),
                ha="right",
                va="center",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
                **OFFSET,
            )
    title = (
        f"{title_of(size, device, folder)}, batch 1, logarithmic; dotted: Transformer over engine"
    )
    finish(figure, all_axes, title, path)


def peers_figure(size: str, device: str, path: Path, folder: Path = RESULTS) -> None:
    """Prefill, throughput, energy and the share of what the machine can do."""
    value = partial(line, device=device, folder=folder, size=size, dtype=dtype_of(device))

    def each(suite: str, field: str, **where: Any) -> dict[str, Lines]:
        return {p: value(suite, peer=p, field=field, **where) for p in ORDER}

    reading = "A token: share of torch's rate of reading"
    multiplying = "A prompt: share of torch's rate of products"
    panels = [
        (each("prefill", "ms", batch=1), "Reading a prompt", "ms"),
        (percent(each("decode", "share", batch=1)), reading, "%"),
        (percent(each("prefill", "share", batch=1)), multiplying, "%"),
    ]
    lengths = sorted({r["history"] for r in rows("batch", device, folder, size=size)})
    for history in lengths[-2:]:
        title = f"Sequences at once, {short(history)} tokens of history each"
        lines = each("batch", "tokens_per_second", history=history)
        panels.append((lines, title, "tokens a second"))
    panels.append((each("decode", "millijoules", batch=1), "Energy of the GPU for a token", "mJ"))
    panels = [panel for panel in panels if any(panel[0].values())]
    columns = 2 if len(panels) in (2, 4) else 3
    height = math.ceil(len(panels) / columns)
    figure, all_axes = plt.subplots(
        height, columns, figsize=(5 * columns, 4.3 * height), layout="constrained", squeeze=False
    )
    for axes, (lines, title, unit) in zip(all_axes.flat, panels, strict=False):
        draw(axes, lines, title, unit, log=unit != "%")
        if unit == "tokens a second":
            axes.set_xlabel("sequences")
        if "prompt" in title:
            axes.set_xlabel(PROMPT)
    finish(figure, all_axes.flat, title_of(size, device, folder), path)


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

    rows = json.loads((RESULTS / "prose_8m_history.json").read_text())["rows"]
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


def percent(lines: dict[str, Lines]) -> dict[str, Lines]:
    return {p: {x: 100 * v for x, v in values.items()} for p, values in lines.items()}


def dtype_of(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def title_of(size: str, device: str, folder: Path) -> str:
    run = rows("decode", device, folder, size=size)[-1]["run"]
    where = run.get("gpu") or f"{run['threads']} CPU cores"
    config = config_of(size)
    millions = f"{weight_count(config) / 1e6:.0f}M" if size == "d512" else size.upper()
    model = f"{millions} parameters" + f", heads of {config.head_dim}" * (size == "d512")
    return f"{model}, {dtype_of(device)}, one {where}".replace("one 2", "2")


def finish(figure: Any, all_axes: Any, title: str, path: Path) -> None:
    """One legend for all; panels without a line go."""
    named: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        if not handles:
            axes.set_visible(False)
        named |= dict(zip(labels, handles, strict=True))
        if not axes.get_xlabel():
            axes.set_xlabel("tokens of history")
    ordered = [LABELS[p] for p in ORDER if LABELS[p] in named]
    figure.legend(
        [named[x] for x in ordered], ordered, loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PICTURES: dict[str, Callable[..., None]] = {"paper-figure-9": paper_figure, "peers": peers_figure}
