"""The engine against the golden vectors, the float64 reference and itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Golden, make_config, make_ids, make_model
from reference import reference_logits

from tlinformer import Engine, SamplingParams, TLinFormerForCausalLM, plan_cache
from tlinformer.engine import available_memory

pytestmark = pytest.mark.usefixtures("one_thread")


def engine_of(model: Any, max_context: int, **options: Any) -> Engine:
    """An engine whose memory is NaN wherever nothing was written yet."""
    engine = Engine(model, max_context=max_context, **options)
    engine.arena.fill_(0xFF)
    return engine


def cached_logits(engine: Engine, ids: torch.Tensor, cut: int) -> torch.Tensor:
    """Logits of positions cut-1 ... L-1: (B, L - cut + 1, V)."""
    rows = [engine.prefill(ids[:, :cut])]
    rows += [engine.step(ids[:, i]) for i in range(cut, ids.size(1))]
    return torch.stack(rows, 1)


def test_golden_from_every_split_point(golden: Golden) -> None:
    model = TLinFormerForCausalLM(golden.config)
    model.load_state_dict(golden.state_dict)
    batch, length = golden.input_ids.shape
    engine = engine_of(model, length, batch_size=batch)
    for cut in range(1, length + 1):
        engine.arena.fill_(0xFF)
        got = cached_logits(engine, golden.input_ids, cut)
        torch.testing.assert_close(got, golden.logits[:, cut - 1 :], atol=1e-4, rtol=0)


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
def test_engine_equals_reference(changes: dict[str, Any]) -> None:
    model = make_model(make_config(**changes), dtype=torch.float32)
    ids = make_ids(model.config, 2, 27)
    want = reference_logits(model.config, model.state_dict(), ids)
    engine = engine_of(model, 27, batch_size=2)
    for cut in (1, 4, 13, 27):
        got = cached_logits(engine, ids, cut).double()
        torch.testing.assert_close(got, want[:, cut - 1 :], atol=2e-4, rtol=1e-4)


def test_many_rows_cross_every_tile() -> None:
    """A prompt of several pieces, tiles and threads, its last window not full."""
    config = make_config(hidden_size=48, history_window=150, generation_window=140, num_blocks=3)
    model = make_model(config, dtype=torch.float32)
    ids = make_ids(config, 1, 1300)
    want = reference_logits(config, model.state_dict(), ids, last_only=True)
    for threads in (1, 2, 5):
        got = engine_of(model, 1300, num_threads=threads).prefill(ids).double()
        torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)


def test_bfloat16_is_as_exact_as_pytorch_in_bfloat16() -> None:
    config = make_config(hidden_size=72, generation_window=9, history_window=12)
    model = make_model(config, dtype=torch.bfloat16)
    ids = make_ids(config, 2, 40)
    want = reference_logits(config, model.state_dict(), ids)
    with torch.no_grad():
        eager = (model(ids).double() - want).abs().max()
    engine = engine_of(model, 40, batch_size=2)
    assert engine.dtype == torch.bfloat16
    for cut in (1, 19, 40):
        got = cached_logits(engine, ids, cut).double()
        assert (got - want[:, cut - 1 :]).abs().max() <= 2 * eager + 1e-3


def test_batch_of_different_lengths_equals_single_runs() -> None:
    model = make_model(make_config(), dtype=torch.float32)
    prompts = [make_ids(model.config, 1, n, seed=n)[0] for n in (1, 4, 11, 30)]
    together = engine_of(model, 60, batch_size=4)
    logits = together.prefill(prompts)
    new = together.generate(25)
    after = together.step([torch.tensor([3])] * 4)
    assert all(isinstance(x, list) for x in (logits, new, after))
    for i, prompt in enumerate(prompts):
        single = engine_of(model, 60)
        torch.testing.assert_close(single.prefill(prompt[None])[0], logits[i], atol=1e-4, rtol=0)
        assert torch.equal(single.generate(25)[0], new[i])
        torch.testing.assert_close(single.step(torch.tensor([3]))[0], after[i], atol=1e-4, rtol=0)
    outputs = model.generate(prompts, max_new_tokens=25)
    for output, prompt, n in zip(outputs, prompts, new, strict=True):
        assert torch.equal(output, torch.cat([prompt, n]))


def test_greedy_tokens_equal_the_scoring_forward() -> None:
    model = make_model(make_config(), dtype=torch.float32)
    ids = make_ids(model.config, 2, 10)
    tokens = model.generate(ids, max_new_tokens=50)
    assert tokens.shape == (2, 60) and torch.equal(tokens[:, :10], ids)
    with torch.no_grad():
        logits = model(tokens)[:, 9:-1]
    top, second = logits.topk(2).values.unbind(-1)
    agree = logits.argmax(-1) == tokens[:, 10:]
    assert (agree | (top - second < 1e-3)).all() and agree.float().mean() > 0.9


def test_generation_continues_where_it_stopped() -> None:
    model = make_model(make_config(), dtype=torch.float32)
    ids = make_ids(model.config, 1, 7)
    sampling = SamplingParams(temperature=1.0, seed=5)
    whole, parts = engine_of(model, 60), engine_of(model, 60)
    whole.prefill(ids)
    parts.prefill(ids)
    want = whole.generate(30, sampling)
    got = torch.cat([parts.generate(n, sampling) for n in (1, 12, 0, 17)], 1)
    assert torch.equal(got, want)
    assert whole.stats == parts.stats


def test_stats_count_hits_and_slides() -> None:
    model = make_model(make_config(generation_window=4, history_window=5), dtype=torch.float32)
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


def frequencies(model: Any, sampling: dict[str, Any], draws: int = 4000) -> torch.Tensor:
    """How often each token is drawn after one prompt, over many seeds."""
    engine = engine_of(model, 4)
    counts = torch.zeros(model.config.vocab_size)
    prompt = torch.tensor([[1]])
    for seed in range(draws // 2):
        engine.prefill(prompt)
        counts[engine.generate(1, SamplingParams(seed=seed, **sampling))] += 1
    return counts / counts.sum()


@pytest.fixture(scope="module")
def drawn_from() -> tuple[Any, torch.Tensor]:
    model = make_model(make_config(vocab_size=11), dtype=torch.float32)
    return model, engine_of(model, 4).prefill(torch.tensor([[1]]))[0].double()


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


def test_an_extreme_repetition_penalty_is_no_nan() -> None:
    model = make_model(make_config(), dtype=torch.float32)
    with torch.no_grad():
        model.embed_tokens.weight[0] = 0  # its logit is 0
    engine = engine_of(model, 4)
    logits = engine.prefill(torch.tensor([[0]]))
    drawn = engine.generate(1, SamplingParams(repetition_penalty=1e300))
    assert logits.max() > 0 and torch.equal(drawn[0], logits.argmax(1))


def test_torchs_default_dtype_does_not_matter() -> None:
    model = make_model(make_config(), dtype=torch.float32)
    engine = engine_of(model, 20)
    want = engine.prefill(torch.tensor([[1, 2]]))
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = engine.prefill(torch.tensor([[1, 2]], dtype=torch.uint16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_stop_tokens_end_sequences_apart() -> None:
    model = make_model(make_config(), dtype=torch.float32)
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
    logits = engine.step([1, 1])  # rows still belong to their sequences
    alone = engine_of(model, 60)
    alone.prefill(torch.cat([prompts[1], second])[None])
    torch.testing.assert_close(alone.step(torch.tensor([1]))[0], logits[1], atol=1e-4, rtol=0)


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


def test_model_and_engine_errors() -> None:
    model = make_model(make_config(), dtype=torch.float32)
    engine = engine_of(model, 20)
    ids = make_ids(model.config, 1, 6)
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
        "float32 or bfloat16": lambda: Engine(model, max_context=4, dtype=torch.float16),
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
        Engine(model, max_context=10**12)
    engine.prefill(ids)
    late = {
        "takes one each": lambda: engine.step(torch.tensor([1, 2])),
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


def test_nan_logits_are_named_and_the_engine_survives() -> None:
    model = make_model(make_config(), dtype=torch.float32)
    with torch.no_grad():
        model.embed_tokens.weight[7] = float("nan")
    engine = engine_of(model, 20)
    engine.prefill(torch.tensor([[1, 2]]))
    with pytest.raises(RuntimeError, match="position 2 contain NaN"):
        engine.generate(5, SamplingParams(temperature=1.0))
    with torch.no_grad():
        model.embed_tokens.weight[7] = 0
    engine.prefill(torch.tensor([[1, 2]]))
    assert engine.generate(5).shape == (1, 5)


def test_callbacks_stop_and_may_not_reenter() -> None:
    model = make_model(make_config(), dtype=torch.float32)
    engine = engine_of(model, 40)
    seen: list[tuple[int, int]] = []
    engine.prefill(make_ids(model.config, 1, 6))
    new = engine.generate(10, on_token=lambda *token: seen.append(token) or len(seen) < 4)
    assert new.shape == (1, 4) and [t for _, t in seen] == new[0].tolist()
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
