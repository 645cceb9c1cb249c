"""The engine against the golden vectors, the float64 reference and itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    CUDA_HEAD_SIZES,
    NO_CUDA,
    Golden,
    Place,
    engine_of,
    make_config,
    make_ids,
    make_model,
    poison,
)
from reference import reference_logits

from tlinformer import _C, Engine, SamplingParams, TLinFormerForCausalLM, plan_cache
from tlinformer.engine import available_memory
from tlinformer.plan import device_type

pytestmark = pytest.mark.usefixtures("one_thread")


def cached_logits(engine: Engine, ids: torch.Tensor, cut: int) -> torch.Tensor:
    """Logits of positions cut-1 ... L-1: (B, L - cut + 1, V) on the CPU."""
    rows = [engine.prefill(ids[:, :cut])]
    rows += [engine.step(ids[:, i]) for i in range(cut, ids.size(1))]
    return torch.stack(rows, 1).cpu()


def exact_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float64 logits (B, L, V) of the model's weights as they are rounded."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return reference_logits(model.config, weights, ids)


def test_golden_from_every_split_point(golden: Golden, every_place: Place) -> None:
    place = every_place
    if place.device.type == "cuda" and golden.config.head_dim not in CUDA_HEAD_SIZES:
        pytest.skip(f"head size {golden.config.head_dim} is the CPU's alone")
    model = TLinFormerForCausalLM(golden.config)
    model.load_state_dict(golden.state_dict)
    model.to(place.device, place.dtype)
    batch, length = golden.input_ids.shape
    want = golden.logits.double()
    noise = 1e-4 if place.exact else place.noise(model, golden.input_ids, want)
    engine = engine_of(model, length, batch_size=batch)
    for cut in range(1, length + 1):
        poison(engine)
        got = cached_logits(engine, golden.input_ids, cut).double()
        assert (got - want[:, cut - 1 :]).abs().max() <= noise


@pytest.mark.parametrize(
    "changes",
    [
        {"generation_window": 1},
        {"history_window": 64},
        {"generation_window": 64},
        {"block_depth": 2},
        {"num_blocks": 1},
        {"num_blocks": 4, "block_depth": 2},
        {"hidden_size": 72},
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "generation_window": 7},
        {"history_window": "auto", "generation_window": 3},
        {"variant": "tconstformer"},
        {"hidden_size": 256, "num_attention_heads": 1},
    ],
    ids=str,
)
def test_engine_equals_reference(changes: dict[str, Any], every_place: Place) -> None:
    model = every_place.model(**changes)
    ids = make_ids(model.config, 2, 27)
    want = exact_logits(model, ids)
    noise = every_place.noise(model, ids, want)
    engine = engine_of(model, 27, batch_size=2)
    assert engine.dtype == every_place.dtype
    for cut in (1, 4, 13, 27):
        got = cached_logits(engine, ids, cut).double()
        assert (got - want[:, cut - 1 :]).abs().max() <= noise


@pytest.mark.parametrize("head_size", CUDA_HEAD_SIZES)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=str)
def test_every_head_size_of_the_gpu(gpu: Place, head_size: int, heads: tuple[int, int]) -> None:
    sizes = {
        "hidden_size": head_size * heads[0],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": 136,
        "vocab_size": 301,
        "history_window": 21,
        "generation_window": 19,
    }
    model = gpu.model(**sizes)
    ids = make_ids(model.config, 2, 85)
    want = exact_logits(model, ids)
    noise = gpu.noise(model, ids, want)
    engine = engine_of(model, 85, batch_size=2)
    for cut in (18, 60):
        got = cached_logits(engine, ids, cut).double()
        assert (got - want[:, cut - 1 :]).abs().max() <= noise


@pytest.mark.parametrize("hidden_size", [48, 72, 256])
def test_many_rows_cross_every_tile(hidden_size: int, every_place: Place) -> None:
    """A prompt of several pieces, tiles and threads, its last window not full; then tokens."""
    model = every_place.model(
        hidden_size=hidden_size, history_window=150, generation_window=140, num_blocks=3
    )
    ids = make_ids(model.config, 1, 1290)
    want = exact_logits(model, ids)
    noise = every_place.noise(model, ids, want)
    for threads in (1, 2, 5) if every_place.exact else (1,):
        engine = engine_of(model, 1290, num_threads=threads)
        for cut in (1250, 1260):  # the second goes over a slide's edge
            got = cached_logits(engine, ids[:, : cut + 11], cut).double()
            assert (got - want[:, cut - 1 : cut + 11]).abs().max() <= noise


def test_batch_of_different_lengths_equals_single_runs(place: Place) -> None:
    model = place.model()
    prompts = [make_ids(model.config, 1, n, seed=n)[0] for n in (1, 4, 11, 30)]
    together = engine_of(model, 60, batch_size=4)
    logits = together.prefill(prompts)
    new = together.generate(25)
    after = together.step([torch.tensor([3])] * 4)
    assert all(isinstance(x, list) for x in (logits, new, after))
    for i, prompt in enumerate(prompts):
        ids = torch.cat([prompt, new[i], torch.tensor([3])])[None]
        place.check_greedy(model, ids[:, :-1], len(prompt))
        want = exact_logits(model, ids)[0]
        noise = place.noise(model, ids, want[None])
        for got, at in ((logits[i], len(prompt) - 1), (after[i], -1)):
            assert got.device.type == place.device.type
            assert (got.cpu().double() - want[at]).abs().max() <= noise
        if place.exact:
            single = engine_of(model, 60)
            single.prefill(prompt[None])
            assert torch.equal(single.generate(25)[0], new[i])
    outputs = model.generate(prompts, max_new_tokens=25)
    for output, prompt, n in zip(outputs, prompts, new, strict=True):
        assert torch.equal(output, torch.cat([prompt, n]))


def test_slides_of_a_batch_fall_on_different_steps(place: Place) -> None:
    """Every sequence slides when its own window is full, and the others only wait."""
    model = place.model(generation_window=7, history_window=9)
    prompts = [make_ids(model.config, 1, n, seed=n)[0] for n in (3, 14, 5, 6, 20)]
    engine = engine_of(model, 60, batch_size=6)  # one sequence more than prompts
    engine.prefill(prompts)
    new = engine.generate(30)
    for prompt, tokens in zip(prompts, new, strict=True):
        place.check_greedy(model, torch.cat([prompt, tokens])[None], len(prompt))
    ends = [len(prompt) + 30 for prompt in prompts]
    assert engine.stats.history_length == [7 * ((end - 1) // 7) for end in ends]
    # One for every window but the last, and the prefill of 20 tokens did with one for two.
    assert engine.stats.slides == sum((end - 1) // 7 for end in ends) - 1


def test_greedy_tokens_equal_the_scoring_forward(place: Place) -> None:
    model = place.model()
    ids = make_ids(model.config, 2, 10)
    tokens = model.generate(ids, max_new_tokens=50)
    assert tokens.shape == (2, 60) and torch.equal(tokens[:, :10], ids)
    place.check_greedy(model, tokens, 10)


@pytest.mark.parametrize("hidden_size", [64, 72])
def test_two_thousand_greedy_tokens_over_eight_slides(hidden_size: int, place: Place) -> None:
    model = place.model(
        hidden_size=hidden_size, vocab_size=997, history_window=64, generation_window=256
    )
    ids = make_ids(model.config, 1, 70)
    engine = engine_of(model, 2100)
    engine.prefill(ids)
    tokens = torch.cat([ids, engine.generate(2030)], 1)
    assert (engine.stats.slides, engine.stats.hits) == (8, 2030 - 8)
    place.check_greedy(model, tokens, 70)


def test_generation_continues_where_it_stopped(place: Place) -> None:
    model = place.model()
    ids = make_ids(model.config, 1, 7)
    sampling = SamplingParams(temperature=1.0, seed=5)
    whole, parts = engine_of(model, 60), engine_of(model, 60)
    whole.prefill(ids)
    parts.prefill(ids)
    want = whole.generate(30, sampling)
    got = torch.cat([parts.generate(n, sampling) for n in (1, 12, 0, 17)], 1)
    assert torch.equal(got, want)
    assert whole.stats == parts.stats


def test_steps_between_generations(place: Place) -> None:
    """Own tokens and drawn ones go through the same cache."""
    model = place.model()
    ids = make_ids(model.config, 2, 9)
    engine = engine_of(model, 40, batch_size=2)
    engine.prefill(ids)
    first = engine.generate(6)
    engine.step(torch.tensor([3, 4]))
    second = engine.generate(10)
    known = torch.cat([ids, first, torch.tensor([[3], [4]])], 1)
    place.check_greedy(model, known[:, :-1], 9)
    place.check_greedy(model, torch.cat([known, second], 1), 16)


def test_stats_count_hits_and_slides(place: Place) -> None:
    model = place.model(generation_window=4, history_window=5)
    engine = engine_of(model, 60)
    engine.prefill(make_ids(model.config, 1, 10))
    assert (engine.stats.slides, engine.stats.hits) == (1, 0)
    assert (engine.stats.history_length, engine.stats.window_fill) == (8, 2)
    engine.generate(1)
    rows = 2 * (8 + 3) + 4 * (5 + 3)  # two compress layers, four others, window included
    assert (engine.stats.hits, engine.stats.rows_read) == (1, rows)
    engine.generate(12)
    assert engine.stats.hits + engine.stats.slides == 1 + 13 and engine.stats.slides == 4
    assert (engine.stats.history_length, engine.stats.window_fill) == (20, 3)
    assert engine.stats.cache_bytes == engine.plan.cache_bytes
    engine.reset()
    assert (engine.stats.hits, engine.stats.history_length) == (0, 0)


def frequencies(model: Any, sampling: dict[str, Any], seeds: int = 40) -> torch.Tensor:
    """How often each token is drawn after one prompt, over many seeds and sequences."""
    engine = engine_of(model, 4, batch_size=50)
    counts = torch.zeros(model.config.vocab_size)
    prompts = torch.ones(50, 1, dtype=torch.int64)
    for seed in range(seeds):
        engine.prefill(prompts)
        drawn = engine.generate(1, SamplingParams(seed=seed, **sampling))
        counts += drawn.flatten().bincount(minlength=len(counts))
    return counts / counts.sum()


@pytest.fixture(scope="module")
def drawn_from(place: Place) -> tuple[Any, torch.Tensor]:
    model = place.model(vocab_size=11)
    with torch.no_grad():  # logits of equal spread, whatever the width
        model.norm.weight *= (24 / model.config.hidden_size) ** 0.5
        model.norm.bias *= (24 / model.config.hidden_size) ** 0.5
    return model, engine_of(model, 4).prefill(torch.tensor([[1]]))[0].cpu().double()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 2.0},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 3.0, "min_p": 0.4},
        {"temperature": 2.0, "repetition_penalty": 1.7},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8, "min_p": 0.2},
    ],
    ids=str,
)
def test_samples_follow_the_filtered_distribution(
    drawn_from: tuple[Any, torch.Tensor], sampling: dict[str, Any]
) -> None:
    model, logits = drawn_from
    logits = logits.clone()
    penalty = sampling.get("repetition_penalty", 1.0)
    logits[1] = logits[1] / penalty if logits[1] > 0 else logits[1] * penalty
    p = (logits / sampling["temperature"]).softmax(0)
    order = p.argsort(descending=True)
    keep = torch.ones_like(p, dtype=torch.bool)
    if "top_k" in sampling:
        keep[order[sampling["top_k"] :]] = False
    p = p * keep / (p * keep).sum()
    if "top_p" in sampling:
        before = p[order].cumsum(0) - p[order]
        keep[order[before >= sampling["top_p"]]] = False
    keep &= p >= sampling.get("min_p", 0.0) * p.max()
    p = p * keep / (p * keep).sum()
    got = frequencies(model, sampling).double()
    assert (got[~keep] == 0).all()
    assert (got - p).abs().max() < 4 * (0.25 / 2000) ** 0.5


def philox(counter: list[int], key: list[int]) -> int:
    """The first word of Philox 4x32-10 (Salmon et al. 2011)."""
    c, k = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0]


def test_a_seed_draws_the_same_tokens_everywhere(drawn_from: tuple[Any, torch.Tensor]) -> None:
    """The published generator, and its number's place among the candidates, likeliest first."""
    assert philox([0] * 4, [0] * 2) == 0x6627E8D5  # the authors' known answers
    assert philox([2**32 - 1] * 4, [2**32 - 1] * 2) == 0x408F276D
    model, logits = drawn_from
    p, tokens = (logits / 2).softmax(0).topk(7)
    edges = p.cumsum(0) / p.sum()
    engine = engine_of(model, 4)
    for seed in range(100):
        engine.prefill(torch.tensor([[1]]))
        drawn = engine.generate(1, SamplingParams(temperature=2.0, top_k=7, seed=seed * 2**27))
        key = [seed * 2**27 % 2**32, seed >> 5]
        number = (philox([1, 0, 0, 0], key) + 0.5) / 2**32
        assert drawn == tokens[torch.searchsorted(edges, number)]


