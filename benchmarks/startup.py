"""How soon a program has its first token, and how much memory it takes: C++ beside Python.

    cmake -B build && cmake --build build
    python benchmarks/startup.py --generate build/examples/cpp/tlin-generate

Both continue a short prompt with the shipped model. The time runs from the start of the program to
the first byte of text; memory is the most that was resident. Medians over runs that alternate,
after one of each that is not counted: files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import RESULTS, Results

ROOT = RESULTS.parent.parent
MODEL = ROOT / "models/tlinformer-prose-8m"
PROMPT = b"In the beginning"


def resident(pid: int) -> int:
    """The most bytes that were resident, but not of the process that forked this one."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended


def start(command: list[str]) -> tuple[float, float]:
    """Seconds to the first byte of text, and the most bytes resident until the last."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin and process.stdout
    process.stdin.write(PROMPT)
    process.stdin.close()
    first = os.read(process.stdout.fileno(), 1)
    taken, peak = time.perf_counter() - begin, resident(process.pid)
    while os.read(process.stdout.fileno(), 1 << 16):
        peak = max(peak, resident(process.pid))
    if process.wait() != 0 or not first:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return taken, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    generate = ROOT / "build/examples/cpp/tlin-generate"
    parser.add_argument("--generate", type=Path, default=generate, help="the C++ program")
    parser.add_argument("--runs", type=int, default=15, help="of each program")
    parser.add_argument("--json", type=Path, default=RESULTS / "startup-cpu.json")
    args = parser.parse_args()
    common = ["--prompt-file", "-", "--max-new-tokens", "8", "--temperature", "0"]
    programs = {
        "tlin-generate": [str(args.generate), "--model", str(MODEL), *common],
        "tlinformer generate": [
            *(sys.executable, "-m", "tlinformer", "generate", "--device", "cpu"),
            *("--model", str(MODEL)),
            *common,
        ],
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for run in range(args.runs + 1):
        for name, command in programs.items():
            figures = start(command)
            if run > 0:
                seen[name].append(figures)
    results = Results(args.json)
    results.begin(torch.device("cpu"))
    for name, figures in seen.items():
        seconds, peak = (statistics.median(column) for column in zip(*figures, strict=True))
        row = {"suite": "startup", "size": MODEL.name, "peer": name, "history": 0, "batch": 1}
        row |= {"dtype": "bfloat16", "first_byte_seconds": seconds, "resident_bytes": peak}
        results.add(row)


if __name__ == "__main__":
    main()
