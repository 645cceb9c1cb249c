"""The measured rows, as tables and pictures read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measure import RESULTS

ORDER = (
    "engine",
    "tlinformer-pytorch",
    "transformer",
    "sliding-window",
    "gla",
    "gated-deltanet",
    "mamba2",
    "naive-concatenate",
    "naive-recompute",
)
LABELS = {
    "engine": "tlinformer's engine",
    "tlinformer-pytorch": "TLinFormer in PyTorch",
    "transformer": "Transformer",
    "sliding-window": "Transformer, sliding window",
    "gla": "GLA, linear time",
    "gated-deltanet": "Gated DeltaNet, linear time",
    "mamba2": "Mamba-2, linear time",
    "naive-concatenate": "naive: concatenates its cache",
    "naive-recompute": "naive: recomputes everything",
}


def rows(suite: str, device: str, folder: Path = RESULTS, **where: Any) -> list[dict[str, Any]]:
    """Rows of a file, each with its `run`, ordered by peer, history and batch."""
    path = folder / f"{suite}-{device}.json"
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    found = [
        {**row, "run": data["runs"][row["run"]]}
        for row in data["rows"]
        if all(row.get(k) == v for k, v in where.items())
    ]
    return sorted(found, key=lambda r: (ORDER.index(r["peer"]), r["history"], r["batch"]))


def sizes_of(device: str, folder: Path = RESULTS) -> list[str]:
    """Sizes with measured tokens of the engine and of a Transformer, smallest first."""
    found: dict[str, set[str]] = {}
    for row in rows("decode", device, folder):
        if "ms" in row:
            found.setdefault(row["size"], set()).add(row["peer"])
    order = ("41m", "d512", "1.3b", "7b")
    return [size for size in order if {"engine", "transformer"} <= found.get(size, set())]


def line(
    suite: str, device: str, peer: str, field: str, folder: Path = RESULTS, **where: Any
) -> dict[int, float]:
    """Values of a peer by history, or, in the suite `batch`, by sequences."""
    by = "batch" if suite == "batch" else "history"
    found = rows(suite, device, folder, peer=peer, **where)
    return {row[by]: row[field] for row in found if row.get(field) is not None}


def why_not(row: dict[str, Any]) -> str:
    """In a word, why a row has no time."""
    if "skipped" in row:
        return "too long" if "would take" in row["skipped"] else "no room"
    return "not installed" if "not_installed" in row else "failed"
