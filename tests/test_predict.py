"""What `tlinformer plan` predicts: linear in blocks and history, from runs that are short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Place, make_config

from tlinformer import predict
from tlinformer.cli import main
from tlinformer.plan import longest_context, plan_cache, weights_bytes
from tlinformer.predict import Costs, histories_to_probe, measure_costs, measure_events

pytestmark = pytest.mark.usefixtures("one_thread")
CEILINGS = {"bytes_per_second": 1e9, "flops_per_second": 1e12}


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "measure_ceilings", lambda device: CEILINGS)


def linear(blocks: int, history: int, batch: int) -> np.ndarray:
    """A device on which every cost has a fixed part, one a block and one a block and token."""
    steps = np.arange(9.0).reshape(3, 3) + 1
    return 1e-3 * steps * (1 + blocks * (2 + batch * history / 1000))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 9])
def test_a_deep_model_is_predicted_from_shallow_ones(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fake(model: Any, history: int, batch_size: int, repeats: int) -> np.ndarray:
        seen.append((model.config.num_blocks, history))
        # Other programs only add: what one round suffers, another does not.
        return linear(model.config.num_blocks, history, batch_size) * (2 - (len(seen) > 12))

    monkeypatch.setattr(predict, "measure_events", fake)
    config = make_config(num_blocks=blocks)
    costs = measure_costs(config, longest=10**6, batch_size=3, repeats=3)
    assert max(depth for depth, _ in seen) <= 4 and max(costs.histories) <= 400_000
    for history in (8, 1000, 10**6):
        want = linear(blocks, max(history, costs.histories[0]), 3)
        events = costs.at(history).events
        got = [[e.microseconds / 1e6, e.bytes, e.flops] for e in events.values()]
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_costs_between_and_beyond_what_was_run() -> None:
    table = np.zeros((2, 3, 3))
    table[:, :, 0] = [[4.0, 2.0, 1e-3], [12.0, 6.0, 2e-3]]
    table[:, 2, 1] = [5e5, 1e6]
    costs = Costs(make_config(generation_window=4), [100, 300], table, CEILINGS)
    times = {h: [e.microseconds / 1e6 for e in costs.at(h).events.values()] for h in (0, 200, 700)}
    assert times[0] == pytest.approx([4, 2, 1e-3])  # a device idles there
    assert times[200] == pytest.approx([8, 4, 1.5e-3])
    assert times[700] == pytest.approx([28, 14, 4e-3])
    found = costs.at(700)
    assert found.amortised_seconds == pytest.approx((14 + 3 * 4e-3) / 4)
    assert found.events["hit"].bound == "memory"
    assert found.events["hit"].share == pytest.approx(2e6 / 1e9 / 4e-3)
    always = Costs(make_config(generation_window=1), [100, 300], table, CEILINGS).at(200)
    assert "hit" not in always.events and always.amortised_seconds == pytest.approx(4)


def test_runs_end_where_they_take_long_or_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    whole = list(histories_to_probe(config, 10**9))
    assert whole[0] >= config.history_window_at(0) and whole[-1] <= 400_000
    assert all(history % config.generation_window == 0 for history in whole)
    assert list(histories_to_probe(config, 1)) == whole[:1]
    monkeypatch.setattr(
        predict, "measure_events", lambda m, h, b, repeats: np.full((3, 3), h / whole[3])
    )
    assert measure_costs(config, longest=10**9).histories == whole[:4]
    needed = plan_cache(config, max_context=whole[1] + 4, dtype="bfloat16").total_bytes
    monkeypatch.setattr("tlinformer.plan.available_memory", lambda device: needed)
    assert measure_costs(config, longest=10**9).histories == whole[:2]


@pytest.mark.parametrize("blocks", [2, 5])
def test_predicted_work_is_the_engines(place: Place, blocks: int) -> None:
    config = place.config(num_blocks=blocks)
    options: dict[str, Any] = {"dtype": place.dtype, "device": place.device}
    costs = measure_costs(config, longest=300, repeats=1, **options)
    model = predict.random_model(config, place.device, place.dtype)
    events = costs.at(600).events.values()
    got = [[event.bytes, event.flops] for event in events]
    measured = measure_events(model, 600, repeats=1)
    np.testing.assert_allclose(got, measured[:, 1:], rtol=1e-2)
    assert (measured[:, 0] > 0).all() and all(event.microseconds > 0 for event in events)


def test_longest_context_is_the_last_that_fits() -> None:
    config = make_config()
    sizes: dict[str, Any] = {"batch_size": 3, "dtype": "bfloat16"}
    for limit in (50_000, 10**6, 10**10):
        longest = longest_context(config, memory_limit=limit, **sizes)
        assert plan_cache(config, max_context=longest, **sizes).total_bytes <= limit
        assert plan_cache(config, max_context=longest + 1, **sizes).total_bytes > limit
    assert longest_context(config, memory_limit=100, **sizes) == 0


def test_plan_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    options = ["--device", "cpu", "--threads", "1", "--context", "100", "--dtype", "float32"]
    assert main(["plan", "--model", str(tmp_path), "--batch", "2", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["prediction"]
    assert found["history"] == 96 and max(found["probed_histories"]) <= 96
    assert found["ceilings"] == CEILINGS
    slide, hit = found["slide"]["milliseconds"], found["hit"]["milliseconds"]
    assert found["amortised_milliseconds"] == pytest.approx((slide + 3 * hit) / 4)
    row = 4 * 2 * config.hidden_size
    rows = 2 * (2 * 96 + 4 * 5 + 6 * 2)  # of two sequences: history, context, window of two
    assert found["hit"]["bytes"] == pytest.approx(
        row * rows + weights_bytes(config, "float32"), rel=0.2
    )
    assert result["longest_context"] > 10**6
    file = str(tmp_path / "config.json")
    assert main(["plan", "--config", file, *options]) == 0
    assert "a token, amortised" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main(["plan", file, *options, "--no-measure", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"] is None


def test_plan_measures_nothing_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config().to_dict()))
    monkeypatch.setattr("tlinformer.plan.available_memory", lambda device: 10**5)
    monkeypatch.setattr(predict, "measure_costs", lambda *a, **k: pytest.fail("measured"))
    assert main(["plan", str(tmp_path), "--device", "cpu", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["fits"], result["prediction"]) == (False, None)
    assert 0 < result["longest_context"] < result["context"]
