"""Fails when a CUDA kernel spills registers without an explanation.

    python tests/check_spills.py LOG

LOG is what `nvcc -Xptxas -v` printed, of one build or of several in a row: the last word on a
kernel counts. Prints how many registers the kernels use, and every spill.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

# Part of a kernel's mangled name, with the architecture if it matters -> why its spills do no harm.
EXPLAINED: dict[str, str] = {
    "tlin_history_attention Li2E": "a third warp of a scheduler leaves 168 registers for two heads",
    "tlin_prefill_attention": "values kept across the loop over keys: stored before, read after it",
    "tlin_resident_attention": "places kept across the loop over keys",
    "tlin_ranged_attention Li96E": "values kept across the loop over keys",
    "tlin_ranged_attention Li128E": "32 rows of 128 fill the registers: some words beside 128 mma",
    "tlin_batch_attention HeadsE1": "a word, read once: other blocks have most of the registers",
    "tlin_sample_step": "sorting keys of the general path; greedy tokens never come there",
}


class Kernel(NamedTuple):
    name: str  # mangled
    architecture: str
    registers: int
    spill_bytes: int  # stored and loaded

    @property
    def explanation(self) -> str | None:
        whole = f"{self.name} {self.architecture}"
        found = (why for part, why in EXPLAINED.items() if all(p in whole for p in part.split()))
        return next(found, None)


def kernels_of(log: str) -> list[Kernel]:
    """Every kernel named in the log, once for each architecture."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'"
        r"(?:(?!Compiling entry function).)*?"
        r"Function properties for (?P=name)\n.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    # Anonymous namespaces are named after the file and hashes that change with it.
    log = re.sub(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?)_[0-9a-f]{8}(?=\d)", r"_GLOBAL__N__\1", log)
    found = {}
    for match in pattern.finditer(log):
        spill = int(match["stores"]) + int(match["loads"])
        kernel = Kernel(match["name"], match["architecture"], int(match["registers"]), spill)
        found[kernel.name, kernel.architecture] = kernel
    return list(found.values())


def main(path: str) -> int:
    kernels = kernels_of(Path(path).read_text(encoding="utf-8", errors="replace"))
    if not kernels:
        print(f"{path}: names no kernel; it must be what nvcc -Xptxas -v printed")
        return 1
    bad = 0
    for kernel in kernels:
        if kernel.spill_bytes:
            bad += kernel.explanation is None
            words = kernel.explanation or "NOT EXPLAINED in tests/check_spills.py"
            name = kernel.name[max(0, kernel.name.find("tlin_")) :]
            print(f"{name} ({kernel.architecture}): {kernel.spill_bytes} bytes: {words}")
    most = max(kernel.registers for kernel in kernels)
    print(f"{len(kernels)} kernels, at most {most} registers; {bad} spill without explanation")
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1]))
