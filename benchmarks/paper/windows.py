"""What do the two windows buy? Perplexity against training speed.

    python benchmarks/paper/windows.py --data data

Ratios of history_window to a fixed sum of 512, on sequences of 1024 tokens; and history windows of
64 ... 1024 rows beside a fixed generation window of 256, on sequences of 2048.
"""

from __future__ import annotations

from common import Run, arguments, train_runs

SUM, RATIOS = 512, (0.25, 0.382, 0.5, 0.618, 0.75)
GENERATION, HISTORIES = 256, (64, 128, 256, 512, 1024)


def runs() -> list[Run]:
    found = []
    for ratio in RATIOS:
        history = 4 * round(SUM * ratio / 4)
        sizes = {"history_window": history, "generation_window": SUM - history}
        found.append(Run(f"ratio-{ratio}", "1k-512-0.5", model=sizes))
    for history in HISTORIES:
        sizes = {"history_window": history, "generation_window": GENERATION}
        found.append(Run(f"history-{history}", "2k-512-0.5", model=sizes))
    return found


if __name__ == "__main__":
    train_runs(arguments(__doc__, epochs=1.0).parse_args(), "windows", runs())
