"""How everything is measured: clocks, ceilings, time with cold caches, energy; a file that grows.

A file holds `runs` (a command, what it ran on, the ceilings measured then) and `rows`; a row names
its run. It is written after each row, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tlinformer
from tlinformer.roofline import measure_ceilings, seconds
from tlinformer.terminal import format_bytes

RESULTS = Path(__file__).resolve().parent / "results"
KEY = ("suite", "size", "peer", "history", "batch", "dtype", "traced")
SETTLED = ("ms", "bytes", "skipped")  # a row with one of these is not measured again
FLUSH = 2**28  # bytes: more than twice any L2
PACKAGES = ("triton", "fla-core", "flash-linear-attention", "mamba-ssm", "flashinfer-python")
# What is printed of a row, if it is there; the file has all of it.
FIGURES = {
    "not_installed": "not installed: {not_installed}",
    "skipped": "skipped: {skipped}",
    "failed": "failed: {failed}",
    "ms": "{ms:,.3f} ms",
    "p90": "({p10:,.3f} to {p90:,.3f})",
    "share": "{share:.1%} of the ceiling",
    "slide_ms": "slide {slide_ms:,.3f} ms",
    "tokens_per_second": "{tokens_per_second:,.0f} tokens/s",
    "millijoules": "{millijoules:,.3f} mJ a token",
    "bytes": "{bytes}",
    "max_context": "at most {max_context:,} tokens",
    "peak_bytes": "peak {peak_bytes}",
    "growth_bytes": "growth {growth_bytes}",
    "device_microseconds": "{traced}: {device_microseconds:,.0f} us of the device",
    "prefill_seconds": "read in {prefill_seconds:.3f} s",
    "file_bytes": "a file of {file_bytes}",
    "save_seconds": "written in {save_seconds:.3f} s",
    "load_seconds": "restored in {load_seconds:.3f} s",
    "first_byte_seconds": "first byte after {first_byte_seconds:.3f} s",
    "resident_bytes": "resident {resident_bytes}",
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


def line(row: dict[str, Any]) -> str:
    """A row as people read it."""
    place = "{size:5} {peer:18} {history:>10,} tokens  batch {batch:<3}".format_map(row)
    sizes = {k: format_bytes(v) for k, v in row.items() if k.endswith("bytes")}
    found = (text.format_map(row | sizes) for k, text in FIGURES.items() if row.get(k) is not None)
    return "  ".join([place, *found])


def _output(*command: str) -> str:
    folder = RESULTS.parent.parent
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()
    except FileNotFoundError:
        return ""


def _gpu_now() -> dict[str, str]:
    """Clocks, power and temperature at this moment, with their units."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    values = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return dict(
        zip(fields.split(","), values.splitlines()[0].split(", "), strict=False) if values else ()
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line for line in lines if "model name" in line]
    return names[0].split(":")[1].strip() if names else platform.processor()


@cache
def version() -> str:
    """The last commit that changed what is measured; with a + if files have changed since."""
    code = ("--", "csrc", "tlinformer", "benchmarks/*.py")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", *code)
    return _output("git", "log", "-1", "--format=%h", *code) + ("+" if changed else "")


def _versions() -> dict[str, str]:
    """Of the peers' packages that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Hardware, clocks, versions and commit."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": version(),
        "cpu": _cpu_name(),
        "instruction_set": tlinformer._C.instruction_set(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tlinformer": tlinformer.__version__,
    }
    if torch.device(device).type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "gpu_bytes": torch.cuda.get_device_properties(device).total_memory,
            "driver": driver,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_versions(),
        }
    return found


def ceilings(device: torch.device) -> dict[str, Any]:
    """What this machine can do now; on a GPU with its clocks just after."""
    found: dict[str, Any] = dict(measure_ceilings(device))
    if device.type == "cuda":
        found["clocks"] = _gpu_now()
    free(device)
    return found


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def times(
    call: Callable[[], Any],
    device: torch.device,
    calls: int,
    before: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Seconds of each call, which begins with cold caches and ends when its work is done."""
    scratch = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    taken = []
    for _ in range(calls):
        before()
        scratch.zero_()
        taken.append(seconds(call, device))
    return taken


def spread(taken: Iterable[float], parts: int = 1) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds of a part of each call."""
    taken = [t / parts * 1e3 for t in taken]
    if len(taken) == 1:
        return {"ms": taken[0], "calls": 1}
    deciles = statistics.quantiles(taken, n=10, method="inclusive")
    return {
        "ms": statistics.median(taken),
        "p10": deciles[0],
        "p90": deciles[-1],
        "calls": len(taken),
    }


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median over calls in a row; on a GPU by its own clock."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            call()
            marks.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(marks)) * 1e3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(10_000_000)  # the host gets ahead
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def energy(call: Callable[[], Any], device: torch.device) -> float | None:
    """Joules that the GPU's own counter adds during a call; None where there is none.

    The counter moves some ten times a second: the call should take half a second or more.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        index = device.index or torch.cuda.current_device()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        torch.cuda.synchronize(device)
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        call()
        torch.cuda.synchronize(device)
        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
    except Exception:  # not installed, or a counter that this GPU or its driver does not have
        return None


class Results:
    """Rows by their KEY; in a file, if there is a path. again: those of earlier runs may go."""

    def __init__(self, path: Path | None, again: bool = False) -> None:
        self.path = path
        self.data: dict[str, list[dict[str, Any]]] = {"runs": [], "rows": []}
        if path and path.exists():
            self.data = json.loads(path.read_text())
        self.oldest = len(self.data["runs"]) if again else 0  # run that still counts

    def begin(self, device: torch.device) -> dict[str, Any]:
        """A new run; the ceilings."""
        command = " ".join(["python", *sys.argv])
        run = {"command": command, **environment(device), "ceilings": ceilings(device)}
        self.data["runs"].append(run)
        reads, products = (run["ceilings"][f"{of}_per_second"] / 1e9 for of in ("bytes", "flops"))
        print(f"rows go to {self.path or 'no file'}; ceilings, measured now:", end=" ")
        print(f"reads {reads:,.1f} GB/s, products {products:,.0f} GFLOP/s", flush=True)
        return run["ceilings"]

    def find(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row of these settings that need not be measured again: one of the same version."""
        now, runs = version(), self.data["runs"]
        same = (r for r in self.data["rows"] if all(r.get(k) == row.get(k) for k in KEY))
        settled = (r for r in same if any(name in r for name in SETTLED))
        settled = (r for r in settled if r["run"] >= self.oldest)
        return next((r for r in settled if runs[r["run"]]["commit"] == now), None)

    def add(self, row: dict[str, Any]) -> None:
        """Replaces the row of the same settings, prints it, and writes the file."""
        row = {**row, "run": len(self.data["runs"]) - 1}
        rows = self.data["rows"]
        rows[:] = [r for r in rows if any(r.get(k) != row.get(k) for k in KEY)] + [row]
        print(line(row), flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = ",\n".join(f"  {json.dumps(r)}" for r in rows)
            runs = ",\n".join(f"  {json.dumps(r)}" for r in self.data["runs"])
            new = self.path.with_suffix(".part")
            new.write_text(f'{{"runs": [\n{runs}\n],\n"rows": [\n{text}\n]}}\n')
            new.replace(self.path)
