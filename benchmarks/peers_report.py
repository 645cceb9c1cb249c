"""The peers' part of docs/benchmarks.md: tables, pictures, and the paper's formulas fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import figures
import numpy as np
from figures import SLIDE, dtype_of, short
from measure import RESULTS
from peers import EnginePeer
from rows import LABELS, ORDER, line, rows, sizes_of, why_not
from sizes import config_of, slide_flops

ABOUT = {
    "paper-figure-9": "The paper's Figure 9",
    "peers": "Prompts, shares of the limits, batches and energy",
}
IMAGES = Path(__file__).resolve().parent.parent / "docs/images"


def peers(folder: Path = RESULTS, images: Path = IMAGES) -> str:
    """Everything that was measured of peers, a section for each device and size."""
    sections = []
    for device in ("cuda", "cpu"):
        for size in sizes_of(device, folder):
            sections += section(size, device, folder, images)
    return "\n".join(sections) or "Nothing has been measured beside a Transformer yet."


def section(size: str, device: str, folder: Path, images: Path) -> list[str]:
    lines = [f"## {figures.title_of(size, device, folder)}", ""]
    points = rows("decode", device, folder, size=size, peer="transformer", batch=1)
    many = len([r for r in points if "ms" in r]) > 2  # else there is nothing to see
    for name, picture in figures.PICTURES.items() if many else ():
        path = images / f"{name}-{size}-{device}.png"
        picture(size, device, path, folder)
        title = figures.title_of(size, device, folder)
        lines += [f"![{ABOUT[name]}: {title}](images/{path.name})", ""]
    tables = (
        ("decode", "ms", "A token between two slides, ms, by tokens of history:"),
        ("prefill", "ms", "A prompt, ms, by its tokens:"),
        ("prefill", "slide_ms", "The token that slides, ms, by tokens of history:"),
        ("cache", "bytes", "State, MiB, by tokens of history:"),
    )
    for suite, field, words in tables:
        if found := matrix(suite, field, size, device, folder):
            lines += [words, "", *found, ""]
    for history in sorted({r["history"] for r in rows("batch", device, folder, size=size)}):
        found = matrix("batch", "tokens_per_second", size, device, folder, history=history)
        words = f"Tokens a second between two slides, after {history:,} tokens each, by sequences:"
        lines += [words, "", *found, ""] if found else []
    if found := longest(size, device, folder):
        lines += ["The longest context of one sequence that fits:", "", *found, ""]
    if found := complexity(size, device, folder):
        lines += [FORMULAS, "", *found, ""]
    return lines + reasons(size, device, folder)


def number(value: float) -> str:
    """Three digits, in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def matrix(suite: str, field: str, size: str, device: str, folder: Path, **where: Any) -> list[str]:
    """Peers down, histories (in `batch`, sequences) across."""
    by = "batch" if suite == "batch" else "history"
    found = rows(suite, device, folder, size=size, dtype=dtype_of(device), **where)
    if by == "history":
        found = [r for r in found if r["batch"] == 1]
    if field == "slide_ms":
        found = [r for r in found if r["peer"] in SLIDE and r["history"]]
    if not any(field in r for r in found):
        return []
    scale = 2**-20 if field == "bytes" else 1
    columns = sorted({r[by] for r in found})
    out = [f"| | {' | '.join(short(max(1, c)) for c in columns)} |"]
    out += ["|---|" + "---:|" * len(columns)]
    for peer in ORDER:
        own = {r[by]: r for r in found if r["peer"] == peer}
        cells = [
            (number(own[c][field] * scale) if field in own[c] else why_not(own[c]))
            if c in own
            else ""
            for c in columns
        ]
        if any("not_installed" not in r for r in own.values()):
            out.append(f"| {LABELS[peer]} | {' | '.join(cells)} |".replace("|  |", "| |"))
    return out


