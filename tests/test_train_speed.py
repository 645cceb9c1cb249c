"""The benchmark of training speed, in tiny."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.usefixtures("one_thread")
def test_training_speed_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    path = tmp_path / "speed.json"
    options = ["--shapes", "1k-512-0.5", "--profile", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", "--smoke", *options])
    runpy.run_path(str(BENCHMARKS / "train.py"), run_name="__main__")
    result = json.loads(path.read_text())
    (row,) = result["steps"]
    speeds = [row[f"{name}_tokens_per_second"] for name in ("tlinformer", "transformer")]
    assert row["ratio"] == pytest.approx(speeds[0] / speeds[1], rel=0.01)
    assert row["reached"] == pytest.approx(row["ratio"] / row["flops_allow"])
    assert 0.5 < row["flops_allow"] < 1
    assert {r["way"] for r in result["attention"]} == {"window_attention", "SDPA x 2"}
    assert all(
        r["forward_milliseconds"] > 0 < r["backward_milliseconds"] for r in result["attention"]
    )
    shares = [r["share"] for r in result["1k-512-0.5 tlinformer"]]
    assert shares[0] == 1 and 0.5 < sum(shares[1:]) < 1.001
