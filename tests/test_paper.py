"""The paper's experiments, in tiny, and what the report makes of their results."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

PAPER = Path(__file__).parent.parent / "benchmarks" / "paper"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs an experiment with --smoke; its results lie in tmp_path/results."""
    monkeypatch.setattr(sys, "path", [str(PAPER), *sys.path])

    def run(name, *only):
        places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        argv = [f"{name}.py", "--smoke", "--device", "cpu", *places, "--only", *only]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(PAPER / f"{name}.py"), run_name="__main__")
        folder = tmp_path / "results" / name
        return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}

    return run


def report(monkeypatch, folder):
    """The tables of the results in ``folder``."""
    pytest.importorskip("matplotlib")
    readme = folder / "README.md"
    readme.write_text((PAPER / "README.md").read_text())
    argv = ["report.py", "--results", str(folder / "results"), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(PAPER / "report.py"), run_name="__main__")
    return readme.read_text()


@pytest.mark.usefixtures("one_thread")
def test_training_experiments_run_and_are_reported(start, tmp_path, monkeypatch, capsys):
    pair = ("base-1k-seed0", "1k-1k-0.5-seed0")
    results = start("parity", *pair)
    assert set(results) == set(pair)
    base, ours = (results[name] for name in pair)
    assert base["training_tokens"] == ours["training_tokens"]
    assert base["parameters"] == ours["parameters"]
    scores = [line["step"] for line in ours["curve"] if "valid_perplexity" in line]
    assert scores == [1, 2, 3, 4, 5, 6]
    start("parity", *pair)
    assert capsys.readouterr().out.count("done before") == 2
    assert [row["history"] for row in start("history", *pair)[pair[0]]["rows"]][:2] == [0, 16]
    sizes = start("windows", "ratio-0.25-seed0")["ratio-0.25-seed0"]["settings"]["model"]
    assert (sizes["history_window"], sizes["generation_window"]) == (8, 24)
    tables = report(monkeypatch, tmp_path)
    gap = ours["final"]["valid_perplexity"] / base["final"]["valid_perplexity"] - 1
    assert f"| {100 * gap:+.1f}% | +0.9% |" in tables  # ours beside the paper's
    assert tables.count("No results yet.") == 1  # the needle's
    with pytest.raises(SystemExit, match="--only nonsense: the runs are base-512-seed0"):
        start("parity", "nonsense")


@pytest.mark.usefixtures("one_thread")
def test_needle_runs_and_its_chance_is_what_an_untrained_model_gets(start, tmp_path, monkeypatch):
    result = start("needle", "history-16")["history-16-seed0"]
    queries = sum(row["queries"] for row in result["rows"] if row["length"] == 256)
    assert 16 * 2 < queries <= 16 * 4  # each key is scored once
    assert sum(row["accuracy"] for row in result["rows"]) / len(result["rows"]) < 0.4
    assert "| history-16 |" in report(monkeypatch, tmp_path)


def test_needle_asks_for_what_lies_in_the_history(start):
    needle = runpy.run_path(str(PAPER / "needle.py"))
    ids, asked, back = needle["batch"](np.random.default_rng(0), 5, 128)
    assert ids.shape == (5, 128) and ids.min() >= 0 and ids.max() < needle["VOCABULARY"]
    assert (ids.gather(1, asked - 1) == needle["QUERY"]).all()
    first = back > 0
    assert (asked - back < 128 - needle["WINDOW"])[first].all()
    for row, keys in enumerate(ids.gather(1, asked)):
        assert sorted(keys[first[row]]) == sorted(set(keys.tolist()))  # once each
    keys, values = needle["KEYS"], needle["VALUES"]
    pair = ids.gather(1, asked - back) - (needle["VOCABULARY"] - keys * values)
    assert (pair // values == ids.gather(1, asked) - 1)[first].all()
    assert (pair % values == ids.gather(1, asked + 1) - 1 - keys)[first].all()


def test_the_knee_is_where_speed_stops_to_cost_little():
    pytest.importorskip("matplotlib")
    knee = runpy.run_path(str(PAPER / "report.py"))["knee"]
    assert knee([(10, 20.0), (9, 12.0), (5, 11.0), (1, 10.0)]) == 1
