"""FLOPs, MFU and the event files of a training run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from small_runs import small_run

from tlinformer import metrics
from tlinformer.config import TLinFormerConfig
from tlinformer.train import train

PAPER = TLinFormerConfig(vocab_size=50257, hidden_size=432, num_attention_heads=12, dropout=0.2)


def test_flops_of_the_transformer_are_the_textbooks():
    length, width, layers = 512, PAPER.hidden_size, PAPER.num_layers
    weights = layers * (4 * width * width + 3 * width * PAPER.mlp_size) + 50257 * width
    expected = 6 * length * weights + 12 * layers * width * length**2
    assert metrics.training_flops("transformer", PAPER, length) == expected


def test_a_compressed_history_costs_what_the_paper_allows():
    base, ours = (
        metrics.training_flops(architecture, PAPER, 1024)
        for architecture in ("transformer", "tlinformer")
    )
    assert base / ours == pytest.approx(0.8, abs=0.01)  # 1K-512-0.5, causal attention whole


@pytest.mark.parametrize(
    ("name", "dtype", "given", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, None, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, None, 312e12),
        ("NVIDIA H200", None, None, None),
        ("NVIDIA H200", None, 67.0, 67e12),
        ("Abacus", torch.bfloat16, None, None),
    ],
)
def test_peak_of_a_device(monkeypatch, name, dtype, given, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics.peak_flops(torch.device("cuda"), dtype, given) == expected


def test_a_log_line_has_speed_utilisation_and_memory(text, tmp_path):
    config = small_run(text, tmp_path / "run", steps=2, peak_tflops=1e-3)
    train(config)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    sizes = TLinFormerConfig.from_dict(config.model)
    flops = metrics.training_flops("tlinformer", sizes, 24) / 24
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e9, rel=1e-2)
    assert 0.01 < line["memory_gib"] < 100


def test_tensorboard_has_the_same_figures(text, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = small_run(text, tmp_path / "run", tensorboard=True)
    train(config)
    log = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    tags = log.Tags()["scalars"]
    assert {"train/perplexity", "train/tokens_per_second", "train/learning_rate"} <= set(tags)
    assert {"train/memory_gib", "valid/perplexity"} <= set(tags)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert [(e.step, e.value) for e in log.Scalars("train/loss")] == losses


def test_tensorboard_without_its_package_names_the_way_out(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or leave --tensorboard out"):
        train(small_run(text, tmp_path / "run", tensorboard=True))
    assert not Path(tmp_path / "run").exists()
