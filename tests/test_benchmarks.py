"""The suites of benchmarks/: peers are right, what is counted is what happens, files go on."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlinformer import Engine
from tlinformer.cli import main as tlinformer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")
CEILINGS = {"bytes_per_second": 1e10, "copy_bytes_per_second": 1e10, "flops_per_second": 1e11}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of benchmarks/, whose ceilings are known and whose L2 is small."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "measure_ceilings", lambda _: CEILINGS)
    monkeypatch.setattr(measure, "FLUSH", 2**10)


def point(suite: str, peer: str, history: int = 64, batch: int = 1, **changes: Any) -> Any:
    args = {"suite": suite, "device": CPU, "dtype": torch.float32, "calls": 2, "smoke": True}
    args |= {"point_seconds": 8, "again": False, "json": None, **changes}
    points = importlib.import_module("points")
    return points.Point(argparse.Namespace(**args), "tiny", peer, history, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "peer",
    ["engine", "transformer", "tlinformer-pytorch", "sliding-window", "naive-concatenate"],
)
def test_peers_compute_what_their_models_do(
    peer: str, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("on a GPU the engine is bfloat16")
    suites = importlib.import_module("suites")
    at = point("decode", peer, dtype=dtype, device=device)
    found = suites.errors(at, at.peer.make(at.config, device, dtype))
    assert found["error"] <= 2 * found["error_eager"] + 1e-4


@pytest.mark.parametrize("peer", ["transformer", "tlinformer-pytorch", "sliding-window"])
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 2), (30, 1), (97, 1), (200, 2)])
def test_static_peers_with_batches_and_shared_heads(
    peer: str, length: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, points = map(importlib.import_module, ("sizes", "points"))
    monkeypatch.setattr(importlib.import_module("sliding"), "PIECE", 64)  # prompts of several
    config = sizes.TLinFormerConfig(
        **sizes.SIZES["tiny"], num_blocks=3, block_depth=3, num_key_value_heads=kv_heads
    )
    cls = points.PEERS[peer]
    model = cls.make(config, CPU, torch.float32)
    ids = sizes.random_ids(config, 2, length + 40)
    expected = cls.reference(model, ids)
    runner = cls(model, length + 64, 2)
    runner.arena.fill_(torch.nan)
    for cache in runner.cache.values():
        cache[..., config.head_dim :] = 0
    torch.testing.assert_close(
        runner.prefill(ids[:, :length]), expected[:, length - 1], atol=1e-4, rtol=1e-4
    )
    for i in range(length, length + 40):
        logits = runner.step(ids[:, i])
        torch.testing.assert_close(logits, expected[:, i], atol=1e-4, rtol=1e-4)


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    suites, static = map(importlib.import_module, ("suites", "static"))
    rows = static.StaticTransformer.rows
    monkeypatch.setattr(
        static.StaticTransformer, "rows", lambda self: (rows(self)[0], rows(self)[1] - 1)
    )
    at = point("decode", "transformer")
    results = importlib.import_module("measure").Results(None)
    with pytest.raises(ArithmeticError, match="off by"):
        suites.measure(at, suites.Models(), results, CEILINGS)
    at.args.smoke = False
    row = suites.measure(at, suites.Models(), results, CEILINGS)
    assert "off by" in row["failed"] and "ms" not in row


def test_what_is_counted_is_what_the_engine_does() -> None:
    sizes, peers = map(importlib.import_module, ("sizes", "peers"))
    config = sizes.config_of("tiny")
    model = peers.EnginePeer.make(config, CPU, torch.float32)
    assert sizes.weight_count(config) == sum(p.numel() for p in model.parameters())
    engine = Engine(model, max_context=2000)

    def flops(call: Any) -> float:
        engine._compiled.meter(True)
        call()
        return sum(verb.flops for verb in engine._compiled.metered)

    for length in (10, 32, 200, 1024):
        ids = sizes.random_ids(config, 1, length)
        counted = peers.EnginePeer.prefill_flops(config, length)
        assert flops(lambda ids=ids: engine.prefill(ids)) == pytest.approx(counted, rel=1e-9)
    counted = sizes.slide_flops(config, 1024)
    assert flops(lambda: engine.step(torch.tensor([1]))) == pytest.approx(counted, rel=1e-9)
    before = engine.stats.rows_read
    engine.generate(3)
    counted = sum(sizes.hit_rows(config, 1024, fill) for fill in (2, 3, 4))
    assert engine.stats.rows_read - before == counted
    plan = peers.EnginePeer.state_bytes(config, 1024, 1, 4)
    assert plan == peers.plan_cache(config, max_context=1024).cache_bytes


@pytest.mark.parametrize("suite", ["decode", "prefill", "batch", "cache"])
def test_a_suite_writes_rows_and_goes_on(suite: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.json"
    options = ["--smoke", "--peers", "engine", "transformer", "gla", "--json", str(path)]
    options += ["--histories", "70", "--batch-sizes", "1", "2"]
    assert tlinformer(["bench", suite, *options, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(line.startswith("tiny  ") for line in lines[1:])
    assert all((" at most " if suite == "cache" else " ms  (") in line for line in lines[1:5])
    data = json.loads(path.read_text())
    assert len(data["runs"]) == 1 and data["runs"][0]["ceilings"] == CEILINGS
    assert [(r["peer"], r["history"], r["batch"]) for r in data["rows"]] == [
        (peer, 64, batch) for peer in ("engine", "transformer", "gla") for batch in (1, 2)
    ]
    for row in data["rows"][:4]:
        assert row["bytes" if suite == "cache" else "ms"] > 0
        if suite == "prefill":
            assert ("slide_ms" in row) == (row["peer"] == "engine")
        if suite in ("decode", "batch"):
            assert row["share"] == pytest.approx(row["limit_ms"] / row["ms"])
            assert row["p10"] <= row["ms"] <= row["p90"]
    installed = importlib.util.find_spec("fla") is not None and torch.cuda.is_available()
    assert installed or all("not_installed" in row for row in data["rows"][4:])

    again = {**data, "rows": data["rows"][1:4]}  # one row and those not installed are missing
    path.write_text(json.dumps(again))
    tlinformer(["bench", suite, *options, "--device", "cpu"])
    after = json.loads(path.read_text())
    kept = {json.dumps(r) for r in after["rows"] if r["run"] == 0}
    assert kept == {json.dumps(r) for r in again["rows"]}
    assert sum(r["run"] == 1 for r in after["rows"]) == 3

    if suite != "decode":
        return
    data["runs"][0]["commit"] = "another"
    path.write_text(json.dumps(data))
    tlinformer(["bench", suite, *options, "--device", "cpu"])
    assert all(r["run"] == 1 for r in json.loads(path.read_text())["rows"])
    one = ["--peers", "engine", "--batch-sizes", "1", "--again"]
    tlinformer(["bench", suite, *options, *one, "--device", "cpu"])
    after = json.loads(path.read_text())["rows"]
    assert len(after) == len(data["rows"])  # other rows stay
    assert [(r["peer"], r["batch"]) for r in after if r["run"] == 2] == [("engine", 1)]


def test_the_clock_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--smoke", "--peers", "engine", "--histories", "0", "64", "--seconds", "0"]
    tlinformer(["bench", "cache", *options, "--json", str(tmp_path / "x.json")])
    assert "2 rows are left" in capsys.readouterr().out


def test_what_does_not_fit_says_why() -> None:
    before = {**point("prefill", "transformer", 4096).key, "ms": 4000.0}
    later = point("prefill", "transformer", 16384)
    assert "would take about" in later.obstacle([before], CEILINGS)
    assert not later.obstacle([{**before, "ms": 1.0}], CEILINGS)
    launches = {**before, "ms": 4000.0, "history": 32}
    assert not later.obstacle([launches], CEILINGS), "launches do not grow"
    huge = point("decode", "transformer", 2**34)
    assert "are free" in huge.obstacle([], CEILINGS)


class FakeCache(list):  # type: ignore[type-arg]
    """States of layers by index, as flash-linear-attention's."""


