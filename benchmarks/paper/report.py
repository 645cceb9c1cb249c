"""Tables and plots of the paper's experiments, from the raw figures in benchmarks/results/paper.

    python benchmarks/paper/report.py

Tables go into the README.md beside this file, plots beside it; what has no results is left out.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
Results = list[dict[str, Any]]
# Perplexities of the paper's Table 1, from which its gaps follow.
PAPER = {
    "base-512": 21.6,
    "base-1k": 22.5,
    "512-512-0.5": 21.9,
    "1k-1k-0.5": 22.7,
    "1k-512-0.5": 23.0,
    "base-2k": 29.5,
    "2k-512-0.5": 30.9,
}

SWEEPS = {
    "ratio": "history window's share of 512 rows",
    "history": "history window beside 256 rows",
}
PLAIN = "{x:,g}"  # a number on a logarithmic axis


def base_of(run: str) -> str:
    """The Transformer that a run is compared with."""
    return f"base-{run.split('-')[0]}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float]) -> str:
    """Half the range, or nothing for a single value."""
    return f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""


def parity(results: Results) -> str:
    perplexity = {(r["run"], r["seed"]): r["final"]["valid_perplexity"] for r in results}
    rows = []
    for run in [name for name in PAPER if any(name == done for done, _ in perplexity)]:
        own = {seed: value for (name, seed), value in perplexity.items() if name == run}
        gaps = [
            100 * (value / perplexity[base_of(run), seed] - 1)
            for seed, value in own.items()
            if not run.startswith("base") and (base_of(run), seed) in perplexity
        ]
        paper = 100 * (PAPER[run] / PAPER[base_of(run)] - 1) if not run.startswith("base") else None
        speeds = [r["tokens_per_second"] for r in results if r["run"] == run]
        rows.append(
            [
                run,
                f"{statistics.mean(own.values()):.2f}{spread(list(own.values()))}",
                str(len(own)),
                f"{statistics.mean(gaps):+.1f}%{spread(gaps)}" if gaps else "",
                f"{paper:+.1f}%" if paper is not None else "",
                f"{statistics.median(speeds):,.0f}",
            ]
        )
    return table(["run", "perplexity", "seeds", "gap", "paper's gap", "tokens/s"], rows)


def parity_plot(results: Results, figure: Any) -> None:
    axes = figure.subplots()
    for number, run in enumerate(PAPER):
        for result in (r for r in results if r["run"] == run):
            points = [p for p in result["curve"] if "valid_perplexity" in p]
            axes.plot(
                [p["epoch"] for p in points],
                [p["valid_perplexity"] for p in points],
                color=f"C{number}",
                label=run if result["seed"] == 0 else None,
            )
    axes.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter(PLAIN)
    axes.legend()


def knee(points: list[tuple[float, float]]) -> int:
    """Which (tokens/s, perplexity) lies farthest above the line from the fastest to the best."""
    speeds, losses = zip(*points, strict=True)

    def scaled(value: float, values: tuple[float, ...]) -> float:
        return (value - min(values)) / ((max(values) - min(values)) or 1)

    at = [(scaled(s, speeds), 1 - scaled(p, losses)) for s, p in points]
    (x0, y0), (x1, y1) = max(at), max(at, key=lambda p: (p[1], p[0]))
    above = [(y - y0) * (x0 - x1) + (x - x0) * (y1 - y0) for x, y in at]
    return above.index(max(above))


def series(results: Results) -> dict[str, Results]:
    """The runs of each sweep, in its order."""
    sweeps: dict[str, Results] = defaultdict(list)
    for result in sorted(results, key=lambda r: float(r["run"].split("-")[1])):
        sweeps[result["run"].split("-")[0]].append(result)
    return dict(sorted(sweeps.items(), reverse=True))


def windows(results: Results) -> str:
    rows = []
    for runs in series(results).values():
        points = [(r["tokens_per_second"], r["final"]["valid_perplexity"]) for r in runs]
        chosen = knee(points)
        for number, (run, (speed, perplexity)) in enumerate(zip(runs, points, strict=True)):
            model = run["settings"]["model"]
            sizes = f"{model['history_window']} + {model['generation_window']}"
            mark = "knee" if number == chosen and len(runs) > 2 else ""
            rows.append([run["run"], sizes, f"{perplexity:.2f}", f"{speed:,.0f}", mark])
    return table(["run", "history + generation window", "perplexity", "tokens/s", ""], rows)


def windows_plot(results: Results, figure: Any) -> None:
    sweeps = series(results)
    for (sweep, runs), axes in zip(
        sweeps.items(), figure.subplots(1, len(sweeps), squeeze=False)[0], strict=True
    ):
        points = [(r["tokens_per_second"] / 1000, r["final"]["valid_perplexity"]) for r in runs]
        axes.plot(*zip(*points, strict=True), marker="o")
        for run, point in zip(runs, points, strict=True):
            words = run["run"].split("-")[1]
            axes.annotate(words, point, xytext=(5, 5), textcoords="offset points")
        if len(runs) > 2:
            axes.scatter(*points[knee(points)], s=160, facecolors="none", edgecolors="k")
        axes.margins(0.12)
        axes.set(xlabel="1000 tokens/s in training", ylabel="perplexity", title=SWEEPS[sweep])


def history(results: Results) -> str:
    header = ["model", *(f"{row['history']:,}" for row in results[0]["rows"])]
    rows = [[r["model"], *(f"{row['perplexity']:.2f}" for row in r["rows"])] for r in results]
    return table(header, rows)


def history_plot(results: Results, figure: Any) -> None:
    axes = figure.subplots()
    for r in results:
        axes.plot([row["perplexity"] for row in r["rows"]], marker="o", label=r["model"])
    labels = [f"{row['history']:,}" for row in results[0]["rows"]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel="tokens of history given", ylabel="perplexity of the same tokens", yscale="log")
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter(PLAIN)
    axes.legend()


def positions(results: Results) -> str:
    losses = {r["model"]: r["loss_by_position"] for r in results}
    rows = []
    for model, own in losses.items():
        if base := losses.get(f"{base_of(model)}-{model.rpartition('-')[2]}"):
            rows.append([model, *(f"{a - b:+.3f}" for a, b in zip(own, base, strict=True))])
    bins = len(results[0]["loss_by_position"])
    return table(["model", *(f"part {b + 1} of {bins}" for b in range(bins))], rows)


def by_size(results: Results) -> Results:
    """The Transformer, then the others from the smallest history window on."""
    return sorted(results, key=lambda r: int(f"0{r['run'].partition('-')[2].partition('-')[0]}"))


def needle(results: Results) -> str:
    lengths = sorted({row["length"] for r in results for row in r["rows"]})
    rows = []
    for r in by_size(results):
        found = []
        for length in lengths:
            parts = [row for row in r["rows"] if row["length"] == length]
            right = sum(row["accuracy"] * row["queries"] for row in parts)
            found.append(f"{right / sum(row['queries'] for row in parts):.1%}")
        rows.append([r["run"], *found])
    trained = max(results[0]["trained_lengths"])
    header = [f"{n:,} tokens" + (" (untrained)" if n > trained else "") for n in lengths]
    return table(["model", *header], rows)


def needle_plot(results: Results, figure: Any) -> None:
    axes = figure.subplots()
    for r in by_size(results):
        rows = sorted(r["rows"], key=lambda row: row["distance"])
        axes.plot(
            [row["distance"] for row in rows],
            [row["accuracy"] for row in rows],
            marker=".",
            label=r["run"],
        )
    axes.axhline(results[0]["chance"], color="gray", linestyle=":")
    axes.set(xlabel="distance in tokens", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.legend()


TABLES: dict[str, tuple[Callable[[Results], str], ...]] = {
    "parity": (parity,),
    "windows": (windows,),
    "history": (history, positions),
    "needle": (needle,),
}
PLOTS = {
    "parity": parity_plot,
    "windows": windows_plot,
    "history": history_plot,
    "needle": needle_plot,
}


def plot(experiment: str, results: Results, folder: Path) -> None:
    figure = plt.figure(figsize=(9 if experiment == "windows" else 6, 4), layout="constrained")
    PLOTS[experiment](results, figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / f"{experiment}.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE.parent / "results/paper")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    args = parser.parse_args()
    text = args.readme.read_text()
    for experiment, tables in TABLES.items():
        paths = sorted((args.results / experiment).glob("*.json"))
        results = [json.loads(path.read_text()) for path in paths]
        if len({r["smoke"] for r in results}) > 1:
            raise SystemExit(f"{args.results / experiment} mixes real results with --smoke's")
        if results:
            plot(experiment, results, args.readme.parent)
        for number, make in enumerate(tables):
            body = make(results) if results else "No results yet."
            if results and number == 0:
                body += f"\n\n![{experiment}]({experiment}.png)"
            pattern = rf"(<!-- {make.__name__} -->\n).*?(<!-- end -->)"
            text, count = re.subn(
                pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S
            )
            if count != 1:
                raise SystemExit(f"{args.readme}: no place for the table {make.__name__}")
    args.readme.write_text(text)


if __name__ == "__main__":
    main()
