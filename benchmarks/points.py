"""All peers by name, and one peer at one length: what can be measured of it and what cannot."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from linear import GLA, GatedDeltaNet, Mamba2
from measure import free
from peers import EnginePeer, NaiveConcatenate, NaiveRecompute, Peer
from sizes import config_of, weight_count
from sliding import SlidingWindow
from static import StaticTransformer
from static_tlinformer import StaticTLinFormer

from tlinformer.plan import available_memory

PEERS: dict[str, type[Peer]] = {
    "engine": EnginePeer,
    "transformer": StaticTransformer,
    "tlinformer-pytorch": StaticTLinFormer,
    "sliding-window": SlidingWindow,
    "gla": GLA,
    "gated-deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
    "naive-concatenate": NaiveConcatenate,
    "naive-recompute": NaiveRecompute,
}
MARGIN = 2**30  # bytes for activations, kernels and what the libraries take


class Point:
    """One peer at one length: everything a measurement needs, and the row it makes."""

    def __init__(
        self, args: argparse.Namespace, size: str, name: str, history: int, batch: int
    ) -> None:
        self.args, self.size, self.name, self.batch = args, size, name, batch
        self.config, self.peer = config_of(size), PEERS[name]
        window = self.config.generation_window
        self.history = history // window * window
        self.key = {
            "suite": args.suite,
            "size": size,
            "peer": name,
            "history": self.history,
            "batch": batch,
            "dtype": str(args.dtype).removeprefix("torch."),
        }

    @property
    def element(self) -> int:
        return self.args.dtype.itemsize

    @property
    def room(self) -> int:
        """Tokens the peer has room for: some windows, and some to measure energy on."""
        return self.history + min(self.history // 8, 8192) + 3 * self.config.generation_window

    @property
    def computes(self) -> bool:
        """Whether arithmetic bounds the time, not bytes."""
        return self.args.suite == "prefill" or self.peer is NaiveRecompute

    def least(self, history: int, ceilings: dict[str, Any]) -> float:
        """Milliseconds that the machine needs at its best."""
        if self.computes:
            flops = self.batch * self.peer.prefill_flops(self.config, max(1, history))
            return flops / ceilings["flops_per_second"] * 1e3
        moved = self.peer.token_bytes(self.config, history, self.batch, self.element)
        return moved / ceilings["bytes_per_second"] * 1e3

    def obstacle(self, done: list[dict[str, Any]], ceilings: dict[str, Any]) -> str:
        """Why it cannot be measured here or now; empty when nothing is in the way."""
        device = self.args.device
        needed = weight_count(self.config) * self.element + MARGIN
        needed += self.peer.room_bytes(self.config, self.room, self.batch, self.element, device)
        if self.computes and self.peer is not EnginePeer:  # whose plan has its activations
            needed += 8 * self.batch * self.history * self.config.hidden_size * self.element
        free(device)
        available = available_memory(device)
        if available and needed > available:
            return f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} are free"
        names = ("suite", "size", "peer", "batch", "dtype")
        for row in done:  # a shorter one, unless launches took most of its time
            if "ms" in row and all(row[k] == self.key[k] for k in names):
                least = self.least(row["history"], ceilings)
                expected = row["ms"] * self.least(self.history, ceilings) / least / 1e3
                known = row["history"] < self.history and least > 0.03 * row["ms"]
                if known and expected > self.args.point_seconds:
                    return f"one would take about {expected:.0f} s (--point-seconds)"
        return ""


def points(args: argparse.Namespace) -> Iterator[Point]:
    for size in args.sizes:
        for name in args.peers:
            for batch in args.batch_sizes:
                for history in sorted(args.histories):
                    yield Point(args, size, name, history, batch)