@pytest.mark.parametrize("vocab_size", [2, 53, 5003])
def test_likeliest_candidates_of_any_vocabulary(vocab_size: int, place: Place) -> None:
    """Filters that leave one candidate choose the likeliest, at whatever temperature."""
    model = place.model(vocab_size=vocab_size)
    engine = engine_of(model, 30, batch_size=3)
    for sampling in (
        SamplingParams(temperature=3.0, top_k=1),
        SamplingParams(temperature=3.0, top_p=1e-9),
        SamplingParams(temperature=3.0, min_p=1.0),
    ):
        logits = engine.prefill(make_ids(model.config, 3, 11))
        assert torch.equal(engine.generate(1, sampling)[:, 0], logits.argmax(-1).cpu())


def test_an_extreme_repetition_penalty_is_no_nan(place: Place) -> None:
    model = place.model()
    with torch.no_grad():
        model.embed_tokens.weight[0] = 0  # its logit is 0
    engine = engine_of(model, 4)
    logits = engine.prefill(torch.tensor([[0]])).cpu()
    drawn = engine.generate(1, SamplingParams(repetition_penalty=1e300))
    assert logits.max() > 0 and torch.equal(drawn[0], logits.argmax(1))


def test_the_repetition_penalty_knows_every_token(place: Place) -> None:
    """Of the prompt, of steps and of earlier generations: a huge penalty draws new ones only."""
    model = place.model(vocab_size=499)
    engine = engine_of(model, 80)
    ids = make_ids(model.config, 1, 30)
    engine.prefill(ids)
    engine.step(torch.tensor([5]))
    sampling = SamplingParams(temperature=1.0, repetition_penalty=1e9)
    new = [engine.generate(n, sampling) for n in (10, 20)]
    tokens = torch.cat(new, 1)[0].tolist()
    assert len(set(tokens)) == 30 and not set(tokens) & {5, *ids[0].tolist()}


