"""What is measured of a peer: a token, a prefill and a slide, what it has to keep."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from linear import Linear
from measure import Results, energy, free, spread, times
from peers import EnginePeer, Graphed
from points import MARGIN, Point, points
from sizes import exact, random_ids, slide_flops, weight_count

from tlinformer.plan import available_memory
from tlinformer.roofline import seconds


class Models:
    """The model in memory, one at a time, and which peers were found right with it."""

    def __init__(self) -> None:
        self.kind: Any = None
        self.model: Any = None
        self.checked: dict[tuple[str, str], dict[str, float]] = {}

    def of(self, point: Point) -> Any:
        """The model of a point's peer, which shares it with all peers of the same kind."""
        make = point.peer.make
        kind = getattr(make, "__func__", make), point.peer.model_of(), point.size
        if kind != self.kind:
            self.kind = self.model = None
            free(point.args.device)
            self.model, self.kind = make(point.config, point.args.device, point.args.dtype), kind
        return self.model

    def check(self, point: Point) -> dict[str, float]:
        key = point.size, point.name
        if key not in self.checked:
            self.checked[key] = errors(point, self.of(point))
            free(point.args.device)
        return self.checked[key]


def errors(point: Point, model: Any) -> dict[str, float]:
    """Errors of a peer's logits, its graph's too, against float32, across a slide.

    Raises:
        ArithmeticError: for errors of more than twice those of the model's own forward pass.
    """
    peer, config, device = point.peer, point.config, point.args.device
    window = config.generation_window
    # Whole windows: the first step slides. 1024 rows, as many as a later prompt has.
    begin, steps = window * max(2, min(4, 1024 // window)), 5
    torch.manual_seed(1)
    ids = random_ids(config, 1, begin + steps + 1)
    seen = slice(begin - 1, None)
    inputs = ids.to(device)
    with torch.no_grad():
        own = peer.reference(model, inputs)[:, seen].float()
        precise = own if issubclass(peer, Linear) else peer.reference(exact(model), inputs)[:, seen]
    runner = peer(model, begin + 2 * window, 1)
    logits = [runner.prefill(ids[:, :begin])]
    logits += [runner.step(ids[:, begin + i]) for i in range(steps)]
    if isinstance(runner, EnginePeer):  # the device loop draws what these logits say
        drawn = runner.engine.generate(1)[:, 0].to(logits[-1].device)
        if (drawn != logits[-1].argmax(-1)).any():
            raise ArithmeticError(f"generate drew {drawn.tolist()}, not the most likely tokens")
    elif isinstance(runner, Graphed):
        once = runner.tokens()
        runner.token.copy_(ids[:, begin + steps])
        once(1)
        logits.append(runner.logits)
    else:
        logits.append(runner.step(ids[:, begin + steps]))
    found = torch.stack([x.float().to(device) for x in logits], 1)
    precise = precise[:, : found.size(1)]
    own = own[:, : found.size(1)]
    scale = precise.abs().max().item()
    error = (found - precise).abs().max().item() / scale
    eager = (own - precise).abs().max().item() / scale
    # Kernels of flash-linear-attention round differently in their two forms.
    allowed = 0.05 if issubclass(peer, Linear) else 2 * eager + 1e-3
    if not error <= allowed:
        raise ArithmeticError(
            f"logits are off by {error:.2g} of the largest, {allowed:.2g} allowed"
        )
    return {"error": error, "error_eager": eager}


def decode(point: Point, models: Models, ceilings: dict[str, Any]) -> dict[str, Any]:
    """A token between two slides: alone, with its energy; calls begin with a cold L2."""
    args, config, device = point.args, point.config, point.args.device
    window, history = config.generation_window, point.history
    runner = point.peer(models.of(point), point.room, point.batch)
    runner.fill(history + (1 if point.peer is EnginePeer else window // 2))
    loop = runner.tokens()
    loop(1)
    slides = runner.engine.stats.slides if isinstance(runner, EnginePeer) else 0
    one = seconds(lambda: loop(1), device)
    # All calls of the engine together stay in one window.
    most = (window - 4) // args.calls
    count = max(1, min(most, int(args.point_seconds / args.calls / one)))
    calls = min(args.calls, max(1, int(args.point_seconds / one)))
    row = spread(times(lambda: loop(count), device, calls), count)
    if isinstance(runner, EnginePeer) and runner.engine.stats.slides != slides:
        raise ArithmeticError("more tokens than a window holds")
    moved = point.peer.token_bytes(config, history, point.batch, point.element)
    limit = moved / ceilings["bytes_per_second"] * 1e3
    row |= {"tokens_per_second": point.batch / row["ms"] * 1e3, "megabytes": moved / 1e6}
    row |= {"limit_ms": limit, "share": limit / row["ms"]}
    kept = max(1, history)
    row["state_bytes"] = point.peer.state_bytes(config, kept, point.batch, point.element)
    row |= runner.detail()
    if device.type == "cuda":
        row |= joules(point, loop, row["ms"])
    return row


def joules(point: Point, loop: Any, ms: float) -> dict[str, Any]:
    """Energy of a token; the engine's are half a second of tokens in a row, slides included."""
    count = int(600 / ms) + 1
    if point.peer is EnginePeer and count > point.history // 8:
        return {}  # its history would be another one at the end
    spent = energy(lambda: loop(count), point.args.device)
    return {"millijoules": spent / count / point.batch * 1e3} if spent else {}


def prefill(point: Point, models: Models, ceilings: dict[str, Any]) -> dict[str, Any]:
    """A prompt, and with TLinFormer the token that slides after it."""
    args, config, device = point.args, point.config, point.args.device
    length = max(1, point.history)
    ids = random_ids(config, point.batch, length)
    runner = point.peer(models.of(point), point.room, point.batch)
    token = torch.ones(point.batch, dtype=torch.int64)
    slides, prefills = [], []

    def slide() -> None:
        if point.peer.slides and point.history:
            slides.append(seconds(lambda: runner.step(token), device))

    runner.prefill(ids)  # what happens only once
    slide()
    one = seconds(lambda: runner.prefill(ids), device)
    slides.clear()
    for _ in range(min(args.calls, max(1, int(args.point_seconds / one)))):
        prefills += times(lambda: runner.prefill(ids), device, 1)
        slide()
    row = spread(prefills)
    flops = point.batch * point.peer.prefill_flops(config, length)
    limit = max(
        flops / ceilings["flops_per_second"],
        weight_count(config) * point.element / ceilings["bytes_per_second"],
    )
    row |= {"tokens_per_second": point.batch * length / row["ms"] * 1e3, "tflop": flops / 1e12}
    row |= {"limit_ms": limit * 1e3, "share": limit * 1e3 / row["ms"]}
    if slides:
        miss = spread(slides)
        row |= {f"slide_{k}": v for k, v in miss.items() if k != "calls"}
        flops = point.batch * slide_flops(config, point.history)
        row["slide_limit_ms"] = flops / ceilings["flops_per_second"] * 1e3
    return row | runner.detail()


def state(point: Point, models: Models, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Bytes of state by count, and the longest context that the device has room for."""
    peer, config, element = point.peer, point.config, point.element
    if issubclass(peer, Linear):
        runner = peer(models.of(point), 0, point.batch)
        runner.fill(1)
        return {"bytes": runner.measured_state(), "max_context": None}
    args = point.args
    if args.device.type == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
    else:
        total = available_memory()
    left = total - MARGIN - weight_count(config) * element

    def fits(context: int) -> bool:
        return peer.state_bytes(config, context, point.batch, element) <= left

    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    history = max(1, point.history)
    row = {"bytes": peer.state_bytes(config, history, point.batch, element), "of": total}
    return row | {"max_context": low if low < 2**40 - 1 else None}


MEASURES = {"decode": decode, "batch": decode, "prefill": prefill, "cache": state}


def measure(
    point: Point, models: Models, results: Results, ceilings: dict[str, Any]
) -> dict[str, Any]:
    """The row of a point, or why there is none."""
    if missing := point.peer.missing():
        return {"not_installed": missing}
    suite = point.args.suite
    if suite != "cache" and (why := point.obstacle(results.data["rows"], ceilings)):
        return {"skipped": why}
    try:
        checked = models.check(point) if suite != "cache" else {}
        return MEASURES[suite](point, models, ceilings) | checked
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:  # one peer's failure must not cost the others their results
        if point.args.smoke:
            raise
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"failed": words}


def run(args: argparse.Namespace) -> int:
    """Measures what the file has not; how many points are left."""
    results, models = Results(args.json, args.again), Models()
    todo = {tuple(p.key.values()): p for p in points(args) if not results.find(p.key)}
    if not todo:
        return 0
    began, ceilings = time.monotonic(), results.begin(args.device)
    for i, point in enumerate(todo.values()):
        if time.monotonic() - began > args.seconds:
            return len(todo) - i
        results.add(point.key | measure(point, models, results, ceilings))
        free(args.device)
    return 0