def longest(size: str, device: str, folder: Path) -> list[str]:
    found = {
        r["peer"]: r
        for r in rows("cache", device, folder, size=size, batch=1, dtype=dtype_of(device))
        if "max_context" in r
    }
    lines = ["| | tokens | of memory |", "|---|---:|---:|"]
    for peer, r in found.items():
        tokens = f"{r['max_context']:,}" if r["max_context"] else "any: its state does not grow"
        memory = f"{r['of'] / 2**30:.0f} GiB" if "of" in r else ""
        lines.append(f"| {LABELS[peer]} | {tokens} | {memory} |")
    return lines if found else []


FORMULAS = """The paper's formulas (4) and (5), time = C1 N + C0, fitted by least squares over N
tokens. Predicted is what the counted bytes (hit) or operations (miss) take at the rates that were
measured in the same run: the ratio says how far the slope is from the machine's limit."""


def fit(times: dict[int, float]) -> tuple[float, float, float]:
    """C1, C0 and R² of milliseconds over tokens."""
    n, ms = (np.array(x, dtype=float) for x in (list(times), list(times.values())))
    slope, rest = np.polyfit(n, ms, 1)
    spread = ((ms - ms.mean()) ** 2).sum()
    return slope, rest, 1 - ((ms - slope * n - rest) ** 2).sum() / spread if spread else 1.0


def complexity(size: str, device: str, folder: Path) -> list[str]:
    """Measured and predicted coefficients; histories shorter than Woh are not on the line."""
    config, lines = config_of(size), []
    element = 2 if device == "cuda" else 4
    for peer in SLIDE:
        for what, suite, field in (("hit", "decode", "ms"), ("miss", "prefill", "slide_ms")):
            where = {"size": size, "batch": 1, "dtype": dtype_of(device)}
            times = line(suite, device, peer, field, folder, **where)
            least = config.history_window_at(0)
            times = {n: ms for n, ms in times.items() if n >= least}
            run = (rows(suite, device, folder, peer=peer, **where) or [{}])[-1].get("run", {})
            rates = run.get("ceilings", {})
            if len(times) < 3 or "flops_per_second" not in rates:
                continue
            slope, rest, r2 = fit(times)

            def predicted(n: int, hit: bool = what == "hit", rates: Any = rates) -> float:
                if hit:
                    moved = EnginePeer.token_bytes(config, n, 1, element)
                    return moved / rates["bytes_per_second"] * 1e3
                return slide_flops(config, n) / rates["flops_per_second"] * 1e3

            far = 2**24
            limit = (predicted(far) - predicted(far // 2)) / (far // 2)
            cells = (
                LABELS[peer],
                what,
                f"{slope * 1e6:.3g} ns",
                f"{limit * 1e6:.3g} ns",
                f"{slope / limit:.2f}",
                f"{rest:.3g} ms",
                f"{predicted(far) - limit * far:.3g} ms",
                f"{r2:.5f}",
                f"{len(times)}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    head = ["", "", "C1", "predicted", "ratio", "C0", "predicted", "R²", "points"]
    top = ["| | | " + " | ".join(head[2:]) + " |", "|---|---|" + "---:|" * 7]
    return top + lines if lines else []


def reasons(size: str, device: str, folder: Path) -> list[str]:
    """What was not measured, why, and by which version everything was."""
    said: dict[str, None] = {}
    runs: dict[str, None] = {}
    for suite in ("decode", "prefill", "batch", "cache"):
        for r in rows(suite, device, folder, size=size, dtype=dtype_of(device)):
            runs[f"{r['run']['date']}, commit {r['run']['commit']}"] = None
            for kind in ("skipped", "failed", "not_installed"):
                if kind in r:
                    words = f"{kind.replace('_', ' ')}: {r[kind]}"
                    at = "" if kind == "not_installed" else f" of {r['history']:,} tokens"
                    at += f", {r['batch']} sequences" * (suite == "batch" and at != "")
                    said[f"- {LABELS[r['peer']]}, {suite}{at}: {words}"] = None
    lines = ["Not measured:", "", *said, ""] if said else []
    return [*lines, f"Measured on {'; '.join(sorted(runs))}.", ""]