def test_torchs_default_dtype_does_not_matter(place: Place) -> None:
    model = place.model()
    engine = engine_of(model, 20)
    want = engine.prefill(torch.tensor([[1, 2]]))
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = engine.prefill(torch.tensor([[1, 2]], dtype=torch.uint16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_stop_tokens_end_sequences_apart(place: Place) -> None:
    model = place.model()
    prompts = [make_ids(model.config, 1, n, seed=n)[0] for n in (3, 9)]
    engine = engine_of(model, 60, batch_size=2)
    engine.prefill(prompts)
    free = engine.generate(20)
    stop = int(free[0][4])
    engine.prefill(prompts)
    first, second = engine.generate(20, SamplingParams(stop_token_ids=[stop]))
    cut = (free[0] == stop).nonzero()[0, 0] + 1
    assert torch.equal(first, free[0][:cut])
    assert torch.equal(second, free[1][: len(second)])
    assert len(second) == 20 or second[-1] == stop
    logits = engine.step([1, 1])  # rows still belong to their sequences
    for prompt, tokens, got in zip(prompts, (first, second), logits, strict=True):
        ids = torch.cat([prompt, tokens, torch.tensor([1])])[None]
        want = exact_logits(model, ids)
        assert (got.cpu() - want[0, -1]).abs().max() <= place.noise(model, ids, want)


def test_plan_is_the_papers_formula() -> None:
    config = make_config(
        vocab_size=50257, hidden_size=432, num_attention_heads=12, block_depth=4,
        history_window=256, generation_window=256, intermediate_size=None,
    )  # fmt: skip
    plan = plan_cache(config, max_context=2**20 + 256, dtype=torch.bfloat16)
    rows = 2 * 2**20 + 2 * 3 * 256 + 2 * 4 * 256
    assert plan.cache_bytes == 2 * 2 * 432 * rows
    assert plan.total_bytes < 1.02 * plan.cache_bytes
    assert sum(plan.bytes_by_region.values()) <= plan.total_bytes
    tight = plan_cache(config, max_context=1000).total_bytes
    with pytest.raises(RuntimeError, match="enough for max_context = 1024"):
        plan_cache(config, max_context=10**6, memory_limit=tight)


def test_available_memory_counts_what_the_kernel_gives_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"meminfo": "MemAvailable: 1 kB", "memory.max": "1000\n", "memory.current": "900\n"}
    for name, text in (files | {"memory.stat": "anon 500\ninactive_file 300\n"}).items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(
        "tlinformer.plan.Path",
        lambda path: tmp_path / "meminfo" if path == "/proc/meminfo" else tmp_path,
    )
    assert available_memory() == 400
    (tmp_path / "memory.current").write_text("2000\n")
    assert available_memory() == 1  # 0 would mean unlimited


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_prompts_of_32_and_64_bits_on_any_device(place: Place, dtype: torch.dtype) -> None:
    model = place.model()
    vocab, length = model.config.vocab_size, 23
    engine = engine_of(model, length + 1, batch_size=2)
    ids = make_ids(model.config, 2, length)
    ids[0, 0], ids[0, -1] = 0, vocab - 1
    want = engine.prefill(ids)
    there = ids.to(place.device, dtype)
    rows = [there[0], ids[1].to(dtype)]  # one of them may be on the device
    strided = there.T.contiguous().T
    for prompts in (ids.to(dtype), there, rows, strided):
        engine.reset()
        got = engine.prefill(prompts)
        assert torch.equal(torch.stack(got) if isinstance(got, list) else got, want)

    wrong = [-1, vocab, torch.iinfo(dtype).min, torch.iinfo(dtype).max]
    wrong += [2**32] if dtype == torch.int64 else []
    drawn = engine.generate(1)[0]
    for at, device in enumerate(("cpu", place.device) * len(wrong)):
        bad = ids.to(device, dtype).clone()
        bad[1, at] = wrong[at // 2]
        with pytest.raises(ValueError, match=f"prompt 1: token id {wrong[at // 2]} is outside"):
            engine.prefill(bad)
    fresh = engine_of(model, length + 1, batch_size=2)  # what was cached is as it was
    fresh.prefill(ids)
    assert torch.equal(fresh.generate(1)[0], drawn)
    assert engine.stats.window_fill == fresh.stats.window_fill


def test_model_and_engine_errors(place: Place) -> None:
    model = place.model()
    engine = engine_of(model, 20)
    ids = make_ids(model.config, 1, 6)
    other, allowed = torch.float16, "float32 or bfloat16"
    if place.device.type == "cuda":
        other, allowed = torch.float32, "bfloat16 or float16"
    calls = {
        "prefill first": lambda: engine.step(torch.tensor([1])),
        "vocabulary, 0 to 52": lambda: engine.prefill(torch.tensor([[53]])),
        "outside the vocabulary": lambda: engine.prefill(torch.tensor([[-1]])),
        "is empty": lambda: engine.prefill(torch.empty(1, 0, dtype=torch.int64)),
        "integer token ids": lambda: engine.prefill(torch.rand(1, 3)),
        "got torch.bool": lambda: engine.prefill(torch.ones(1, 3, dtype=torch.bool)),
        "token id 4294967297": lambda: engine.prefill(torch.tensor([[2**32 + 1]])),
        "are no token ids": lambda: engine.prefill([None]),  # type: ignore[list-item]
        r"\(B, L\)": lambda: engine.prefill(torch.zeros(1, 1, 1, dtype=torch.int64)),
        "max_context = 20": lambda: engine.prefill(make_ids(model.config, 1, 21)),
        "1 to 1 sequences": lambda: engine.prefill(make_ids(model.config, 2, 5)),
        "not 'text'": lambda: engine.prefill("text"),  # type: ignore[arg-type]
        "max_context is 0": lambda: Engine(model, max_context=0),
        "batch_size is -1": lambda: Engine(model, max_context=4, batch_size=-1),
        "dtype is": lambda: Engine(model, max_context=4, dtype=torch.int8),
        allowed: lambda: Engine(model, max_context=4, dtype=other),
        "num_threads is -3": lambda: Engine(model, max_context=4, num_threads=-3),
        "memory_limit is 1.5": lambda: plan_cache(
            model.config,
            max_context=4,
            memory_limit=1.5,  # type: ignore[arg-type]
        ),
    }
    for text, call in calls.items():
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(RuntimeError, match="are available, enough for max_context = "):
        Engine(model, max_context=2**31 - 1, batch_size=1000)
    engine.prefill(ids)
    late = {
        "takes one each": lambda: engine.step(torch.tensor([1, 2])),
        "step: token id 53 is outside": lambda: engine.step(torch.tensor([53])),
        "step: token id 4294967297 is outside": lambda: engine.step(torch.tensor([2**32 + 1])),
        r"it takes \(B\)": lambda: engine.step(torch.tensor([[1, 2]])),
        r"shape \(\); it takes \(B\)": lambda: engine.step(5),  # type: ignore[arg-type]
        "cannot take 15 more": lambda: engine.generate(15),
        "cannot take 4611686018427387904 more": lambda: engine.generate(2**62),
        "max_new_tokens is 9223372036854775808": lambda: engine.generate(2**63),
        "max_new_tokens is": lambda: engine.generate(2.5),  # type: ignore[arg-type]
        "temperature": lambda: engine.generate(1, SamplingParams(temperature=-1)),
        "top_k": lambda: engine.generate(1, SamplingParams(top_k=-1)),
        "top_p": lambda: engine.generate(1, SamplingParams(top_p=1.5)),
        "min_p": lambda: engine.generate(1, SamplingParams(min_p=float("nan"))),
        "repetition_penalty": lambda: engine.generate(1, SamplingParams(repetition_penalty=0)),
        "stop token id 99": lambda: engine.generate(1, SamplingParams(stop_token_ids=[99])),
        "wrong type": lambda: engine.generate(1, SamplingParams(top_k="x")),  # type: ignore[arg-type]
        "stop_token_ids is 5": lambda: engine.generate(
            1,
            SamplingParams(stop_token_ids=5),  # type: ignore[arg-type]
        ),
    }
    for text, call in late.items():
        with pytest.raises(ValueError, match=text):
            call()
    assert torch.equal(engine.generate(14), model.generate(ids, 14)[:, 6:])  # nothing was lost


def test_nan_logits_are_named_and_the_engine_survives(place: Place) -> None:
    model = place.model()
    with torch.no_grad():
        model.embed_tokens.weight[7] = float("nan")
    engine = engine_of(model, 20)
    engine.prefill(torch.tensor([[1, 2]]))
    for sampling in (SamplingParams(temperature=1.0), SamplingParams()):
        with pytest.raises(RuntimeError, match="position 2 contain NaN"):
            engine.generate(5, sampling)
    with torch.no_grad():
        model.embed_tokens.weight[7] = 0
    engine.prefill(torch.tensor([[1, 2]]))
    assert engine.generate(5).shape == (1, 5)


def test_callbacks_stop_and_may_not_reenter(place: Place) -> None:
    model = place.model()
    engine = engine_of(model, 60)
    seen: list[tuple[int, int]] = []
    engine.prefill(make_ids(model.config, 1, 6))
    new = engine.generate(10, on_token=lambda *token: seen.append(token) or len(seen) < 4)
    assert new.shape == (1, 4) and [t for _, t in seen] == new[0].tolist()
    assert (engine.stats.history_length, engine.stats.window_fill) == (8, 2)
    rest = engine.generate(30)
    engine.prefill(make_ids(model.config, 1, 6))
    assert torch.equal(torch.cat([new, rest], 1), engine.generate(34))  # stopped without a trace
    with pytest.raises(RuntimeError, match="busy"):
        engine.generate(1, on_token=lambda *_: bool(engine.step(torch.tensor([1])) is None))
    with pytest.raises(ZeroDivisionError):
        engine.prefill(make_ids(model.config, 1, 30), progress=lambda share: 1 / 0 > 0)
    with pytest.raises(RuntimeError, match="interrupted"):
        engine.prefill(make_ids(model.config, 1, 30), progress=lambda share: False)
    assert engine.stats.history_length == 0
    shares: list[float] = []
    engine.prefill(make_ids(model.config, 1, 30), progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_an_interrupted_slide_loses_one_token_only(place: Place) -> None:
    model = place.model()  # slides at 4, 8, 12, ...
    ids = make_ids(model.config, 1, 6)
    engine = engine_of(model, 60)
    engine.prefill(ids)
    want = engine.generate(30)
    engine.prefill(ids)
    seen: list[int] = []
    for _ in range(2):  # the slide before the third token is interrupted, and again
        with pytest.raises(RuntimeError, match="interrupted"):
            engine.generate(
                30, on_token=lambda _, token: seen.append(token), progress=lambda share: False
            )
        assert (engine.stats.history_length, engine.stats.window_fill) == (4, 4)
    assert seen == [*want[0, :3].tolist(), int(want[0, 2])]
    assert torch.equal(engine.generate(28), want[:, 2:])


def test_a_gpus_engine_takes_its_dtype_from_the_model(gpu: Place) -> None:
    config = gpu.config()
    for own, used in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        model = make_model(config, dtype=own).to(gpu.device)
        engine = Engine(model, max_context=20)
        assert engine.dtype == used and engine.arena.device == model.embed_tokens.weight.device
        logits = engine.prefill(make_ids(config, 1, 9).to(gpu.device))
        assert logits.is_cuda and logits.dtype == torch.float32
        assert engine.generate(5).device.type == "cpu"
        ids = make_ids(config, 2, 9).to(gpu.device)
        tokens = model.generate(ids, 5)
        assert tokens.device == ids.device and torch.equal(tokens[:, :9], ids)


def test_logits_are_ready_for_any_stream(gpu: Place) -> None:
    model = gpu.model(hidden_size=128, generation_window=64)
    ids = make_ids(model.config, 1, 3000)
    engine = engine_of(model, 3001)
    want = engine.prefill(ids).clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert torch.equal(engine.prefill(ids).clone(), want)
        other = engine_of(model, 3001)
    assert torch.equal(other.prefill(ids).clone(), want)
    assert torch.equal(other.generate(1)[0], want[0].argmax()[None].cpu())


def test_generation_takes_no_memory(gpu: Place) -> None:
    model = gpu.model(generation_window=64)
    engine = engine_of(model, 1000)
    engine.prefill(make_ids(model.config, 1, 100))
    engine.generate(100, SamplingParams(temperature=1.0))
    torch.cuda.synchronize()
    free, cached = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    engine.generate(700, SamplingParams(temperature=1.0))
    assert torch.cuda.mem_get_info()[0] == free and torch.cuda.memory_allocated() == cached


def test_the_way_out_of_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: str) -> Any:
        model = make_model(make_config(), dtype=torch.float32)
        monkeypatch.setattr(model, "parameters", lambda: [SimpleNamespace(device=device)])
        return model

    monkeypatch.setattr(_C, "has_cuda", False)
    with pytest.raises(ValueError, match=r"TLINFORMER_CUDA=1 pip install"):
        Engine(on(torch.device("cuda:0")), max_context=4)
    with pytest.raises(ValueError, match=r"on meta; .* model\.to\('cpu'\) first"):
        Engine(on(torch.device("meta")), max_context=4)
    with pytest.raises(ValueError, match="device is mps; the engine runs on cpu and cuda"):
        plan_cache(make_config(), max_context=4, device="mps")
    assert device_type(torch.device("cuda:1")) == "cuda"


@pytest.mark.skipif(_C.has_cuda, reason="built with the CUDA engine")
def test_a_build_without_cuda_plans_none() -> None:
    with pytest.raises(ValueError, match="has no CUDA backend"):
        plan_cache(make_config(hidden_size=64), max_context=4, device="cuda")


@pytest.mark.skipif(not _C.has_cuda, reason=NO_CUDA)
def test_sizes_that_cuda_does_not_take_are_named() -> None:
    sizes: list[tuple[str, dict[str, Any]]] = [
        ("num_attention_heads = 12; on CUDA it must be 32, 36", {}),
        ("hidden_size = 36; .* multiple of 8", {"hidden_size": 36, "num_attention_heads": 1}),
        ("intermediate_size = 44; .* multiple of 8", {"hidden_size": 64, "intermediate_size": 44}),
    ]
    for text, changes in sizes:
        with pytest.raises(ValueError, match=text):
            plan_cache(make_config(**changes), max_context=4, device="cuda")
    with pytest.raises(ValueError, match="dtype is float32"):
        plan_cache(make_config(hidden_size=64), max_context=4, device="cuda", dtype="float32")


def test_a_gpus_plan_names_the_context_that_fits(gpu: Place) -> None:
    for limit in (10**8, 10**9):
        with pytest.raises(RuntimeError, match="enough for max_context = ") as refusal:
            plan_cache(gpu.config(), max_context=10**8, memory_limit=limit, device="cuda")
        fits = int(str(refusal.value).split()[-1])
        sizes = [plan_cache(gpu.config(), max_context=n, device="cuda") for n in (fits, fits + 1)]
        assert sizes[0].total_bytes <= limit < sizes[1].total_bytes


def test_ctrl_c_ends_a_long_prefill() -> None:
    script = """
import torch
from tlinformer import Engine, TLinFormerConfig, TLinFormerForCausalLM
model = TLinFormerForCausalLM(TLinFormerConfig(vocab_size=100, hidden_size=256,
                                               num_attention_heads=4))
engine = Engine(model, max_context=400_000, dtype="bfloat16")
ids = torch.randint(100, (1, 400_000))
print("ready", flush=True)
try:
    engine.prefill(ids)
except KeyboardInterrupt:
    engine.prefill(ids[:, :50])
    print("interrupted", engine.generate(3).shape, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGINT)
    sent = time.monotonic()
    assert process.stdout.readline() == "interrupted torch.Size([1, 3])\n"
    assert time.monotonic() - sent < 10  # a hang, not a benchmark: the piece takes well under 1 s
    assert process.wait() == 0