class FakeForCausalLM(nn.Module):
    """A recurrent model with the calls of flash-linear-attention's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, d = config, config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, d)
        self.up = nn.Linear(d, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, d)

    def tie_weights(self) -> None:
        pass

    def forward(
        self,
        ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Any:
        state = torch.zeros(len(ids), self.down.out_features)
        if past_key_values:
            state = past_key_values[0]["recurrent_state"]
        else:
            past_key_values = FakeCache([{"recurrent_state": None, "conv_state": None}])
        outputs = []
        for x in self.embeddings(ids).unbind(1):
            state = torch.tanh(0.9 * state + x)
            outputs.append(self.down(self.up(state)))
        past_key_values[0]["recurrent_state"] = state
        logits = torch.stack(outputs, 1)[:, -logits_to_keep:] @ self.embeddings.weight.T
        return types.SimpleNamespace(logits=logits, past_key_values=past_key_values)


def test_recurrent_peers_keep_their_state_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("fla.models")
    fake.GLAConfig = types.SimpleNamespace  # type: ignore[attr-defined]
    fake.GLAForCausalLM = FakeForCausalLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.models", fake)
    linear, suites, sizes = map(importlib.import_module, ("linear", "suites", "sizes"))
    monkeypatch.setattr(linear.Linear, "missing", classmethod(lambda _: ""))
    at = point("decode", "gla")
    model = at.peer.make(at.config, CPU, torch.float32)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(sizes.weight_count(at.config), rel=0.01)
    assert suites.errors(at, model)["error"] < 1e-5
    runner = at.peer(model, 0, 1)
    runner.fill(8)
    (where,) = (t.data_ptr() for t in runner._tensors())
    loop = runner.tokens()
    runner.token.fill_(3)
    loop(2)
    twice = runner.logits.clone()
    runner.rewind()
    runner.token.fill_(3)
    loop(2)
    assert torch.equal(runner.logits, twice)
    assert [t.data_ptr() for t in runner._tensors()] == [where]
    row = suites.measure(
        at, suites.Models(), importlib.import_module("measure").Results(None), CEILINGS
    )
    assert row["parameters"] == count and row["state_bytes"] == 4 * at.config.hidden_size


def test_the_fastest_right_attention_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = importlib.import_module("attention")
    took = {"slow": 3.0, "right": 2.0, "wrong": 1.0}
    choose = attention.FastestAttention(0.5, CPU)

    def way(name: str) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if name == "refuses":
                raise RuntimeError("not this shape")
            return q + (name == "wrong")

        call.name = name  # type: ignore[attr-defined]
        return call

    ways = {name: way(name) for name in ("refuses", *took)}
    monkeypatch.setattr(choose, "ways", lambda rows, head_dim, causal: ways)
    monkeypatch.setattr(
        attention, "milliseconds", lambda call, *_: took[getattr(call, "func", way("slow")).name]
    )
    x = torch.ones(1, 1, 1, 4)
    assert torch.equal(choose(x, x, x, False), x)
    assert choose.names() == {"1 x 1+": "right"}


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (70, 70), (130, 194), (256, 320)])
def test_both_ways_of_a_band_see_the_same(
    rows: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    sliding = importlib.import_module("sliding")
    monkeypatch.setattr(sliding, "flex", lambda: flex_attention)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((4, rows), (2, keys), (2, keys)))
    distance = torch.arange(rows)[:, None] + (keys - rows) - torch.arange(keys)
    mask = (distance >= 0) & (distance < 64)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    for way in (sliding.in_blocks, sliding.flex_band):
        torch.testing.assert_close(way(64, 0.3, q, k, v), expected, atol=1e-5, rtol=1e-5)


class Paged:
    """What FlashInfer's wrapper computes, of the pages that it is told."""

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "HND"

    def plan(self, begins: Tensor, pages: Tensor, last: Tensor, *shape: int, **other: Any) -> None:
        assert shape == (4, 2, 64, 16)  # query heads, heads, head size, rows of a page
        self.begins, self.pages, self.last, self.scale = begins, pages, last, other["sm_scale"]

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        out = []
        for b, row in enumerate(q):
            own = self.pages[self.begins[b] : self.begins[b + 1]].long()
            rows = 16 * (len(own) - 1) + int(self.last[b])
            k, v = (x[own].transpose(0, 1).flatten(1, 2)[:, :rows] for x in cache)
            out.append(
                F.scaled_dot_product_attention(
                    row[:, None], k, v, scale=self.scale, enable_gqa=True
                )[:, 0]
            )
        return torch.stack(out)


