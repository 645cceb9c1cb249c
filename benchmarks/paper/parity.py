"""Does TLinFormer learn as well as a Transformer of equal size? (The paper's Table 1.)

python benchmarks/paper/parity.py --data data
python benchmarks/paper/parity.py --data data --only base-1k-seed0 1k-1k-0.5-seed0
"""

from __future__ import annotations

from common import Run, arguments, train_runs

RUNS = ("base-512", "base-1k", "512-512-0.5", "1k-1k-0.5", "1k-512-0.5", "base-2k", "2k-512-0.5")
PAIR, SEEDS = ("base-1k", "1k-1k-0.5"), (1,)  # one more seed, for the spread


def runs() -> list[Run]:
    return [Run(name, name) for name in RUNS] + [Run(n, n, s) for s in SEEDS for n in PAIR]


if __name__ == "__main__":
    train_runs(arguments(__doc__, epochs=1.3).parse_args(), "parity", runs())
