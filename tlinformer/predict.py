"""What a prompt, a slide and a hit will cost on a device, from short runs on it.

Each is linear in the blocks and, apart from how a device fills up, in the history (paper section
3.3): a fixed part for kernels' starts, weights and windows, and a part for every token of history
at the rate of its bytes or products. Both parts are measured, with random weights in the shape of
the model: at a few short histories, of all its blocks, or of two and of four if it has more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tlinformer.config import TLinFormerConfig
from tlinformer.engine import Engine
from tlinformer.model import TLinFormerForCausalLM
from tlinformer.plan import fit_device
from tlinformer.roofline import Verb, compare, count, measure_ceilings, seconds

FEW_BLOCKS, SOME_BLOCKS = 2, 4  # from two blocks on, each one more adds the same
# From one probed history to the next; at first a device still fills up, which is not linear.
FIRST_GROWTH, GROWTH = 2, 5
LONGEST_PROBE = 400_000  # tokens
# Seconds of a prefill, after which no longer history is probed: once three were, and before.
LONG_PREFILL, VERY_LONG_PREFILL = 0.2, 2.0
EVENTS = ("prefill", "slide", "hit")
SHORT_RUNS, MOST_RUNS = 0.2, 20  # seconds; runs that are repeated that long, and how often at most


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What events cost at one history; all sequences of the batch take part in each.

    Attributes:
        history: tokens before the generation window.
        events: "prefill" of the history, "slide" (a token that slides) and "hit" (one that does
            not; absent where every token slides), with the time, bytes and FLOPs of one.
            `share` is the part of its time that the device needs for the longer of
            bytes and FLOPs at its measured ceilings, `bound` which of the two.
        amortised_seconds: a token's share of a window with one slide.
    """

    history: int
    events: dict[str, Verb]
    amortised_seconds: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a configuration on a device.

    Attributes:
        config: the whole model's.
        histories: tokens of the histories that were run.
        table: float64 (histories, `EVENTS`, 3): seconds, bytes, FLOPs of the whole model.
        ceilings: of `roofline.measure_ceilings`, in the same minute.
    """

    config: TLinFormerConfig
    histories: list[int]
    table: np.ndarray
    ceilings: dict[str, float]

    def at(self, history: int) -> Prediction:
        """What to expect at a history.

        Interpolated; below the shortest run as in that, since a device idles there; beyond the
        longest at the rate of the last two.
        """
        at = np.array(self.histories, dtype=float)
        i = int(np.clip(np.searchsorted(at, history), 1, len(at) - 1)) if len(at) > 1 else 0
        cost = self.table[i]
        if i:
            more = (cost - self.table[i - 1]) / (at[i] - at[i - 1])
            cost = cost + more * (max(history, at[0]) - at[i])
        events = {}
        window = self.config.generation_window
        for name, (took, moved, flops) in zip(EVENTS, cost.tolist(), strict=True):
            if name == "hit" and window == 1:
                continue
            events[name] = Verb(name, 1, took * 1e6, moved, flops)
            compare(events[name], self.ceilings)
        hit = events["hit"].microseconds if window > 1 else 0.0
        amortised = (events["slide"].microseconds + (window - 1) * hit) / window
        return Prediction(history, events, amortised / 1e6)


def random_model(
    config: TLinFormerConfig, device: torch.device, dtype: torch.dtype
) -> TLinFormerForCausalLM:
    """A model that nobody trained; it takes as long as one that somebody did."""
    with torch.device(device):
        return TLinFormerForCausalLM(config).to(dtype).eval()


def histories_to_probe(config: TLinFormerConfig, longest: int) -> Iterator[int]:
    """Whole windows: the least history that fills the compressed one, then longer ones."""
    window = config.generation_window
    windows = max(2, math.ceil(config.history_window_at(longest) / window))
    growth = FIRST_GROWTH
    while True:
        yield windows * window
        windows *= growth
        growth = GROWTH
        # A little further it is cheaper to extrapolate.
        if windows * window > min(LONGEST_PROBE, longest):
            return


def measure_events(
    model: TLinFormerForCausalLM, history: int, batch_size: int = 1, repeats: int = 3
) -> np.ndarray:
    """Seconds, bytes and FLOPs, float64 (`EVENTS`, 3), of a model at a history of whole windows.

    The best of the repeats counts, as other programs only add; short runs are repeated more often.
    Of a hit where every token slides all three are 0.
    """
    config = model.config
    tokens = min(64, config.generation_window - 1)
    engine = Engine(model, max_context=history + 1 + tokens, batch_size=batch_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch_size, history), generator=generator)
    # On a CPU token by token: with luck, one of them is alone on a shared machine.
    single = engine.device.type == "cpu"
    calls = (
        lambda: engine.prefill(ids),
        lambda: engine.step(ids[:, 0]),
        *(tokens * [lambda: engine.generate(1)] if single else [lambda: engine.generate(tokens)]),
    )
    work = [count(engine, call) for call in calls]  # what happens only once is over then
    rounds: list[list[float]] = []
    while len(rounds) < repeats or (
        len(rounds) < MOST_RUNS and np.sum(rounds) + np.sum(rounds[-1]) < SHORT_RUNS
    ):
        rounds.append([seconds(call, engine.device) for call in calls])
    best = np.min(rounds, 0)
    events = np.column_stack([best, work])
    hits = events[2:].min(0) if single and tokens else events[2:].sum(0) / (tokens or 1)
    return np.stack([events[0], events[1], hits])


def measure_costs(
    config: TLinFormerConfig,
    *,
    longest: int,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    repeats: int = 2,
) -> Costs:
    """Runs short engines on a device, to predict what long ones will cost.

    Args:
        config: the model's sizes; its weights are not needed.
        longest: tokens of the longest history to be predicted; runs are not longer, and much
            shorter where a prompt takes long.
        batch_size: sequences.
        dtype: of weights and cache.
        device: where to run.
        repeats: rounds of all runs; the best counts, as other programs only add.

    Raises:
        ValueError: for what the device's engine does not take.
        RuntimeError: where the least of the runs does not fit the device.
    """
    place, blocks = torch.device(device), config.num_blocks
    depths = [blocks] if blocks <= SOME_BLOCKS else [FEW_BLOCKS, SOME_BLOCKS]
    ceilings = measure_ceilings(place)
    models: list[Any] = [
        random_model(dataclasses.replace(config, num_blocks=depth), place, dtype)
        for depth in depths
    ]
    histories = list(histories_to_probe(config, longest))
    rounds: list[list[np.ndarray]] = []
    for _ in range(repeats):  # all of them in turn: what disturbs the machine passes
        rounds.append(_probe(models, histories, batch_size, first=not rounds))
        histories = histories[: len(rounds[0])]
    least = np.minimum.reduce([np.stack(one) for one in rounds])  # (histories, models, events, 3)
    # More blocks cost no less, nor does more history, whatever else the machine did.
    missing = (blocks - depths[0]) / max(1, depths[-1] - depths[0])
    table = least[:, 0] + missing * np.maximum(least[:, -1] - least[:, 0], 0)
    return Costs(config, histories, np.maximum.accumulate(table), ceilings)


def _probe(
    models: list[TLinFormerForCausalLM], histories: list[int], batch_size: int, first: bool
) -> list[np.ndarray]:
    """Costs (models, `EVENTS`, 3) at each history; the first time only while they are cheap."""
    found: list[np.ndarray] = []
    for history in histories:
        if first and found and not _fits(models[-1], history, batch_size):
            break
        costs = [measure_events(model, history, batch_size, repeats=2) for model in models]
        found.append(np.stack(costs))
        limit = LONG_PREFILL if len(found) >= 3 else VERY_LONG_PREFILL
        if first and costs[-1][0, 0] > limit:
            break
    return found


def _fits(model: TLinFormerForCausalLM, history: int, batch_size: int) -> bool:
    weight = next(model.parameters())
    context = history + model.config.generation_window
    sizes: dict[str, Any] = {"batch_size": batch_size, "dtype": weight.dtype, "new_weights": 0}
    fit = fit_device(model.config, max_context=context, device=weight.device, **sizes)
    return fit.refusal is None