@pytest.mark.parametrize(("batch", "rows"), [(1, 33), (3, 32), (2, 1)])
def test_pages_are_the_caches_rows(monkeypatch: pytest.MonkeyPatch, batch: int, rows: int) -> None:
    flashinfer = types.ModuleType("flashinfer")
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = Paged  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    decode = importlib.import_module("paged").PagedDecode(0.3, tensor_cores=False)
    cache = torch.full((2, batch, 2, 64, 64), torch.nan)
    cache[:, :, :, :rows] = torch.randn(2, batch, 2, rows, 64)
    k, v = cache[..., :rows, :]
    q = torch.randn(batch, 4, 1, 64)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    for _ in range(2):  # as planned, then as kept
        torch.testing.assert_close(decode(q, k, v), expected)
    with pytest.raises(ValueError, match="strides"):
        decode(q, k.transpose(1, 2), v)


def test_memory_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    options = ["--size", "tiny", "--prompt", "300", "--generated", "60", "--device", "cpu"]
    tlinformer(["bench", "memory", *options, "--json", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["slides"] in (1, 2) and row["generated"] == 60
    assert row["peak_bytes"] >= row["weight_bytes"] and row["growth_bytes"] < 2**22


def test_suites_need_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    bench = importlib.import_module("tlinformer.cli.bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", "/nowhere/tlinformer/cli/bench.py")
    assert tlinformer(["bench", "decode"]) == 2
    assert "is in the repository: clone it" in capsys.readouterr().err


def test_the_report_fits_the_papers_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report, sizes, points = map(importlib.import_module, ("peers_report", "sizes", "points"))
    config, run = sizes.config_of("41m"), {"date": "d", "commit": "c", "threads": 2}
    run["ceilings"] = {"bytes_per_second": 1e9, "flops_per_second": 1e10}
    histories = (1024, 4096, 16384, 2**20)
    for suite in ("decode", "prefill", "cache", "batch"):
        rows = []
        for peer in ("engine", "transformer"):
            for history in histories:
                key = {"suite": suite, "size": "41m", "peer": peer, "history": history, "run": 0}
                key |= {"batch": 1, "dtype": "float32"}
                moved = points.PEERS[peer].token_bytes(config, history, 1, 4)
                row = {"ms": moved / 1e9 * 2e3 + 3, "share": 0.5, "tokens_per_second": 10.0}
                if suite == "prefill" and peer == "engine":
                    row["slide_ms"] = sizes.slide_flops(config, history) / 1e10 * 4e3
                if suite == "cache":
                    row = {"bytes": moved, "max_context": 10**6, "of": 2**30}
                rows.append({**key, **row})
        rows[-1] = {**key, "skipped": "needs 9.0 GiB, 1.0 are free"}
        data = {"runs": [run], "rows": rows}
        (tmp_path / f"{suite}-cpu.json").write_text(json.dumps(data))
    text = report.peers(tmp_path, tmp_path / "images")
    fits = {
        line.split(" | ")[1]: line.split(" | ") for line in text.splitlines() if " ns | " in line
    }
    assert [fits[what][4] for what in ("hit", "miss")] == ["2.00", "4.00"]
    assert all(cells[7] == "1.00000" for cells in fits.values())
    assert "no room" in text and "needs 9.0 GiB" in text and "Measured on d, commit c" in text
    for name in ("paper-figure-9", "peers"):
        assert (tmp_path / f"images/{name}-41m-cpu.png").stat().st_size > 10_000
        assert f"images/{name}-41m-cpu.png" in text


def test_the_planner_keeps_what_it_does_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = importlib.import_module("planner")
    path, errors = tmp_path / "planner.json", {"8M": 0.1, "GQA": -0.2}
    monkeypatch.setattr(
        planner, "check", lambda name, *_: {"model": name, "rows": [{"error": errors[name]}]}
    )

    def measure(*names: str) -> dict[str, float]:
        command = ["planner.py", "--device", "cpu", "--json", str(path), "--models", *names]
        monkeypatch.setattr(sys, "argv", command)
        planner.main()
        models = json.loads(path.read_text())["models"]
        return {model["model"]: model["rows"][0]["error"] for model in models}

    with pytest.raises(SystemExit, match=r"an error of -20.0% is beyond 15%"):
        measure("GQA")
    errors["GQA"] = 0.05
    assert measure("8M") == {"8M": 0.1, "GQA": -0.2}
    assert measure("GQA") == {"8M": 0.1, "GQA": 0.05}
